package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// TestHold holds requests for a target that comes while they wait, for one that
// does not, and for a client that leaves.
func TestHold(t *testing.T) {
	addr, target := freeAddr(t), freeAddr(t)
	holding := func(hold time.Duration) *config.Config {
		return parse(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, default: { forward: %q, hold: %s } }]`, addr, target, hold))
	}
	d := startConfig(t, holding(time.Minute))

	type answer struct {
		body   string
		status int
	}
	answers := make(chan answer, 1)
	go func() {
		res, err := http.Post("http://"+addr, "text/plain", strings.NewReader(strings.Repeat("x", 1<<20)))
		if err != nil {
			answers <- answer{err.Error(), 0}
			return
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		answers <- answer{string(b), res.StatusCode}
	}()
	eventually(t, "the request waits", func() bool { return d.heldBy.Total() == 1 })
	ln, err := net.Listen("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	})}
	go srv.Serve(ln)
	if a := <-answers; a.status != 200 || a.body != fmt.Sprint(1<<20, nil) {
		t.Errorf("the request that waited: %+v", a)
	}
	srv.Close()

	// Clients leave: one whose body nobody has read, and one without.
	for _, head := range []string{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"} {
		c := dialTCP(t, addr)
		io.WriteString(c, head)
		eventually(t, "the request waits", func() bool { return d.heldBy.Total() == 1 })
		c.Close()
		eventually(t, "it no longer does", func() bool { return d.heldBy.Total() == 0 })
	}
	eventually(t, "both are said to have left", func() bool { return strings.Count(d.log.String(), "status=499") == 2 })

	// There is no place left to wait in.
	var taken []*limit.Lease
	for range heldMost {
		place, err := d.heldBy.Acquire(netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, place)
	}
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 502 {
		t.Errorf("without a place to wait: %d", res.StatusCode)
	}
	for _, place := range taken {
		place.Release()
	}
	if err := d.Reload(holding(time.Second)); err != nil {
		t.Fatal(err)
	}
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 502 {
		t.Errorf("after the wait: %d", res.StatusCode)
	}
}

func TestMayComeBack(t *testing.T) {
	for reason, want := range map[dial.Reason]bool{dial.NodeOffline: true, dial.Timeout: true, dial.Refused: true, dial.ContainerStopped: true, dial.OffByHand: false, dial.UnknownNode: false, dial.NoTailscaled: false, dial.Canceled: false} {
		if got := mayComeBack(fmt.Errorf("x: %w", &dial.Error{Reason: reason})); got != want {
			t.Errorf("%s: %v", reason, got)
		}
	}
	if mayComeBack(errors.New("x")) {
		t.Error("an error of another kind")
	}
}

// comeBack listens at an address at which nothing listened until now, and echoes. It counts connections.
func comeBack(t *testing.T, addr string) *atomic.Int64 {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	n := new(atomic.Int64)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			go echo(c)
		}
	}()
	return n
}

// TestHoldConnections holds connections until their target comes, on both paths and with several targets. All that
// was sent by then comes whole. The target sees no connection but theirs. A reload in between takes nothing away.
func TestHoldConnections(t *testing.T) {
	const clients = 12
	for _, mode := range []string{"sni", "tcp"} {
		for _, kind := range []string{"an address", "a name", "several"} {
			t.Run(mode+" "+kind, func(t *testing.T) {
				t.Parallel()
				addr, target := freeAddr(t), freeAddr(t)
				forward := fmt.Sprintf("%q", target)
				switch kind {
				case "a name":
					forward = fmt.Sprintf("%q", byName(target))
				case "several":
					forward = fmt.Sprintf("[%q, { to: %q, backup: true }]", freeAddr(t), target)
				}
				config := func(forward string) *config.Config {
					return parse(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: %s, default: { forward: %s, hold: 10m } }]`, addr, mode, forward))
				}
				d := startConfig(t, config(forward))
				sent := append(helloFor(t, "a.test"), bytes.Repeat([]byte("held"), 16<<10)...)
				var all []net.Conn
				for range clients {
					c := dialTCP(t, addr)
					if _, err := c.Write(sent); err != nil {
						t.Fatal(err)
					}
					all = append(all, c)
				}
				eventually(t, "all wait", func() bool { return d.heldBy.Total() == clients })
				if s := d.Status(); s.Held != clients {
					t.Errorf("status: %d wait", s.Held)
				}
				if err := d.Reload(config(fmt.Sprintf("%q", freeAddr(t)))); err != nil {
					t.Fatal(err)
				}
				n := comeBack(t, target)
				for i, c := range all {
					got := make([]byte, len(sent))
					if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
						t.Errorf("connection %d: what comes back differs: %v", i, err)
					}
				}
				if n.Load() != clients {
					t.Errorf("the target has got %d connections", n.Load())
				}
				eventually(t, "nobody waits any more", func() bool { return d.heldBy.Total() == 0 })
			})
		}
	}
}

