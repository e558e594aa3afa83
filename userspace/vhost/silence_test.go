package vhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// patiently gives do longer stall timeouts while it fails: a busy machine may be the one that pauses.
func patiently(t *testing.T, do func(t *testing.T, p protocol, stall time.Duration) error) {
	each(t, func(t *testing.T, p protocol) {
		for stall := 100 * time.Millisecond; ; stall *= 3 {
			err := do(t, p, stall)
			if err == nil {
				return
			}
			if stall > 5*time.Second {
				t.Fatal(err)
			}
		}
	})
}

// TestListeningStream checks that a request stream whose client only listens goes on for longer than its body
// may be silent, once the answer has begun: gRPC, and what watches.
func TestListeningStream(t *testing.T) {
	patiently(t, func(t *testing.T, p protocol, stall time.Duration) error {
		next := make(chan bool)
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			rc.EnableFullDuplex()
			rc.Flush()
			for range next {
				io.WriteString(w, "event ")
				rc.Flush()
			}
			rest, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %v", rest, err)
		}), func(c *config) { c.StallTimeout = stall })
		pr, pw := io.Pipe()
		defer pw.Close()
		req, _ := http.NewRequest("POST", p.url("/"), pr)
		go io.WriteString(pw, "first ")
		res, err := p.client(t, h).Do(req)
		if err != nil {
			close(next)
			return err
		}
		defer res.Body.Close()
		for range 4 {
			time.Sleep(stall)
			next <- true
			if _, err := io.ReadFull(res.Body, make([]byte, len("event "))); err != nil {
				close(next)
				return err
			}
		}
		close(next)
		go func() {
			io.WriteString(pw, "last")
			pw.Close()
		}()
		if rest, err := io.ReadAll(res.Body); string(rest) != "first last <nil>" || err != nil {
			return fmt.Errorf("%q, %v", rest, err)
		}
		return nil
	})
}

// TestUpstreamPauses checks that an upload goes on for as long as the upstream likes to pause.
func TestUpstreamPauses(t *testing.T) {
	const size = 12 << 20 // more than all buffers on the way
	patiently(t, func(t *testing.T, p protocol, stall time.Duration) error {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			io.ReadFull(r.Body, make([]byte, 1000))
			time.Sleep(4 * stall)
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n+1000, err)
		}), func(c *config) { c.StallTimeout = stall })
		res, err := p.client(t, h).Post(p.url("/"), "text/plain", io.LimitReader(zeros{}, size))
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); string(body) != fmt.Sprint(size, nil) {
			return fmt.Errorf("%d %s, and reported %v", res.StatusCode, body, h.request(t, 1).Err)
		}
		return nil
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestSilentClient checks who is said to be silent.
func TestSilentClient(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
		}), func(c *config) { c.StallTimeout = 100 * time.Millisecond })
		pr, pw := io.Pipe()
		defer pw.Close()
		go io.WriteString(pw, "piece")
		req, _ := http.NewRequest("POST", p.url("/"), pr)
		if res, err := p.client(t, h).Do(req); err == nil {
			res.Body.Close()
		}
		if q := h.request(t, 1); q.Status != http.StatusRequestTimeout || q.Err == nil ||
			q.Err.Error() != "the client sent nothing more of the request's body within 100ms" {
			t.Errorf("reported %d, %v", q.Status, q.Err)
		}
	})
}

// TestExpectIgnored checks that an upstream that ignores Expect: 100-continue is waited for once, not each
// time.
func TestExpectIgnored(t *testing.T) {
	for _, overTLS := range []bool{false, true} {
		var heads []string
		h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			for {
				head := readHead(br)
				if _, err := io.ReadFull(br, make([]byte, 4)); err != nil {
					return
				}
				heads = append(heads, head)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
			}
		}))
		var waited []time.Duration
		for i, version := range []string{"1.0", "1.1", "1.1", "1.1"} {
			c, br := raw(t, h, overTLS)
			started := time.Now()
			fmt.Fprintf(c, "PUT / HTTP/%s\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
				version)
			if version == "1.1" {
				if line := readHead(br); line != "HTTP/1.1 100 Continue\r\n\r\n" {
					t.Fatalf("%d: %q", i, line)
				}
			}
			io.WriteString(c, "body")
			if answer := readHead(br); !strings.Contains(answer, " 200 OK\r\n") {
				t.Errorf("%d: %q", i, answer)
			}
			waited = append(waited, time.Since(started))
			c.Close()
		}
		if strings.Contains(heads[0], "Expect") || !strings.Contains(heads[1], "Expect") ||
			strings.Contains(heads[2], "Expect") || strings.Contains(heads[3], "Expect") {
			t.Errorf("the upstream got %q", heads)
		}
		if waited[1] < expectTimeout || min(waited[0], waited[2], waited[3]) > expectTimeout/2 {
			t.Errorf("waited %v", waited)
		}
	}
}

