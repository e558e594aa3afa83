package server

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/plan"
)

// quickChecks find a target down, and up again, in a few tenths of a second.
const quickChecks = "every: 100ms, timeout: 5s, rise: 2, fall: 2"

// targetHealth is what is known of a target of the only route.
func (d *daemon) targetHealth(i int) TargetHealth {
	return *d.Status().Listeners[0].Routes[0].Targets[i].Health
}

// A mortal target listens at one address for as long as it lives, and counts its connections that have said
// something: checks do not.
type mortal struct {
	t    *testing.T
	addr string
	n    atomic.Int64

	dying, died atomic.Int64 // how often it has begun to die, and is dead

	mu sync.Mutex
	ln net.Listener
}

func newMortal(t *testing.T) *mortal {
	m := &mortal{t: t, addr: freeAddr(t)}
	t.Cleanup(m.die)
	m.live()
	return m
}

func (m *mortal) live() {
	m.mu.Lock()
	defer m.mu.Unlock()
	ln, err := net.Listen("tcp", m.addr)
	if err != nil {
		m.t.Error(err)
		return
	}
	m.ln = ln
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				all, err := io.ReadAll(c)
				if err == nil && len(all) > 0 {
					m.n.Add(1)
					c.Write(append([]byte("A"), all...))
				}
			}()
		}
	}()
}

// die ends the listener. What was accepted goes on, and what still waits for that is reset by the kernel.
func (m *mortal) die() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dying.Add(1)
	m.ln.Close()
	m.died.Add(1)
}

// TestHealthUnderLoad: while a target dies and comes back, no connection fails but what it had itself. Once
// it is found down nothing goes there, and once it is up again some does.
func TestHealthUnderLoad(t *testing.T) {
	hello := helloFor(t, "a.test")
	for _, mode := range []string{"sni", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := newMortal(t)
			var n atomic.Int64
			b, addr := backend(t, named("B", &n)), freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: [ %q, { to: %q, backup: true } ], health: { %s, slow_start: 0s } } } ]
limits: { connections_per_source: 500 }`, addr, mode, a.addr, b, quickChecks))
			stop := make(chan struct{})
			var group sync.WaitGroup
			for range 8 {
				group.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						died := a.died.Load()
						got, err := exchange(addr, hello)
						if err != nil && a.dying.Load() > died { // it had the connection when it died
							continue
						}
						if err != nil || len(got) != len(hello)+1 || !bytes.HasSuffix(got, hello) {
							t.Errorf("%d bytes come back, want %d: %v", len(got), len(hello)+1, err)
							return
						}
					}
				})
			}
			for range 2 {
				before := a.n.Load()
				eventually(t, "it gets connections", func() bool { return a.n.Load() > before })
				a.die()
				eventually(t, "it is down", func() bool { return !d.targetHealth(0).Up })
				before = n.Load()
				eventually(t, "the spare one gets connections", func() bool { return n.Load() > before })
				a.live()
				eventually(t, "it is up again", func() bool { return d.targetHealth(0).Up })
			}
			close(stop)
			group.Wait()
			log := d.log.String()
			if strings.Count(log, "a target is down") != 2 || strings.Count(log, "a target is up again") != 2 || !strings.Contains(log, "nothing listens there") {
				t.Error("the log does not have each change once, and why")
			}
		})
	}
}

// TestFlapsUnderLoad: while a target dies and comes back 100 times connections do not follow each time, and none of them
// fails but what it had itself.
func TestFlapsUnderLoad(t *testing.T) {
	t.Parallel() // it waits for checks
	a := newMortal(t)
	var n atomic.Int64
	b, addr := backend(t, named("B", &n)), freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: [ %q, { to: %q, backup: true } ], health: { every: 100ms, timeout: 5s, rise: 1, fall: 1, slow_start: 0s } } } ]`,
		addr, a.addr, b))
	stop, ended := make(chan struct{}), make(chan struct{})
	moves := 0 // from one target to the other
	go func() {
		defer close(ended)
		last := "A"
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			died := a.died.Load()
			got, err := exchange(addr, []byte("x"))
			if err != nil && a.dying.Load() > died { // it had the connection when it died
				continue
			}
			if err != nil || len(got) != 2 {
				t.Errorf("%q comes back: %v", got, err)
				return
			}
			if by := string(got[:1]); by != last {
				last, moves = by, moves+1
			}
		}
	}()
	downs := func() int { return strings.Count(d.log.String(), "a target is down") }
	eventually(t, "it gets connections", func() bool { return a.n.Load() > 0 })
	for range 100 {
		// So long that a check sees each, where it is not kept down.
		a.die()
		time.Sleep(120 * time.Millisecond)
		a.live()
		time.Sleep(120 * time.Millisecond)
	}
	close(stop)
	<-ended
	// It is kept down for 0.2 s the second time, then for 0.4 s and so on: 8 times make 25 s, which is all.
	t.Logf("it was down %d times, and connections moved %d times", downs(), moves)
	if n := downs(); n < 3 || n > 10 || moves > 2*n+2 {
		t.Errorf("it was down %d times, and connections moved %d times", n, moves)
	}
}