// TestHoldConnectionLeft: a client that goes away waits no more. On a tcp listener one that has ended its stream has not
// gone.
func TestHoldConnectionLeft(t *testing.T) {
	for _, mode := range []string{"sni", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			addr, target := freeAddr(t), freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: %s, default: { forward: %q, hold: 10m } }]`, addr, mode, target))
			hello := helloFor(t, "a.test")
			hold := func() *net.TCPConn {
				t.Helper()
				c := dialTCP(t, addr)
				if _, err := c.Write(hello); err != nil {
					t.Fatal(err)
				}
				eventually(t, "it waits", func() bool { return d.heldBy.Total() == 1 })
				return c
			}
			gone := func() { eventually(t, "it waits no more", func() bool { return d.heldBy.Total() == 0 }) }
			c := hold()
			c.SetLinger(0)
			c.Close()
			gone()
			c = hold()
			c.CloseWrite()
			if mode == "sni" {
				gone()
				eventually(t, "the log says so", func() bool { return strings.Contains(d.log.String(), errLeft.Error()) })
			}
			n := comeBack(t, target)
			if mode == "sni" {
				if n.Load() != 0 {
					t.Error("the target hears of who has left")
				}
				return
			}
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, hello) {
				t.Errorf("%d bytes come back to who has ended the stream: %v", len(got), err)
			}
		})
	}
}

// TestHoldBounds: who finds no place to wait, and who has waited, is turned away as without hold.
func TestHoldBounds(t *testing.T) {
	addr, target := freeAddr(t), freeAddr(t)
	configured := func(hold string) *config.Config {
		return parse(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: sni, default: { forward: %q, hold: %s } }]`, addr, target, hold))
	}
	d := startConfig(t, configured("10m"))
	hello := helloFor(t, "a.test")
	for range heldPerSource {
		if _, err := dialTCP(t, addr).Write(hello); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "as many wait as may", func() bool { return d.heldBy.Total() == heldPerSource })
	isRefused := func(what string) {
		t.Helper()
		c := dialTCP(t, addr)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || len(got) != 7 || got[6] != byte(sni.AlertInternalError) {
			t.Errorf("%s: %x, %v", what, got, err)
		}
	}
	isRefused("one more of the source")
	if !strings.Contains(d.log.String(), "too many of one source wait") {
		t.Error("the log does not say so")
	}
	if err := d.Reload(configured("1s")); err != nil {
		t.Fatal(err)
	}
	d.heldBy.SetLimits(heldMost, 2*heldPerSource)
	isRefused("after the wait")
	d.heldBy.SetLimits(heldPerSource, 2*heldPerSource)
	isRefused("one more of all")
	if d.heldBy.Total() != heldPerSource {
		t.Errorf("%d wait", d.heldBy.Total())
	}
}

// TestHoldDrain: who waits is a connection like any other: a drain waits for it, and its end ends it.
func TestHoldDrain(t *testing.T) {
	addr, target := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: tcp, default: { forward: %q, hold: 10m } }]`, addr, target))
	c, late := dialTCP(t, addr), dialTCP(t, addr)
	for _, c := range []net.Conn{c, late} {
		io.WriteString(c, "hello")
	}
	eventually(t, "they wait", func() bool { return d.heldBy.Total() == 2 })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Drain(ctx) }()
	comeBack(t, target)
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Errorf("during a drain: %v", err)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the drain cuts nothing")
	}
	if n := d.heldBy.Total(); n != 0 {
		t.Errorf("%d wait after the end", n)
	}
}

// TestHoldSeveral: a request waits only while none of several targets answers, and then goes to the one that does.
func TestHoldSeveral(t *testing.T) {
	addr, first, second := freeAddr(t), freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, default: { forward: [%q, { to: %q, backup: true }], hold: 10m } }]`, addr, first, second))
	body := strings.Repeat("x", 3<<20)
	post := func() (string, error) {
		res, err := http.Post("http://"+addr, "text/plain", strings.NewReader(body))
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	type answer struct {
		body string
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		b, err := post()
		answers <- answer{b, err}
	}()
	eventually(t, "the request waits", func() bool { return d.heldBy.Total() == 1 })
	ln, err := net.Listen("tcp", second)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })}
	defer srv.Close()
	go srv.Serve(ln)
	if a := <-answers; a.err != nil || a.body != body {
		t.Errorf("the request that waited: %d bytes, %v", len(a.body), a.err)
	}
	// One target is away: nobody waits for it.
	for range 3 {
		if b, err := post(); err != nil || b != body {
			t.Errorf("beside a target that is away: %d bytes, %v", len(b), err)
		}
	}
	if got := strings.Count(d.log.String(), "a request waits"); got != 1 {
		t.Errorf("%d requests have waited", got)
	}
}

