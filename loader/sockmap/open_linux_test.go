package sockmap

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/pins"
	"github.com/tailsplice/tailsplice/tcpsock"
)

var opened atomic.Int64

// pinnedAt is where the maps of an Engine are pinned.
var pinnedAt sync.Map

// open loads an Engine for one test, with hooks, and closes it after.
func open(t testing.TB, h *Hooks, flows int) *Engine {
	t.Helper()
	return openSwept(t, h, flows, func() {})
}

// openSwept is open. onSweep is called by the sweeper, which has seen all flows.
func openSwept(t testing.TB, h *Hooks, flows int, onSweep func()) *Engine {
	t.Helper()
	at, instance := loadertest.OwnBPFFS(t, "0700"), fmt.Sprint("ts-ldr-", opened.Add(1))
	g, err := pins.Claim(at, instance, func(string) (bool, error) { return false, nil }, loadertest.LogTo(t))
	loadertest.Must(t, err)
	l, err := Load(Config{MaxFlows: flows, Pin: g.Pin, Log: loadertest.LogTo(t), Hooks: h})
	loadertest.Must(t, err)
	loadertest.Must(t, g.Publish())
	loadertest.Must(t, l.Start(func(time.Time) bool { onSweep(); return false }))
	pinnedAt.Store(l, filepath.Join(at, "tailsplice", instance, "current"))
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), g.Release()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

// dup gives a descriptor of its own for c's socket. c stays usable.
func dup(c *net.TCPConn) (socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, err := tcpsock.Dup(raw)
	return socket(fd), err
}

// flows is how many are in the sockmap, or are recorded.
func (l *Engine) flows() int {
	n := int(l.inside.Load())
	for _, r := range l.ledger.all() {
		r.mu.Lock()
		if !r.isSpliced {
			n++
		}
		r.mu.Unlock()
	}
	return n
}

// entry is the only one of the flows map.
func (l *Engine) entry(t testing.TB) (e sockmapFlow) {
	t.Helper()
	var cookie uint64
	if n := entries(l.objects.Flows); n != 1 || !l.objects.Flows.Iterate().Next(&cookie, &e) {
		t.Fatalf("%d flows are in the map", n)
	}
	return e
}

// entries is how many a map has.
func entries(m *ebpf.Map) (n int) {
	var key uint64
	var value []byte
	for it := m.Iterate(); it.Next(&key, &value); {
		n++
	}
	return n
}

// stalls is how many were counted.
func (l *Engine) stalls() uint64 { _, n := l.Health(); return n }

// leave asks the flow to leave the sockmap, if it is there.
func leave(l *Engine) {
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			f.mu.RLock()
			if !f.isClosed {
				l.detacher.ask(f)
			}
			f.mu.RUnlock()
		}
	}
}

// detachOne takes one direction of the flow out of the sockmap, and lets the other one stay.
func detachOne(t *testing.T, l *Engine, f *flow, side int) {
	t.Helper()
	l.detacher.mu.Lock()
	f.directions[1-side].wasAsked = true // so that it is not
	l.detacher.mu.Unlock()
	loadertest.WaitFor(t, func() bool { leave(l); return f.directions[side].isDetached.Load() }, "the side to leave")
}

// onlyFlow is the one that lives.
func (l *Engine) onlyFlow(t testing.TB) *flow {
	t.Helper()
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			return f
		}
	}
	t.Fatal("there is no flow")
	return nil
}
