package vhost

import (
	"context"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// h2cUpstream speaks HTTP/2 in the clear.
func h2cUpstream(t *testing.T, h http.HandlerFunc) *Upstream {
	up := upstream(t, h, func(s *http.Server) {
		s.Protocols = new(http.Protocols)
		s.Protocols.SetUnencryptedHTTP2(true)
	})
	up.Protocol = H2C
	return up
}

// TestStreamEndsEarly has an upstream end its answer while the client still
// streams, as a gRPC server does with a call that fails: the client hears all of
// it, trailers too, without saying another word.
func TestStreamEndsEarly(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter){
		"at once":         func(http.ResponseWriter) {},
		"after some data": func(w http.ResponseWriter) { io.WriteString(w, "some"); w.(http.Flusher).Flush() },
	} {
		t.Run(name, func(t *testing.T) {
			h := protocols[3].hop(t, h2cUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Trailer", "Grpc-Status")
				answer(w)
				r.Body.Read(make([]byte, 1))
				w.Header().Set("Grpc-Status", "10")
			}))
			for range 20 {
				pr, pw := io.Pipe()
				defer pw.Close()
				go pw.Write([]byte("x")) // and no more
				res, err := protocols[3].client(t, h).Post("https://example.org/", "application/grpc", pr)
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != 200 || res.Trailer.Get("Grpc-Status") != "10" {
					t.Fatalf("%d, trailers %v", res.StatusCode, res.Trailer)
				}
			}
			if q := h.request(t, 20); q.Err != nil {
				t.Errorf("reported: %v", q.Err)
			}
		})
	}
}

// TestGRPCPages checks that gRPC clients get a status instead of a page, and
// that of a deadline where that is over.
func TestGRPCPages(t *testing.T) {
	slow := &Upstream{Key: "slow", Name: "laptop"}
	slow.Dial = func(ctx context.Context) (net.Conn, error) {
		time.Sleep(50 * time.Millisecond)
		return nil, Fail(ReasonAbsent, io.EOF)
	}
	for _, c := range []struct {
		route   func(host, path string) (*Upstream, error)
		timeout string
		code    string
		message string
	}{
		{func(string, string) (*Upstream, error) { return slow, nil }, "", "14", "is not available right now: Your request for "},
		{func(string, string) (*Upstream, error) { return slow, nil }, "1H", "14", "(503 from home)"},
		{func(string, string) (*Upstream, error) { return slow, nil }, "20m", "4", "(503 from home)"},
		{func(string, string) (*Upstream, error) { return nil, ErrNoPath }, "", "12", "404"},
		{func(string, string) (*Upstream, error) { return nil, ErrRejected }, "", "7", "403"},
	} {
		each(t, func(t *testing.T, p protocol) {
			h := p.hop(t, nil, func(o *config) { o.Route = leading(c.route) })
			res, body := get(t, p.client(t, h), p.url("/"), func(r *http.Request) {
				r.Header.Set("Content-Type", "application/grpc+proto")
				if c.timeout != "" {
					r.Header.Set("Grpc-Timeout", c.timeout)
				}
			})
			if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/grpc+proto" || body != "" ||
				res.Header.Get("Grpc-Status") != c.code || !strings.Contains(res.Header.Get("Grpc-Message"), c.message) {
				t.Errorf("%d %v %q, want code %s", res.StatusCode, res.Header, body, c.code)
			}
		})
	}
	for v, want := range map[string]time.Duration{"": 0, "1": 0, "S": 0, "5S": 5 * time.Second, "99999999H": time.Duration(math.MaxInt64 / time.Hour * time.Hour), "123456789S": 0, "-1S": 0, "1x": 0, "250m": 250 * time.Millisecond} {
		if d, ok := grpcTimeout(v); d != want || ok != (want != 0) {
			t.Errorf("%q: %v, %t", v, d, ok)
		}
	}
	if got := grpcMessage("100 %, é\n"); got != "100 %25, %C3%A9%0A" {
		t.Errorf("%q", got)
	}
}