// A peeked connection has its first bytes again.
type peeked struct {
	net.Conn
	io.Reader
}

func (p peeked) Read(b []byte) (int, error) { return p.Reader.Read(b) }

// whatever makes a target that passes every kind of check, and else is as named.
func whatever(t *testing.T, name string) string {
	var n atomic.Int64
	cert, _ := certificate(t, "a.test")
	return backend(t, func(c net.Conn) {
		first := make([]byte, 1)
		if n, _ := c.Read(first); n == 0 {
			c.Close()
			return
		}
		p := peeked{c, io.MultiReader(bytes.NewReader(first), c)}
		switch first[0] {
		case 0x16:
			defer c.Close()
			tls.Server(p, &tls.Config{Certificates: []tls.Certificate{cert}}).Handshake()
		case 'G':
			defer c.Close()
			http.ReadRequest(bufio.NewReader(p))
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		default:
			named(name, &n)(p)
		}
	})
}

// TestHealthAvoids: a target that checks have found down gets nothing while another one is up, however it is
// dead, on both paths. What is known of it outlives a reload.
func TestHealthAvoids(t *testing.T) {
	for _, dead := range []struct {
		name, check string
		target      func(t *testing.T) string
		why         string
	}{
		{"refuses", "connect", func(t *testing.T) string { return freeAddr(t) }, "nothing listens there"},
		{"refuses, and is looked up", "connect", func(t *testing.T) string { return byName(freeAddr(t)) }, "nothing listens there"},
		{"is silent", "connect, timeout: 300ms", full, "no answer"},
		{"is no socket", "connect", func(*testing.T) string { return "unix:///nowhere/at.all" }, "no such socket"},
		{"never answers", "tls, timeout: 300ms", nil, "TLS handshake: no answer within 300ms"},
		{"is no web server", "http, timeout: 300ms", nil, "GET /: no answer within 300ms"},
	} {
		t.Run(dead.name, func(t *testing.T) {
			t.Parallel()
			var tries atomic.Int64
			bad, good, addr := "", whatever(t, "B"), freeAddr(t)
			if dead.target != nil {
				bad = dead.target(t)
			} else { // it accepts, and never answers
				bad = backend(t, func(c net.Conn) {
					defer c.Close()
					first := make([]byte, 1)
					if n, _ := c.Read(first); n == 1 && first[0] == 'x' {
						tries.Add(1)
					}
					io.Copy(io.Discard, c)
				})
			}
			yaml := func(targets string) string {
				return fmt.Sprintf("listeners: [ { listen: [%q], mode: tcp, default: { forward: [ %s ], health: { check: %s, every: 100ms, fall: 2 } } } ]", addr, targets, dead.check)
			}
			d := start(t, yaml(fmt.Sprintf("{ to: %q, weight: 1000 }", bad)))
			eventually(t, "it is down", func() bool { return !d.targetHealth(0).Up })
			if h := d.targetHealth(0); !strings.Contains(h.Error, dead.why) || h.Since.IsZero() {
				t.Errorf("%+v, want %q", h, dead.why)
			}
			if err := d.Reload(parse(t, yaml(fmt.Sprintf("{ to: %q, weight: 1000 }, { to: %q, backup: true }", bad, good)))); err != nil {
				t.Fatal(err)
			}
			if d.targetHealth(0).Up {
				t.Error("a reload forgets it")
			}
			before := d.Status().DialErrors
			for range 20 {
				if got, err := exchange(addr, []byte("x")); err != nil || string(got) != "Bx" {
					t.Errorf("%q, %v", got, err)
				}
			}
			if after := d.Status().DialErrors; tries.Load() != 0 || !maps.Equal(before, after) {
				t.Errorf("it is tried %d times, and dials fail: %v", tries.Load(), after)
			}
		})
	}
}

