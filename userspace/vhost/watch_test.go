package vhost

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestWatch has the other end of a connection in the pool fall asleep: what may
// be repeated gets another connection, soon; all else is waited for longer, and
// sent once. One that has acknowledged what it got may think as long as it likes.
func TestWatch(t *testing.T) {
	var asleep atomic.Bool
	var conns, posts atomic.Int64
	up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		conns.Add(1)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			io.Copy(io.Discard, r.Body)
			if r.Method == "POST" {
				posts.Add(1)
			}
			if asleep.Swap(false) {
				io.Copy(io.Discard, br) // until it is given up
				return
			}
			if r.URL.Path == "/slow" {
				time.Sleep(time.Second)
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	var silent atomic.Bool
	up.Watch = &Watch{Soon: 100 * time.Millisecond, Late: 400 * time.Millisecond, Unheard: func(c net.Conn, d time.Duration) bool {
		if _, ok := c.(*net.TCPConn); !ok || d < 100*time.Millisecond {
			t.Errorf("asked about %T, %v", c, d)
		}
		return silent.Load()
	}}
	h := newHop(t, up)
	c := protocols[0].client(t, h)
	do := func(method, path, body string) int {
		t.Helper()
		req, _ := http.NewRequest(method, "http://a"+path, strings.NewReader(body))
		if body == "" {
			req.Body = nil
		}
		res, err := c.Do(req)
		if err != nil {
			t.Error(err)
			return 0
		}
		res.Body.Close()
		return res.StatusCode
	}
	all := func(n int) { // that many connections
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() { do("GET", "/slow", "") })
		}
		wg.Wait()
	}
	for _, step := range []struct {
		method, path, body string
		asleep, silent     bool
		status             int
		conns, posts       int64
	}{
		{"GET", "/", "", false, false, 200, 1, 0},
		{"GET", "/slow", "", false, false, 200, 1, 0},
		{"GET", "/", "", true, true, 200, 2, 0},
		{"POST", "/", "pay", true, true, 504, 2, 1},
		{"GET", "/slow", "", false, true, 200, 3, 1}, // on a fresh connection nothing is watched
		{"POST", "/", "pay", false, false, 200, 3, 2},
	} {
		asleep.Store(step.asleep)
		silent.Store(step.silent)
		began := time.Now()
		if status := do(step.method, step.path, step.body); status != step.status || conns.Load() != step.conns || posts.Load() != step.posts {
			t.Errorf("%+v: %d, %d connections, %d posts", step, status, conns.Load(), posts.Load())
		}
		if d := time.Since(began); step.status == 504 && d < up.Watch.Late {
			t.Errorf("given up after %v", d)
		}
	}
	all(3)
	before := conns.Load()
	asleep.Store(true)
	silent.Store(true)
	if do("GET", "/", ""); conns.Load() != before+1 {
		t.Errorf("%d connections more: want a new one at once, whatever is in the pool", conns.Load()-before)
	}
	if q := h.request(t, 4); q.Err == nil || !strings.Contains(q.Err.Error(), "acknowledges nothing") {
		t.Errorf("reported: %v", q.Err)
	}
}

// TestAsleepThenDialled: a GET whose connection in the pool acknowledges nothing, and whose next connection takes too
// long, goes to another upstream, and waits where that one can't be reached either.
func TestAsleepThenDialled(t *testing.T) {
	up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		readHead(br)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		io.Copy(io.Discard, br)
	})
	up.Watch = &Watch{Soon: 50 * time.Millisecond, Late: time.Minute, Unheard: func(net.Conn, time.Duration) bool { return true }}
	var isAsleep atomic.Bool
	dial := up.Dial
	up.Dial = func(ctx context.Context) (net.Conn, error) {
		if isAsleep.Load() {
			return nil, Fail(ReasonTimeout, context.DeadlineExceeded)
		}
		return dial(ctx)
	}
	var waits atomic.Int64
	h := newHop(t, nil, func(c *config) {
		c.Route = func(*http.Request, string, string) (*Route, error) {
			return &Route{Name: "two", Upstreams: []Choice{{Upstream: up, Weight: 1}, {Upstream: wayTo(closedPort(t)), Backup: true}},
				Wait: func(context.Context, time.Time, []error) bool {
					waits.Add(1)
					isAsleep.Store(false)
					return true
				}}, nil
		}
	})
	c := protocols[0].client(t, h)
	get(t, c, "http://a/")
	isAsleep.Store(true)
	if res, _ := get(t, c, "http://a/"); res.StatusCode != 200 || waits.Load() != 1 {
		t.Errorf("status %d after %d waits, want 200 after one", res.StatusCode, waits.Load())
	}
}
