package relaytest

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// Loopback makes flows through a [relay.Relay] in this process.
type Loopback struct {
	// Down and Up are the networks of the two sides: "tcp4" (default), "tcp6" or "unix".
	Down, Up string

	// Server, when not nil, is where the server accepts; Up is its network then.
	Server net.Listener

	// Cable, when not nil, has both ends at its far side, and the relay at the near one.
	Cable Cable

	// WrapDown and WrapUp, when not nil, stand between the relay and the socket.
	WrapDown, WrapUp func(net.Conn) net.Conn

	// Hops, when not nil, makes the flows go from one relay of this process to another and back, and counts.
	Hops *Hops

	// Options of every flow. A case sets further ones.
	Options relay.Options
}

// A Cable leads to another network: see package test/cable.
type Cable interface {
	Addr(network string, atFar bool) string // of one of its sides, with port 0
	AtFar(func() error) error               // makes sockets there
}

// Path opens the listeners, until the end of the test.
func (l Loopback) Path(t testing.TB) Path {
	down, up := newPairs(t, l.Down, l.Cable, false), l.servers(t)
	_, r := Relay() // while there are descriptors
	t.Cleanup(func() {
		for _, r := range []*relay.Relay{r, OtherRelay()} {
			if change := r.Illegal(); change != nil {
				t.Errorf("a flow goes from %s, which its table of states does not have", *change)
			}
		}
	})
	connect := func(t testing.TB) *Flow {
		t.Helper()
		f := &Flow{result: make(chan relay.Result, 1)}
		f.Client, f.Down = down.pair(t)
		f.Up, f.Server = up.pair(t)
		f.start = func(ctx context.Context, o relay.Options) { l.run(ctx, f, o) }
		return f
	}
	p := Path{Connect: connect, NoReset: l.Down == "unix" || l.Up == "unix", PIDs: []int{0}}
	if l.Hops != nil {
		p.Skip = []string{"stalled flows cost nothing"}
	}
	return p
}

// Relay gives the loops and the relay of this process, which stay.
var Relay = sync.OnceValues(func() (*loop.Reactor, *relay.Relay) {
	n := runtime.GOMAXPROCS(0)
	loops, err := loop.New(n)
	if err != nil {
		panic(err)
	}
	runtime.GOMAXPROCS(n + 1) // as the daemon does
	return loops, relay.New(loops)
})

// OtherRelay gives another relay of this process, with loops of its own.
var OtherRelay = sync.OnceValue(func() *relay.Relay {
	loops, err := loop.New(1)
	if err != nil {
		panic(err)
	}
	return relay.New(loops)
})

// Direct is a path with nothing in between.
func (l Loopback) Direct(t testing.TB) Path {
	p := newPairs(t, l.Down, l.Cable, true)
	connect := func(t testing.TB) *Flow {
		t.Helper()
		f := new(Flow)
		f.Client, f.Server = p.pair(t)
		return f
	}
	return Path{Connect: connect, PIDs: []int{0}}
}

// Lossy is p, where packets are lost.
func Lossy(p Path) Path {
	p.Loses = true
	return p
}

// servers makes the pairs of the relay and the server.
func (l Loopback) servers(t testing.TB) *pairs {
	t.Helper()
	if l.Server != nil {
		return &pairs{l: l.Server, dial: here}
	}
	return newPairs(t, l.Up, l.Cable, true)
}

// run starts the relay with what l and the case want.
func (l Loopback) run(ctx context.Context, f *Flow, o relay.Options) {
	all := l.Options
	all.Preface, all.Head, all.Counters = o.Preface, o.Head, o.Counters
	all.Buffer, all.Idle = cmp.Or(o.Buffer, all.Buffer), cmp.Or(o.Idle, all.Idle)
	d, u := f.Down, f.Up
	if l.WrapDown != nil {
		d = l.WrapDown(d)
	}
	if l.WrapUp != nil {
		u = l.WrapUp(u)
	}
	_, r := Relay()
	done := func(r relay.Result) { f.result <- r }
	if l.Hops != nil {
		go l.Hops.run(ctx, r, OtherRelay(), d, u, all, done)
		return
	}
	go r.Run(ctx, d, u, all, done)
}

// Conn makes a conn of a TCP socket, which it then is: for datapaths that take bare sockets.
func Conn(fd int) *net.TCPConn {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		panic(err)
	}
	return c.(*net.TCPConn)
}

// pairs makes connected pairs of sockets.
type pairs struct {
	mu   sync.Mutex
	l    net.Listener
	dial func(func() error) error // where the one that dials is
}

func here(f func() error) error { return f() }

// newPairs listens on this host, or on one side of the cable, and dials from the other.
func newPairs(t testing.TB, network string, c Cable, atFar bool) *pairs {
	t.Helper()
	addr := "127.0.0.1:0"
	switch network {
	case "":
		network = "tcp4"
	case "tcp6":
		addr = "[::1]:0"
	case "unix":
		addr = filepath.Join(t.TempDir(), "s")
	}
	p, listen := &pairs{dial: here}, here
	if c != nil && network != "unix" {
		addr = c.Addr(network, atFar)
		if atFar {
			listen = c.AtFar
		} else {
			p.dial = c.AtFar
		}
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // kernel datapaths can't take MPTCP
	if err := listen(func() (err error) {
		p.l, err = lc.Listen(context.Background(), network, addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.l.Close() })
	return p
}

func (p *pairs) pair(t testing.TB) (dialled, accepted net.Conn) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	var d net.Dialer
	d.SetMultipathTCP(false)
	if err := p.dial(func() (err error) {
		dialled, err = d.Dial(p.l.Addr().Network(), p.l.Addr().String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	accepted, err := p.l.Accept()
	if err != nil {
		dialled.Close()
		t.Fatal(err)
	}
	return dialled, accepted
}

// Through makes a Path.Dial for something outside of this process: dial makes a connection to its listener,
// and what it forwards arrives at l. hello, if any, is what the client has to say first for the flow to be
// forwarded; the server is expected to get it as it is. Both ends are given with nothing pending.
func Through(dial func() (net.Conn, error), l net.Listener,
	hello []byte) func(t testing.TB) (client, server net.Conn) {
	w := &waiting{arrived: make(map[string]chan net.Conn)}
	go w.accept(l, len(hello))
	return func(t testing.TB) (client, server net.Conn) {
		t.Helper()
		token, ch := w.expect()
		client, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write(append(hello[:len(hello):len(hello)], token...)); err != nil {
			client.Close()
			t.Fatalf("send the token: %v", err)
		}
		select {
		case server = <-ch:
			return client, server
		case <-time.After(patience):
			client.Close()
			t.Fatal("the connection does not arrive")
			panic("unreachable")
		}
	}
}

const tokenSize = 16

// waiting tells apart the connections that arrive by the token that is sent first.
type waiting struct {
	mu      sync.Mutex
	last    int
	arrived map[string]chan net.Conn
}

func (w *waiting) expect() (token string, ch chan net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	token = fmt.Sprintf("%0*d", tokenSize, w.last)
	ch = make(chan net.Conn, 1)
	w.arrived[token] = ch
	return token, ch
}

func (w *waiting) accept(l net.Listener, helloSize int) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			b := make([]byte, helloSize+tokenSize)
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadFull(c, b); err != nil {
				c.Close()
				return
			}
			c.SetReadDeadline(time.Time{})
			w.mu.Lock()
			defer w.mu.Unlock()
			if ch := w.arrived[string(b[helloSize:])]; ch != nil {
				delete(w.arrived, string(b[helloSize:]))
				ch <- c
				return
			}
			c.Close()
		}()
	}
}