// TestAllDown: targets that are all down are tried all the same, and the spare one last.
func TestAllDown(t *testing.T) {
	var n atomic.Int64
	a, b, addr := backend(t, named("A", &n)), backend(t, named("B", &n)), freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: [ { to: %q, backup: true }, %q ], health: { check: tls, every: 100ms, timeout: 300ms, fall: 1 } } } ]`, addr, b, a))
	eventually(t, "both are down", func() bool { return !d.targetHealth(0).Up && !d.targetHealth(1).Up })
	for range 20 {
		if got, err := exchange(addr, []byte("x")); err != nil || string(got) != "Ax" {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// TestOnDown: with on_down: reset the flows of a target end when its checks find it down, and no others. A
// target that has only one connection to lose is checked as well.
func TestOnDown(t *testing.T) {
	var isSick atomic.Bool
	web := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if isSick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	reset, keep := freeAddr(t), freeAddr(t)
	const health = "health: { check: http, " + quickChecks + " }"
	d := start(t, fmt.Sprintf(`listeners:
  - { name: reset, listen: [%q], mode: tcp, default: { forward: %q, on_down: reset, %s } }
  - { name: keep, listen: [%q], mode: tcp, default: { forward: %q, %s } }`, reset, web, health, keep, web, health))
	if n := len(d.health.Running()); n != 1 {
		t.Errorf("two routes that agree have %d checks", n)
	}
	ends, lives := dialTCP(t, reset), dialTCP(t, keep)
	eventually(t, "both live, and the target works", func() bool { return d.flows.Len() == 2 && !d.targetHealth(0).Since.IsZero() })
	isSick.Store(true)
	if n, err := ends.Read(make([]byte, 1)); err == nil || err == io.EOF || n != 0 {
		t.Errorf("the flow that is to end: %d, %v", n, err)
	}
	eventually(t, "one is left", func() bool { return d.flows.Len() == 1 })
	eventually(t, "the log says why", func() bool {
		return strings.Contains(d.log.String(), "on_down: reset: the target is down: GET /: the answer is 503")
	})
	if got := d.scrape(`tailsplice_flows_cut_total{reason="target_down"}`); got != "1" {
		t.Errorf("%q are counted", got)
	}
	fmt.Fprint(lives, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	if got, err := io.ReadAll(lives); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 503") {
		t.Errorf("the flow that is kept: %q, %v", got, err)
	}
	if got := d.scrape(fmt.Sprintf(`tailsplice_target_up{target=%q}`, web)); got != "0" {
		t.Errorf("it is up: %q", got)
	}
	for _, result := range []string{"ok", "failed"} {
		if got := d.scrape(fmt.Sprintf(`tailsplice_health_checks_total{result=%q,target=%q}`, result, web)); got == "0" || got == "" {
			t.Errorf("%q checks are %s", got, result)
		}
	}
	tr, err := d.Trace(t.Context(), plan.Question{Host: "a"})
	if err != nil || tr.Listeners[0].Targets[0].Health != "down" {
		t.Errorf("the trace: %+v, %v", tr, err)
	}
	if _, err := d.SetDisabled(url.Values{"target": {web}}, true); err != nil {
		t.Fatal(err)
	}
	isSick.Store(false)
	eventually(t, "it is up again, though it is disabled", func() bool { return d.targetHealth(0).Up })
}

// TestHealthHTTP: requests go to no target that is down, in any protocol.
func TestHealthHTTP(t *testing.T) {
	var isSick atomic.Bool
	var n atomic.Int64
	a := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" {
			if isSick.Load() || r.Host != "a.test" {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return
		}
		n.Add(1)
		io.WriteString(w, "A")
	})
	b := httpBackend(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "B") })
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, routes: [ { host: a.test, forward: [ %q, { to: %q, backup: true } ], health: { check: http, path: /healthz, %s } } ] } ]`,
		addr, a, b, quickChecks))
	get := func() string {
		_, body := ask(t, addr, "GET", "a.test", "/", nil)
		return body
	}
	eventually(t, "it was checked", func() bool { return !d.targetHealth(0).Since.IsZero() })
	for range 10 {
		if got := get(); !strings.HasSuffix(got, "A") {
			t.Errorf("while it is up: %q", got)
		}
	}
	isSick.Store(true)
	eventually(t, "it is down", func() bool { return !d.targetHealth(0).Up })
	before := n.Load()
	for range 10 {
		if got := get(); !strings.HasSuffix(got, "B") {
			t.Errorf("while it is down: %q", got)
		}
	}
	if n.Load() != before {
		t.Errorf("it got %d requests while it was down", n.Load()-before)
	}
	isSick.Store(false)
	eventually(t, "it gets requests again", func() bool { return strings.HasSuffix(get(), "A") })
}