// TestExpectOther checks that what nobody knows how to expect is no upstream's to ignore. (net/http refuses
// it of HTTP/1.)
func TestExpectOther(t *testing.T) {
	h := newHop(t, upstream(t, echoHeader))
	req, _ := http.NewRequest("POST", "http://example.org/", strings.NewReader("body"))
	req.Header.Set("Expect", "miracles")
	res, err := protocols[1].client(t, h).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); res.StatusCode != 200 || strings.Contains(string(body), "Expect") {
		t.Errorf("%d, the upstream got %s", res.StatusCode, body)
	}
}

// TestExpectAnswered checks that an upstream that answers Expect goes on being asked, whatever it says.
func TestExpectAnswered(t *testing.T) {
	var heads []string
	h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		for {
			head := readHead(br)
			if head == "" {
				return
			}
			heads = append(heads, head)
			if len(heads)%2 == 1 {
				io.WriteString(c, "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
				io.ReadFull(br, make([]byte, 4)) // the connection is kept, so it is sent all the same
				continue
			}
			io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
			if _, err := io.ReadFull(br, make([]byte, 4)); errors.Is(err, io.ErrUnexpectedEOF) {
				return
			}
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	}))
	for i := range 6 {
		c, br := raw(t, h, false)
		io.WriteString(c, "PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		if line := readHead(br); strings.HasPrefix(line, "HTTP/1.1 100") {
			io.WriteString(c, "body")
		} else if i%2 == 1 || !strings.HasPrefix(line, "HTTP/1.1 417") {
			t.Errorf("%d: %q", i, line)
		}
		c.Close()
		h.request(t, i+1)
		if len(heads) != i+1 || !strings.Contains(heads[i], "Expect") {
			t.Errorf("%d: the upstream got %q", i, heads)
		}
	}
}

// tardyConn is a client whose last bytes come at the very moment at which somebody ends the read that waits
// for them. It sends nothing after that.
type tardyConn struct {
	net.Conn
	mu    sync.Mutex
	woken sync.Cond
	parts []string // the last of them is the late one
	past  bool     // the read deadline
}

func (c *tardyConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.parts) < 2 && !c.past {
		c.woken.Wait()
	}
	if len(c.parts) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p, c.parts[0])
	if c.parts[0] = c.parts[0][n:]; c.parts[0] == "" {
		c.parts = c.parts[1:]
	}
	return n, nil
}

func (c *tardyConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.past = !t.IsZero() && t.Before(time.Now())
	c.woken.Broadcast()
	return nil
}

// TestLateEnd ends a request's body when its answer has been given, and the transport still waits for it: the
// server neither waits for another end then, nor panics.
func TestLateEnd(t *testing.T) {
	for name, part := range map[string][2]string{
		"with a length": {"Content-Length: 4\r\n\r\nbo", "dy"},
		"chunked":       {"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n", "0\r\n\r\n"},
	} {
		h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
			io.Copy(io.Discard, br)
		}))
		client, server := net.Pipe()
		c := &tardyConn{Conn: server, parts: []string{"POST / HTTP/1.1\r\nHost: a\r\n" + part[0], part[1]}}
		c.woken.L = &c.mu
		go h.ServeConn(c, nil)
		client.SetDeadline(time.Now().Add(deadline))
		if answer, err := io.ReadAll(client); !strings.HasSuffix(string(answer), "\r\n\r\nhi") || err != nil {
			t.Errorf("%s: %q, %v", name, answer, err)
		}
		if said := h.log.String(); strings.Contains(said, "panic") {
			t.Errorf("%s: %s", name, said)
		}
	}
}
