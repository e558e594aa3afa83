package relay_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

func TestCases(t *testing.T) {
	small := relaytest.SmallSize()
	parkAfter := func(d time.Duration) relaytest.Loopback {
		return relaytest.Loopback{Options: relay.WithParkAfter(relay.Options{}, d)}
	}
	through := func(paths ...datapath.Datapath) relaytest.Loopback {
		return relaytest.Loopback{Options: relay.Options{Datapaths: paths}}
	}
	for _, p := range []struct {
		name string
		l    relaytest.Loopback
		size relaytest.Size
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize()},
		// Parking would hide that a pump has missed something: a new one starts by reading.
		{"never parked", parkAfter(time.Hour), small},
		{"tcp6 to tcp4", relaytest.Loopback{Down: "tcp6"}, small},
		{"tcp to unix", relaytest.Loopback{Up: "unix"}, small},
		{"unix to tcp", relaytest.Loopback{Down: "unix"}, small},
		{"parked at once", parkAfter(time.Millisecond), small},
		{"small buffer", relaytest.Loopback{Options: relay.Options{Buffer: 4 << 10}}, small},
		{"datapath", through(refuser{}, taker{}), small},
		{"datapath gives back", through(returner{}), small},
	} {
		t.Run(p.name, func(t *testing.T) { relaytest.Run(t, p.l.Path(t), p.size) })
	}
}

// wrapped hides what a connection is, but not that it has two halves.
type wrapped struct{ net.Conn }

func (w wrapped) CloseWrite() error { return w.Conn.(*net.TCPConn).CloseWrite() }
func (w wrapped) NetConn() net.Conn { return w.Conn }
func wrap(c net.Conn) net.Conn      { return wrapped{c} }
func hide(c net.Conn) net.Conn      { return hidden{c} }

// hidden has one half only.
type hidden struct{ net.Conn }

// TestWrapped: connections that can't be spliced.
func TestWrapped(t *testing.T) {
	relaytest.Run(t, relaytest.Loopback{WrapDown: wrap, WrapUp: wrap}.Path(t), relaytest.SmallSize())
}

func TestNoHalfClose(t *testing.T) {
	p := relaytest.Loopback{WrapUp: hide}.Path(t)
	f := p.Connect(t)
	f.Start(context.Background(), relay.Options{})
	f.Client.Write([]byte("hello"))
	f.Client.(*net.TCPConn).CloseWrite()
	f.Server.SetDeadline(time.Now().Add(time.Minute))
	if b, err := io.ReadAll(f.Server); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if r := f.Result(t); r.End != relay.EndEOF || r.Up != 5 {
		t.Errorf("%+v", r)
	}
	f.Client.Close()
	f.Server.Close()
}

// taker is a datapath that keeps all promises: it is the relay itself.
type taker struct{}

func (taker) Name() string { return "taker" }

func (taker) Splice(ctx context.Context, down, up int, f datapath.Handoff) (func() (int64, int64), error) {
	var c relay.Counters
	count := func() (int64, int64) {
		u, d := c.Load()
		return f.Up + u, f.Down + d
	}
	o := relay.Options{Buffer: f.Buffer, Idle: f.Idle, Counters: &c}
	_, r := relaytest.Relay()
	r.Run(ctx, relaytest.Conn(down), relaytest.Conn(up), o, func(r relay.Result) {
		f.Ended(f.Up+r.Up, f.Down+r.Down, string(r.End), r.Err)
	})
	return count, nil
}

type refuser struct{}

var errRefused = errors.New("not today")

func (refuser) Name() string { return "refuser" }

func (refuser) Splice(context.Context, int, int, datapath.Handoff) (func() (int64, int64), error) {
	return nil, errRefused
}

// returner gives the flow back, as other descriptors of its sockets.
type returner struct{}

func (returner) Name() string { return "returner" }

func (returner) Splice(_ context.Context, down, up int, f datapath.Handoff) (func() (int64, int64), error) {
	dup := func(own int) (fd int) {
		fd, err := syscall.Dup(own)
		if err != nil {
			panic(err)
		}
		syscall.Close(own)
		return fd
	}
	f.Returned(dup(down), dup(up), nil, nil, f.Up, f.Down, f.LastMoved, nil, errRefused)
	return func() (int64, int64) { return -1, -1 }, nil
}

func TestDatapathReasons(t *testing.T) {
	for _, c := range []struct {
		paths []datapath.Datapath
		heard string
		had   string
	}{
		{nil, "", "userspace"},
		{[]datapath.Datapath{refuser{}}, "refuser: not today\n", "userspace"},
		{[]datapath.Datapath{refuser{}, taker{}}, "refuser: not today\n", "taker"},
		{[]datapath.Datapath{taker{}, refuser{}}, "", "taker"},
		{[]datapath.Datapath{returner{}}, "returner: not today\n", "userspace"},
	} {
		var mu sync.Mutex
		var heard strings.Builder
		hear := func(name string, reason error) {
			mu.Lock()
			defer mu.Unlock()
			heard.WriteString(name + ": " + reason.Error() + "\n")
		}
		l := relaytest.Loopback{Options: relay.Options{Datapaths: c.paths, Refused: hear}}
		var counters relay.Counters
		f := l.Path(t).Connect(t)
		f.Start(context.Background(), relay.Options{Head: []byte("head"), Counters: &counters})
		f.Client.(*net.TCPConn).CloseWrite()
		b, err := io.ReadAll(f.Server)
		for end := time.Now().Add(time.Minute); counters.Datapath() != c.had; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("while it lives %s has it, want %s", counters.Datapath(), c.had)
				break
			}
		}
		f.Server.Close()
		r := f.Result(t)
		f.Client.Close()
		up, down := counters.Load()
		mu.Lock()
		if string(b) != "head" || err != nil || r.Datapath != c.had || heard.String() != c.heard ||
			r.Up != 4 || up != 4 || down != 0 {
			t.Errorf("%q, %v, %+v, counted %d and %d, heard %q", b, err, r, up, down, heard.String())
		}
		mu.Unlock()
	}
}

