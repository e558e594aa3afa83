package vhost

import (
	"bufio"
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
