package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// named echoes behind its name, and counts its connections.
func named(name string, n *atomic.Int64) func(net.Conn) {
	return func(c net.Conn) {
		defer c.Close()
		n.Add(1)
		io.WriteString(c, name)
		io.Copy(c, c)
	}
}

// exchange sends b to a listener, and returns what comes back.
func exchange(addr string, b []byte) ([]byte, error) {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	c.(*net.TCPConn).CloseWrite()
	return io.ReadAll(c)
}

// TestSeveralTargets: while a target is dead no connection fails, and what it has sent comes whole to another
// one, on both paths.
func TestSeveralTargets(t *testing.T) {
	hello := helloFor(t, "a.test")
	hole := full(t)
	for _, dead := range []struct {
		name, target string
		reason       string
	}{
		{"refuses", freeAddr(t), "refused"},
		{"refuses, and is looked up", byName(freeAddr(t)), "refused"},
		{"is silent", hole, "timeout"},
		{"is silent, and is looked up", byName(hole), "timeout"},
		{"is no socket", "unix:///nowhere/at.all", "no_socket"},
	} {
		for _, mode := range []string{"sni", "tcp"} {
			for _, alive := range []string{"an address", "a name"} {
				t.Run(fmt.Sprintf("%s %s, then %s", mode, dead.name, alive), func(t *testing.T) {
					t.Parallel()
					const all, beside = 500, 25
					var n atomic.Int64
					target := backend(t, named("B", &n))
					if alive == "a name" {
						target = byName(target)
					}
					addr := freeAddr(t)
					d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: [ { to: %q, weight: 1000 }, { to: %q, backup: true } ] } } ]
limits: { connections_per_source: %d }`, addr, mode, dead.target, target, all)) // a slow machine counts some that have ended
					began := time.Now()
					want := slices.Concat([]byte("B"), hello)
					var group sync.WaitGroup
					for range beside {
						group.Go(func() {
							for range all / beside {
								if got, err := exchange(addr, hello); err != nil || !bytes.Equal(got, want) {
									t.Errorf("%d bytes come back, want %d: %v", len(got), len(want), err)
								}
							}
						})
					}
					group.Wait()
					if n.Load() != all {
						t.Errorf("the target got %d connections of %d", n.Load(), all)
					}
					eventually(t, "nothing is left", func() bool { return d.flows.Len() == 0 && d.limiter.Total() == 0 })
					s := d.Status()
					r := s.Listeners[0].Routes[0]
					if len(r.Targets) != 2 || !r.Targets[0].Avoided && time.Since(began) < balance.AvoidFor || r.Targets[0].Connections != 0 || r.Targets[1].Avoided ||
						r.Targets[1].Connections != all || !r.Targets[1].Backup {
						t.Errorf("status: %+v", r.Targets)
					}
					if len(r.Down) != 1 || !strings.Contains(r.Down[0], dead.target) || s.DialErrors[dead.reason] == 0 {
						t.Errorf("down: %q, errors: %v", r.Down, s.DialErrors)
					}
					if !strings.Contains(d.log.String(), lostText) {
						t.Error("the log does not say which target is avoided")
					}
				})
			}
		}
	}
}

// TestSeveralShares: connections are shared by weight, whether targets are on the fast path or not, and a spare
// one gets none. What is shown of a flow is the target that it has.
func TestSeveralShares(t *testing.T) {
	var bigN, smallN, spareN atomic.Int64
	big, small, spare := backend(t, named("big", &bigN)), byName(backend(t, named("small", &smallN))), backend(t, named("spare", &spareN))
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: [ { to: %q, weight: 3 }, %q, { to: %q, backup: true } ] } } ]`,
		addr, big, small, spare))
	const all = 400
	for range all {
		if _, err := exchange(addr, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	// 3:1 of 400 is 300, give or take 9: a deviation of 60 comes once in 10¹⁰ times.
	if b, s := bigN.Load(), smallN.Load(); b+s != all || b < 240 || b > 360 || spareN.Load() != 0 {
		t.Errorf("of %d connections %d and %d, the spare one %d", all, b, s, spareN.Load())
	}
	for range 20 {
		c := dialTCP(t, addr)
		got := make([]byte, 3)
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatal(err)
		}
		want := big
		if string(got) == "sma" {
			want = small
		}
		flows := d.flows.Live()
		if len(flows) != 1 || flows[0].Target != want {
			t.Errorf("%q answers, want the flow of %s: %+v", got, want, flows)
		}
		c.Close()
		eventually(t, "the flow ends", func() bool { return d.flows.Len() == 0 })
	}
}

// TestSeveralComeBack: a target gets connections again once it answers, and where none answers the connection
// fails, but not before those that may just be restarting were tried again.
func TestSeveralComeBack(t *testing.T) {
	for _, name := range []func(string) string{byName, func(addr string) string { return addr }} {
		var spareN, mainN atomic.Int64
		first, second := freeAddr(t), freeAddr(t)
		addr := freeAddr(t)
		d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: [ %q, { to: %q, backup: true } ] } } ]`,
			addr, name(first), name(second)))
		if got, err := exchange(addr, []byte("x")); err == nil {
			t.Errorf("while no target is there, %q comes", got)
		}
		if !strings.Contains(d.log.String(), "upstream can't be reached") {
			t.Error("the log does not say so")
		}
		listen := func(addr string, n *atomic.Int64) (end func() error) {
			ln, err := net.Listen("tcp", addr)
			if err != nil {
				t.Error(err)
				return func() error { return nil }
			}
			t.Cleanup(func() { ln.Close() })
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go named("", n)(c)
				}
			}()
			return ln.Close
		}
		// Once both were tried in vain, they are tried again a moment later. A busy machine may miss that moment.
		for tries := 1; ; tries++ {
			dialled := d.Status().DialErrors["refused"]
			back := make(chan func() error, 1)
			go func() {
				eventually(t, "both are tried", func() bool { return d.Status().DialErrors["refused"] >= dialled+2 })
				back <- listen(second, &spareN)
			}()
			_, err := exchange(addr, []byte("x"))
			end := <-back
			if err == nil {
				break
			}
			end()
			if tries == 20 {
				t.Fatalf("a target that restarts: %v", err)
			}
		}
		listen(first, &mainN)
		d.mu.Lock()
		for _, s := range d.plan.Services {
			s.Fallback.Several[0].Health.Worked() // as after [balance.AvoidFor]
		}
		d.mu.Unlock()
		if _, err := exchange(addr, []byte("x")); err != nil || mainN.Load() != 1 {
			t.Errorf("the first target, back after %s: %v, %d", balance.AvoidFor, err, mainN.Load())
		}
	}
}

// TestSeveralProxy: the target that takes the connection gets one PROXY header, which tells all.
func TestSeveralProxy(t *testing.T) {
	hello := helloFor(t, "a.test")
	for _, dead := range []string{freeAddr(t), byName(freeAddr(t)), full(t)} {
		type heard struct {
			header *proxyheader.Header
			rest   []byte
			err    error
		}
		got := make(chan heard, 1)
		target := backend(t, func(c net.Conn) {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			all, err := io.ReadAll(c)
			h, n, bad := proxyheader.Parse(all, 1<<10)
			got <- heard{h, all[n:], errors.Join(err, bad)}
		})
		addr := freeAddr(t)
		start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: sni, default: { forward: [ %q, { to: %q, backup: true } ], send_proxy: v2 } } ]`,
			addr, dead, target))
		c := dialTCP(t, addr)
		c.Write(hello)
		c.CloseWrite()
		h := <-got
		if h.err != nil || !bytes.Equal(h.rest, hello) {
			t.Fatalf("%d bytes behind the header, want %d: %v", len(h.rest), len(hello), h.err)
		}
		if h.header.Source.String() != c.LocalAddr().String() || h.header.Destination.String() != addr || h.header.ServerName != "a.test" || h.header.ID == "" {
			t.Errorf("the header says %+v", h.header)
		}
	}
}