// sick is a web server whose health checks fail, and which counts the other requests that it gets.
func sick(t *testing.T, n *atomic.Int64) string {
	return httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			n.Add(1)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	})
}

// TestInheritHealth: a process that takes over, or comes after a crash, sends nobody to a target that the one
// before it has found down, unless it checks it in another way. However many there are, each goes there in a
// message, and one that knows of no more than one message has the orders of an operator.
func TestInheritHealth(t *testing.T) {
	var n atomic.Int64
	a, addr := sick(t, &n), freeAddr(t)
	b := httpBackend(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "B") })
	const more = 150
	yaml := func(every string) string {
		all := fmt.Sprintf(`listeners:
  - { listen: [%q], mode: http, default: { forward: [ { to: %q, weight: 1000 }, { to: %q, backup: true } ], health: { check: http, path: /healthz, every: %s, fall: 1 } } }
  - { name: more, listen: [%q], mode: http, routes: [
`, addr, a, b, every, freeAddr(t))
		for i := range more { // each is another check
			all += fmt.Sprintf("{ host: [h%d.test], forward: \"127.0.0.1:1\", health: { every: %dms, fall: 1 } },\n", i, 3_000_000+i)
		}
		return all + "] }\n"
	}
	downSince := func(d *daemon) (all []time.Time) {
		for _, l := range d.Status().Listeners {
			for _, r := range l.Routes {
				if h := r.Targets[0].Health; h != nil && !h.Up {
					all = append(all, h.Since.Round(0)) // as other processes see it
				}
			}
		}
		return all
	}
	old := start(t, yaml("1h"))
	eventually(t, "all are down", func() bool { return len(downSince(old)) == 1+more })
	if _, err := old.SetDisabled(url.Values{"target": {b}}, true); err != nil {
		t.Fatal(err)
	}
	whole, err := old.Orders()
	if err != nil {
		t.Fatal(err)
	}
	first, parts, err := old.OrdersInParts()
	if err != nil {
		t.Fatal(err)
	}
	if len(parts) < 2 {
		t.Errorf("it is in %d parts", len(parts))
	}
	for _, m := range append(parts, first) {
		if len(m) > 40<<10 {
			t.Errorf("a part has %d bytes: no message takes it", len(m))
		}
	}
	was, since := old.targetHealth(0), downSince(old)
	old.Close()
	for _, c := range []struct {
		name    string
		o       Options
		every   string
		isKnown bool // that a is down
		known   int  // that so many are
	}{
		{"whole", Options{Orders: whole}, "1h", true, 1 + more},
		{"in parts", Options{Orders: first, More: parts}, "1h", true, 1 + more},
		{"some of it makes no sense", Options{Orders: first, More: append([]json.RawMessage{json.RawMessage("[]"),
			json.RawMessage(`{"checks":[7,{"spec":{"rise":"x"}}]}`)}, parts...)}, "1h", true, 1 + more},
		{"the first part alone", Options{Orders: first}, "1h", false, 0},
		{"a is checked otherwise", Options{Orders: whole}, "59m", false, more},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := startOptions(t, parse(t, yaml(c.every)), c.o)
			defer d.Close()
			known := 0 // and not found here
			for _, at := range downSince(d) {
				if slices.ContainsFunc(since, at.Equal) {
					known++
				}
			}
			if known != c.known {
				t.Errorf("%d targets are known to be down, want %d", known, c.known)
			}
			if is := d.targetHealth(0); c.isKnown && is.Error != was.Error {
				t.Errorf("known is %+v, and was %+v", is, was)
			}
			if len(d.Status().Disabled) != 1 {
				t.Error("what an operator has said is forgotten")
			}
			if _, err := d.SetDisabled(url.Values{"target": {b}}, false); err != nil {
				t.Fatal(err)
			}
			before := n.Load()
			for range 20 {
				if _, body := ask(t, addr, "GET", "a.test", "/", nil); c.isKnown && !strings.HasSuffix(body, "B") {
					t.Errorf("a stranger gets %q", body)
				}
			}
			if got := n.Load() - before; c.isKnown && got > 0 {
				t.Errorf("it gets %d requests, though it is down", got)
			}
		})
	}
}

