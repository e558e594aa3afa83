package vhost

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// lateConn is a connection whose end is not seen before something is written,
// as happens to every pool now and then.
type lateConn struct {
	*net.TCPConn
	reads   atomic.Int64
	written chan struct{}
	once    sync.Once
	reset   chan struct{} // closed when the other end is gone
}

func (c *lateConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.reset) })
		<-c.written
	}
	return n, err
}

func (c *lateConn) Write(p []byte) (int, error) {
	select {
	case <-c.reset:
		defer func() {
			if c.reads.Add(1) == 1 {
				close(c.written)
			}
		}()
	default:
	}
	return c.TCPConn.Write(p)
}

// TestStalePost checks that a POST which meets a dead connection in the pool,
// so that nothing of it is sent, is sent once on a fresh one.
func TestStalePost(t *testing.T) {
	var posts, conns atomic.Int64
	served := make(chan struct{})
	up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		first := conns.Add(1) == 1
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			body, _ := io.ReadAll(r.Body)
			if r.Method == "POST" && string(body) == "pay" {
				posts.Add(1)
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if first {
				<-served
				c.SetLinger(0) // a reset, so that writing fails for sure once it is seen
				return
			}
		}
	})
	dial, gone := up.Dial, make(chan struct{})
	var dialled atomic.Int64
	up.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err != nil || dialled.Add(1) > 1 {
			return c, err
		}
		return &lateConn{TCPConn: c.(*net.TCPConn), written: make(chan struct{}), reset: gone}, nil
	}
	h := newHop(t, up)
	c := protocols[0].client(t, h)
	get(t, c, "http://a/")
	close(served)
	<-gone
	res, err := c.Post("http://a/", "text/plain", strings.NewReader("pay"))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 || posts.Load() != 1 || conns.Load() != 2 {
		t.Errorf("%d, taken %d times, %d connections", res.StatusCode, posts.Load(), conns.Load())
	}
}

// TestClosedWhileConnecting: of a request whose client's connection is closed here while its upstream
// connects, nothing is sent, to no upstream, though all of it has come.
func TestClosedWhileConnecting(t *testing.T) {
	got := make(chan error, 1)
	up := rawUpstream(t, func(_ *net.TCPConn, br *bufio.Reader) {
		_, err := br.ReadByte()
		got <- err
	})
	dial, dialled, goOn := up.Dial, make(chan struct{}), make(chan struct{})
	up.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		close(dialled)
		<-goOn
		return c, err
	}
	spare := wayTo(closedPort(t))
	spare.Dial = func(context.Context) (net.Conn, error) {
		t.Error("the spare upstream is dialled")
		return nil, io.EOF
	}
	h := newHop(t, nil, func(c *config) {
		c.Route = func(*http.Request, string, string) (*Route, error) {
			return &Route{Name: "two", Upstreams: []Choice{{Upstream: up, Weight: 1}, {Upstream: spare, Backup: true}}}, nil
		}
	})
	c, _ := raw(t, h, false)
	io.WriteString(c, "PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\npay")
	<-dialled
	h.Server.mu.Lock()
	for cn := range h.conns {
		tcpsock.ResetConn(cn.Conn.(infoConn).TCPConn)
	}
	h.Server.mu.Unlock()
	close(goOn)
	if err := <-got; err != io.EOF {
		t.Errorf("the upstream reads %v, want the end", err)
	}
	if q := h.request(t, 1); q.Status != statusClientLeft || !errors.Is(q.Err, errClientLeft) {
		t.Errorf("reported %d, %v", q.Status, q.Err)
	}
}

// TestWaitForNone: a request waits only where none of the upstreams could be reached, and is told why of each. One
// that was reached and took no request would be found at once.
func TestWaitForNone(t *testing.T) {
	var asked atomic.Int64
	closes := rawUpstream(t, func(_ *net.TCPConn, br *bufio.Reader) {
		asked.Add(1)
		readHead(br)
	})
	noTLS := *rawUpstream(t, func(c *net.TCPConn, _ *bufio.Reader) {
		asked.Add(1)
		io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
	})
	noTLS.Key, noTLS.Protocol, noTLS.TLS = "no TLS", HTTPS, &tls.Config{ServerName: "a"}
	for name, tc := range map[string]struct {
		first       *Upstream
		asks, waits int64
	}{
		"it refuses":       {wayTo(closedPort(t)), 0, 3},
		"it closes":        {closes, 1, 0},
		"it has no TLS":    {&noTLS, 1, 0},
		"it refuses later": {nil, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			asked.Store(0)
			var waits, dials atomic.Int64
			up := tc.first
			if up == nil {
				up = &Upstream{Key: "late", Name: "laptop"}
				up.Dial = func(ctx context.Context) (net.Conn, error) {
					if dials.Add(1) == 1 {
						return nil, syscall.ECONNREFUSED
					}
					return closes.Dial(ctx)
				}
			}
			h := newHop(t, nil, func(c *config) {
				c.Route = func(*http.Request, string, string) (*Route, error) {
					return &Route{Name: "two", Upstreams: []Choice{{Upstream: up, Weight: 1}, {Upstream: wayTo(closedPort(t)), Backup: true}},
						Wait: func(_ context.Context, _ time.Time, errs []error) bool {
							if len(errs) != 2 {
								t.Errorf("errors: %v, want those of both", errs)
							}
							return waits.Add(1) < 3
						}}, nil
				}
			})
			if res, _ := get(t, protocols[0].client(t, h), "http://a/"); res.StatusCode != 502 {
				t.Errorf("status %d", res.StatusCode)
			}
			if asked.Load() != tc.asks || waits.Load() != tc.waits {
				t.Errorf("it was asked %d times, and waited for %d times: want %d and %d", asked.Load(), waits.Load(), tc.asks, tc.waits)
			}
		})
	}
}