// TestKillBeforeBegin: a flow that is killed before it begins ends as it begins, whoever is to have it, and
// sends nothing of what its client has said.
func TestKillBeforeBegin(t *testing.T) {
	for _, paths := range [][]datapath.Datapath{nil, {taker{}}, {returner{}}, {refuser{}}} {
		why := errors.New("because")
		var counters relay.Counters
		counters.Kill(why)
		f := relaytest.Loopback{Options: relay.Options{Datapaths: paths}}.Path(t).Connect(t)
		f.Start(context.Background(), relay.Options{Counters: &counters, Preface: []byte("PROXY"), Head: []byte("head")})
		if r := f.Result(t); r.End != relay.EndKilled || r.Err != why || r.Up != 0 {
			t.Errorf("%v: %+v", paths, r)
		}
		for _, c := range []net.Conn{f.Client, f.Server} {
			c.SetDeadline(time.Now().Add(time.Minute))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%v: %v", paths, err)
			}
			c.Close()
		}
		counters.Kill(why) // does nothing
	}
}

// TestIdleFlows: a quiet flow has no goroutine, and next to no memory of ours.
func TestIdleFlows(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("flows are parked on Linux only")
	}
	const n = 200
	o := relay.WithParkAfter(relay.Options{Idle: time.Hour}, 50*time.Millisecond)
	p := relaytest.Loopback{Options: o}.Path(t)
	before := runtime.NumGoroutine()
	var flows []*relaytest.Flow
	for i := range n {
		f := p.Connect(t)
		defer f.Client.Close()
		defer f.Server.Close()
		f.Start(context.Background(), relay.Options{})
		f.Client.Write([]byte("ping"))
		var b [4]byte
		io.ReadFull(f.Server, b[:])
		if i%2 == 0 {
			f.Client.(*net.TCPConn).CloseWrite() // and half of them are half-closed
		}
		flows = append(flows, f)
	}
	goroutines := n
	for end := time.Now().Add(time.Minute); goroutines > 5 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		goroutines = runtime.NumGoroutine() - before
	}
	if goroutines > 5 {
		t.Errorf("%d idle flows have %d goroutines", n, goroutines)
	}
	for _, f := range flows { // and they live
		f.Server.Write([]byte("pong"))
		var b [4]byte
		f.Client.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadFull(f.Client, b[:]); err != nil || string(b[:]) != "pong" {
			t.Fatal(string(b[:]), err)
		}
	}
}

// TestTLS: upstream is TLS that this process speaks.
func TestTLS(t *testing.T) {
	config := &tls.Config{Certificates: []tls.Certificate{selfsigned.Certificate(t, "a.test")}}
	l := relaytest.Loopback{WrapDown: func(c net.Conn) net.Conn { return tls.Server(c, config) }}
	p := l.Path(t)
	f := p.Connect(t)
	f.Start(context.Background(), relay.Options{Idle: time.Minute})
	c := tls.Client(f.Client, &tls.Config{InsecureSkipVerify: true}) // about the relay, not about names
	go func() {
		io.Copy(f.Server, f.Server)
		f.Server.(*net.TCPConn).CloseWrite()
	}()
	want := strings.Repeat("0123456789", 100_000)
	go func() {
		io.WriteString(c, want)
		c.CloseWrite()
	}()
	f.Client.SetDeadline(time.Now().Add(time.Minute))
	if got, err := io.ReadAll(c); err != nil || string(got) != want {
		t.Fatalf("%d bytes, %v after half-close of TLS", len(got), err)
	}
	c.Close()
	f.Server.Close()
	if r := f.Result(t); r.End != relay.EndEOF || r.Up != int64(len(want)) || r.Down != r.Up {
		t.Errorf("%+v", r)
	}

	// A reset behind TLS is a reset of the socket under it, and no proper end.
	f = p.Connect(t)
	f.Start(context.Background(), relay.Options{})
	c = tls.Client(f.Client, &tls.Config{InsecureSkipVerify: true})
	f.Client.SetDeadline(time.Now().Add(time.Minute))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	f.Server.(*net.TCPConn).SetLinger(0)
	f.Server.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("instead of a reset: %v", err)
	}
	if r := f.Result(t); r.End != relay.EndUpstreamReset {
		t.Errorf("%+v", r)
	}
}

// TestThrough: the table through a listener, as it is used for a whole daemon.
func TestThrough(t *testing.T) {
	front, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		for {
			down, err := front.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp4", server.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			_, r := relaytest.Relay()
			r.Run(context.Background(), down, up, relay.Options{}, func(relay.Result) {})
		}
	}()
	dial := func() (net.Conn, error) { return net.Dial("tcp4", front.Addr().String()) }
	p := relaytest.Path{Dial: relaytest.Through(dial, server, []byte("hello")), PIDs: []int{0}}
	relaytest.Run(t, p, relaytest.SmallSize())
}