// TestBySource: a client gets the same target each time while that is up, and others get others; in every
// mode.
func TestBySource(t *testing.T) {
	for _, mode := range []string{"tcp", "http"} {
		t.Run(mode, func(t *testing.T) {
			var all []string
			for i := range 4 {
				name := fmt.Sprint(i)
				if mode == "http" {
					all = append(all, httpBackend(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) }))
				} else {
					all = append(all, backend(t, func(c net.Conn) {
						defer c.Close()
						io.WriteString(c, name)
					}))
				}
			}
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: [ %q, %q, %q, %q ], balance: source } } ]`,
				addr, mode, all[0], all[1], all[2], all[3]))
			from := func(client int) string {
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(client))}, Timeout: patience}
				c, err := dialer.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				if mode == "http" {
					io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				}
				got, err := io.ReadAll(c)
				if err != nil || len(got) == 0 {
					t.Fatalf("%q, %v", got, err)
				}
				return string(got[len(got)-1:])
			}
			first := map[int]string{}
			used := map[string]int{}
			for client := 1; client <= 60; client++ {
				first[client] = from(client)
				used[first[client]]++
			}
			// Which they are depends on ports. That one of 4 has none of 60 clients comes once in 10⁷ times.
			if len(used) != 4 {
				t.Errorf("60 clients have %v", used)
			}
			for client, want := range first {
				for range 2 {
					if got := from(client); got != want {
						t.Errorf("client %d has %s, and then %s", client, want, got)
					}
				}
			}
			if _, err := d.SetDisabled(url.Values{"target": {all[0]}}, true); err != nil {
				t.Fatal(err)
			}
			for _, client := range slices.Sorted(maps.Keys(first)) {
				if got := from(client); got == "0" || first[client] != "0" && got != first[client] {
					t.Errorf("without target 0 client %d, which had %s, has %s", client, first[client], got)
				}
			}
		})
	}
}