// TestHoldDisabled: a request waits for a target that is away also beside one that was disabled by hand, and not for
// that one alone.
func TestHoldDisabled(t *testing.T) {
	addr, first, second := freeAddr(t), freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, default: { forward: [%q, { to: %q, backup: true }], hold: 10m } }]`, addr, first, second))
	disable := func(target string, off bool) {
		t.Helper()
		if _, err := d.SetDisabled(url.Values{"target": {target}}, off); err != nil {
			t.Fatal(err)
		}
	}
	disable(first, true)
	disable(second, true)
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 503 {
		t.Errorf("both are disabled: %d", res.StatusCode)
	}
	disable(first, false)
	status := make(chan int, 1)
	go func() {
		res, err := http.Get("http://" + addr)
		if err != nil {
			status <- 0
			return
		}
		res.Body.Close()
		status <- res.StatusCode
	}()
	eventually(t, "the request waits", func() bool { return d.heldBy.Total() == 1 })
	ln, err := net.Listen("tcp", first)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	defer srv.Close()
	go srv.Serve(ln)
	if got := <-status; got != 200 {
		t.Errorf("the request that waited: %d", got)
	}
}

// TestRooms: of those who wait for a target one tries, the next one when its time is up, and all of them once that has
// succeeded; at once when something has changed.
func TestRooms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rs := newRooms()
		refused := &dial.Error{Reason: dial.Refused}
		var isUp atomic.Bool
		var tries, together, most atomic.Int64
		try := func(ctx context.Context) error {
			tries.Add(1)
			if n := together.Add(1); n > most.Load() && !isUp.Load() {
				most.Store(n)
			}
			defer together.Add(-1)
			time.Sleep(10 * time.Millisecond)
			if isUp.Load() {
				return nil
			}
			return refused
		}
		const clients = 50
		done := make(chan error, clients)
		for i := range clients {
			go func() {
				ctx := t.Context()
				if i%2 == 0 { // whoever tries may be one of them
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, time.Duration(i)*100*time.Millisecond)
					defer cancel()
				}
				done <- rs.wait(ctx, "a", refused, try)
			}()
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if len(done) != clients/2 || most.Load() != 1 {
			t.Errorf("%d have waited long enough, %d tried beside each other", len(done), most.Load())
		}
		for len(done) > 0 {
			if err := <-done; err != refused {
				t.Errorf("who has waited in vain: %v", err)
			}
		}
		if n := tries.Load(); n < 10*int64(time.Second/(holdPause+10*time.Millisecond))-5 || n > 10*int64(time.Second/holdPauseMin) {
			t.Errorf("%d tries in 10 s", n)
		}
		before := tries.Load()
		for range 20 {
			rs.move()
			time.Sleep(15 * time.Millisecond)
		}
		if n := tries.Load() - before; n != 20 {
			t.Errorf("%d tries for 20 changes", n)
		}
		isUp.Store(true)
		back := time.Now()
		for range clients / 2 {
			if err := <-done; err != nil {
				t.Errorf("once the target is back: %v", err)
			}
		}
		if took := time.Since(back); took > holdPause+20*time.Millisecond { // a pause, a try, and one of all others
			t.Errorf("once the target is back it takes %v", took)
		}
		synctest.Wait()
		rs.mu.Lock()
		if len(rs.all) != 0 {
			t.Errorf("%d rooms are left", len(rs.all))
		}
		rs.mu.Unlock()
		// What can't pass by waiting ends the wait.
		isUp.Store(false)
		unknown := &dial.Error{Reason: dial.UnknownNode}
		if err := rs.wait(t.Context(), "b", refused, func(context.Context) error { return unknown }); err != unknown {
			t.Errorf("what can't pass: %v", err)
		}
	})
}
