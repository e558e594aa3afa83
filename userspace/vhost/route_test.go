package vhost

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"
)

// TestPick follows who is asked first while targets come and go.
func TestPick(t *testing.T) {
	var err error
	first := &Upstream{Key: "first", Dial: func(context.Context) (net.Conn, error) { return &net.TCPConn{}, err }}
	spare := &Upstream{Key: "spare", Dial: first.Dial}
	r := &Route{Upstreams: []Choice{{Upstream: spare}, {Upstream: first, Weight: 1}}}
	dial := func(up *Upstream, result error) {
		err = result
		if _, got := dialUpstream(context.WithValue(t.Context(), dialKey{}, up)); (got == nil) != (result == nil) {
			t.Fatal(got)
		}
	}
	expect := func(when string, want *Upstream, tried ...*Upstream) {
		t.Helper()
		for range 20 {
			if got := r.pick(netip.Addr{}, tried); got != want {
				t.Fatalf("%s: %v", when, got)
			}
		}
	}
	expect("at first", first)
	expect("after it was tried", spare, first)
	expect("after both were", nil, first, spare)
	dial(first, io.EOF)
	expect("while it can't be reached", spare)
	expect("when the spare one was tried", first, spare)
	dial(first, nil)
	expect("once it is back", first)
	dial(spare, io.EOF)
	expect("without a spare one", first)
	expect("which is asked all the same", spare, first)
}

// TestMaxBody refuses bodies that are too large: without a word to the upstream
// where their length says so, in the middle where it doesn't.
func TestMaxBody(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		var asked, whole atomic.Int64
		up := upstream(t, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if _, err := io.Copy(io.Discard, r.Body); err == nil {
				whole.Add(1)
			}
		})
		h := p.hop(t, nil, func(c *config) {
			c.Route = func(*http.Request, string, string) (*Route, error) {
				return &Route{MaxBody: 100 << 10, Upstreams: []Choice{{Upstream: up, Weight: 1}}}, nil
			}
		})
		for _, c := range []struct {
			size   int
			known  bool
			status int
			asked  int64 // at most
			whole  int64
		}{{100 << 10, true, 200, 1, 1}, {100 << 10, false, 200, 1, 1}, {100<<10 + 1, true, 413, 0, 0}, {100<<10 + 1, false, 413, 1, 0}} {
			asked.Store(0)
			whole.Store(0)
			var body io.Reader = bytes.NewReader(make([]byte, c.size))
			if !c.known {
				body = struct{ io.Reader }{body}
			}
			res, err := p.client(t, h).Post(p.url("/"), "text/plain", body)
			if err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
			res.Body.Close()
			if res.StatusCode != c.status || asked.Load() > c.asked || whole.Load() != c.whole {
				t.Errorf("%+v: %d, asked %d times, %d whole", c, res.StatusCode, asked.Load(), whole.Load())
			}
		}
	})
}
