package vhost

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

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