// TestCourseTakeBack: a target that is slow comes first again, where others are tried beside it, and those that
// have failed come last.
func TestCourseTakeBack(t *testing.T) {
	all := map[string]*plan.Rule{}
	rule := &plan.Rule{}
	for _, name := range []string{"a", "b", "c"} {
		all[name] = &plan.Rule{Target: plan.Target{Written: name, Health: new(balance.Health), Dialer: new(dial.Dialer),
			All: []*config.Forward{{Weight: 1}}}}
		rule.Several = append(rule.Several, all[name])
	}
	c := &course{rule: rule}
	failed, slow := c.take(), c.take()
	c.takeBack()
	got := []*plan.Rule{c.take(), c.take(), c.take()}
	if got[0] != slow || got[1] == slow || got[1] == failed || got[2] != failed || c.take() != nil {
		t.Errorf("after %s failed and %s was slow: %v, %v, %v", failed.Written, slow.Written, got[0].Written, got[1].Written, got[2].Written)
	}
}

// TestIsFault: what others can bring about, or concerns one client alone, has nobody avoid a target.
func TestIsFault(t *testing.T) {
	refused := &dial.Error{Reason: dial.Refused}
	for _, c := range []struct {
		rule plan.Rule
		err  error
		want bool
	}{
		{plan.Rule{}, refused, true},
		{plan.Rule{}, balance.ErrSlow, true},
		{plan.Rule{}, &dial.Error{Reason: dial.Exhausted}, false},
		{plan.Rule{}, &dial.Error{Reason: dial.Canceled}, false},
		{plan.Rule{}, &dial.Error{Reason: dial.OffByHand}, false},
		{plan.Rule{}, unix.EPERM, false},
		{plan.Rule{Target: plan.Target{Transparent: true}}, refused, false},
		{plan.Rule{Target: plan.Target{Transparent: true}}, balance.ErrSlow, false},
	} {
		if got := isFault(&c.rule, c.err); got != c.want {
			t.Errorf("%v of %+v: %v", c.err, c.rule, got)
		}
	}
}
