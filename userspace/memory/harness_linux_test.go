package memory

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// patience is for what comes sooner or later, on machines that do more than this.
const patience = time.Minute

// watch is a Watch under test, which looks when the test says it.
type watch struct {
	*Watch
	messages *logs.Log
	ended    map[string]int64 // connections, by what was short
	killed   atomic.Int64     // flows, as the relay says
}

// newWatch is a watch without flows and without a budget.
func newWatch(t *testing.T) *watch {
	t.Helper()
	w := &watch{messages: &logs.Log{}, ended: map[string]int64{}}
	_, carrier := relaytest.Relay()
	w.Watch = New(Options{Log: w.messages.Logger(), Limited: always{w.messages}, Relay: carrier, Flows: flow.NewRegistry(),
		Connections:   func() int { return 0 },
		Ports:         func() map[uint16]bool { return map[uint16]bool{} },
		IsListeningAt: func(netip.AddrPort) bool { return false },
		MayBeMany:     func(netip.Addr) bool { return false },
		MayBeHere:     netip.Addr.IsPrivate,
		GiveUp:        func() {},
		Ended:         func(what string, n int) { w.ended[what] += int64(n) },
	})
	t.Cleanup(func() {
		w.Close()
		if t.Failed() {
			t.Logf("log:\n%s", w.messages)
		}
	})
	return w
}

// always is a [Limited] that leaves nothing out.
type always struct{ log *logs.Log }

func (a always) Info(_, msg string, args ...any) { a.log.Logger().Info(msg, args...) }
func (a always) Warn(_, msg string, args ...any) { a.log.Logger().Warn(msg, args...) }

// carry is a watch of the flows that a relay carries from these addresses to a target.
func carry(t *testing.T, target string, addrs ...string) *watch {
	t.Helper()
	w := newWatch(t)
	at, ports := map[netip.AddrPort]bool{}, map[uint16]bool{}
	w.opts.Ports = func() map[uint16]bool { return ports }
	w.opts.IsListeningAt = func(local netip.AddrPort) bool { return at[local] }
	w.opts.Connections = w.opts.Flows.Len
	for _, addr := range addrs {
		here := netip.MustParseAddrPort(addr)
		at[here], ports[here.Port()] = true, true
	}
	for _, addr := range addrs {
		listen(t, addr, func(down net.Conn) {
			up, err := net.Dial("tcp", target)
			if err != nil {
				t.Errorf("the target can't be reached: %v", err)
				down.Close()
				return
			}
			peer, counters := down.RemoteAddr().String(), &relay.Counters{}
			fl := &flow.Flow{Client: peer, Downstream: peer, Upstream: target, Bytes: counters.Load, Held: counters.Held, Killer: counters}
			w.opts.Flows.Add(fl)
			_, carrier := relaytest.Relay()
			carrier.Run(t.Context(), down, up, relay.Options{Counters: counters}, func(r relay.Result) {
				if r.End == relay.EndKilled {
					w.killed.Add(1)
				}
				w.opts.Flows.Remove(fl)
			})
		})
	}
	return w
}

// fake has w find a machine where all TCP sockets hold so many bytes, and may hold so many. Nothing is known of
// cgroups.
func (w *watch) fake(t *testing.T, used, short int64) {
	t.Helper()
	w.proc, w.cgroups = t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		"net/sockstat":         fmt.Sprintf("sockets: used 9\nTCP: inuse 9 orphan 0 tw 0 alloc 9 mem %d\n", used>>12),
		"sys/net/ipv4/tcp_mem": fmt.Sprintf("1\t%d\t9\n", short>>12),
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(w.proc, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.proc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// freeAddr is an address of 127.0.0.1 that nothing listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	return freeaddr.Get(t)
}

// backend accepts connections and hands each to serve.
func backend(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	return listen(t, "127.0.0.1:0", serve)
}

// listen does the same at an address.
func listen(t *testing.T, addr string, serve func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return ln.Addr().String()
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within %v: %s", patience, what)
}

// forever is an endless stream.
type forever struct{}

func (forever) Read(b []byte) (int, error) { return len(b), nil }
