package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestExpressExact: whichever way a connection goes, and wherever it leaves the short one, each byte arrives once. To an address
// of this host that is not 127.0.0.1 it is not known that it is connected at once.
func TestExpressExact(t *testing.T) {
	greeting := bytes.Repeat([]byte("hello from upstream\n"), 100)
	serve := func(c net.Conn) { // speaks first, then says again what it hears
		defer c.Close()
		c.Write(greeting)
		io.Copy(c, c)
		c.(*net.TCPConn).CloseWrite()
	}
	hello := helloFor(t, "a.test")
	bulk := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{2}).Read(bulk)
	_, port, _ := net.SplitHostPort(backend(t, serve))
	targets := []string{backend(t, serve), "localhost:" + port}
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.To4() != nil && ip.IsGlobalUnicast() {
			targets = append(targets, backendOn(t, ip.String(), serve))
			break
		}
	}
	for i := range 4 * len(targets) {
		target := targets[i/4]
		datapaths := [][]datapath.Datapath{nil, {refuser{}, taker{}}, {lateRefuser{}, lateTaker{}}, {lateRefuser{}}}[i%4]
		word := "userspace"
		if datapaths != nil {
			word = datapaths[0].Name()
		}
		for _, mode := range []string{"sni", "tcp"} {
			addr := freeAddr(t)
			d := startOptions(t, parse(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: %q, datapath: %s } } ]`, addr, mode, target, word)), Options{Datapaths: datapaths})
			for _, c := range []struct {
				name   string
				pieces [][]byte
			}{
				{"the hello and the end, in one segment", [][]byte{hello}},
				{"in two pieces", [][]byte{hello[:7], hello[7:]}},
				{"and more behind it", [][]byte{slices.Concat(hello, []byte("early"))}},
				{"and so much that it fills the buffer", [][]byte{slices.Concat(hello, bulk)}},
				{"and much later on", [][]byte{hello, bulk}},
			} {
				conn := dialTCP(t, addr)
				sent := slices.Concat(c.pieces...)
				go func() {
					for i, p := range c.pieces {
						if i > 0 {
							time.Sleep(20 * time.Millisecond)
						}
						if i == len(c.pieces)-1 { // the end comes with the last bytes
							cork(conn)
						}
						conn.Write(p)
					}
					conn.CloseWrite()
				}()
				conn.SetReadDeadline(time.Now().Add(patience))
				got, err := io.ReadAll(conn)
				if want := slices.Concat(greeting, sent); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s %s %v, %s: %d bytes come back, want %d: %v", mode, target, datapaths, c.name, len(got), len(want), err)
				}
			}
			eventually(t, "nothing is left", func() bool { return d.flows.Len() == 0 && d.limiter.Total() == 0 })
		}
	}
}

// taker is a datapath that keeps all promises: it is the relay itself.
type taker struct{}

func (taker) Name() string { return "sockmap" }

func (taker) Splice(ctx context.Context, down, up int, f datapath.Handoff) (func() (int64, int64), error) {
	_, r := relaytest.Relay()
	r.Run(ctx, relaytest.Conn(down), relaytest.Conn(up), relay.Options{Buffer: f.Buffer, Idle: f.Idle}, func(r relay.Result) { f.Ended(f.Up+r.Up, f.Down+r.Down, string(r.End), r.Err) })
	return func() (int64, int64) { return f.Up, f.Down }, nil
}

type refuser struct{ taker }

func (refuser) Splice(context.Context, int, int, datapath.Handoff) (func() (int64, int64), error) {
	return nil, errors.New("not today")
}

// They record flows, and are offered them later.
type (
	lateTaker   struct{ taker }
	lateRefuser struct{ refuser }
)

func (lateTaker) Active() (flows int, ok bool)   { return 0, true }
func (lateRefuser) Active() (flows int, ok bool) { return 0, true }

func (lateTaker) Record(_, _ int, _ datapath.Handoff) (func(), error)   { return func() {}, nil }
func (lateRefuser) Record(_, _ int, _ datapath.Handoff) (func(), error) { return func() {}, nil }

// cork keeps a last part of a segment back until the end of the stream.
func cork(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_CORK, 1) })
}

// TestCrossings: a usual connection crosses between the server and what carries its sockets four times: it is
// taken in, its hello is read, the relay gets it, and is done with it. In between the server asks nobody to
// wait. ARCHITECTURE.md says so.
func TestCrossings(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { name: l, listen: [%q], mode: sni, default: { forward: %q } } ]`,
		freeAddr(t), backend(t, echo)))
	var crossings atomic.Int32
	at := socketFor(t, d.Server, "l", func(l *listener, s *loop.Socket) loop.Wait {
		crossings.Add(1)
		first := d.admit(l, s, netip.MustParseAddrPort("192.0.2.1:1234"))
		if first.Ready == nil {
			t.Error("it is the server that begins to wait")
			return first
		}
		ready := first.Ready
		first.Ready = func(timedOut bool) {
			crossings.Add(1)
			ready(timedOut)
			if s.Cancel() {
				t.Error("the server waits though it has the hello")
			}
		}
		return first
	})
	defer at.Close()
	c := dialTCP(t, at.addr.String())
	at.accept()
	hello := helloFor(t, "a.test")
	c.Write(hello)
	if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
		t.Fatal(err)
	}
	flows := d.flows.Len()
	c.CloseWrite()
	io.Copy(io.Discard, c)
	eventually(t, "the flow is over", func() bool { return d.flows.Len() == 0 })
	if n := crossings.Load(); n != 2 || flows != 1 || d.slowPaths.Load() != 0 {
		t.Errorf("%d crossings before the relay has it, %d flows, %d slow paths; want 2, 1, 0", n, flows,
			d.slowPaths.Load())
	}
}

// TestExpressSlowTarget: a target that doesn't take the connection soon is tried again the long way, and gets all.
func TestExpressSlowTarget(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ln := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if err := unix.Bind(fd, ln); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	target := tcpsock.Local(fd)
	var fill []net.Conn                                     // the queue takes one more than its length
	for wait := patience; ; wait = 200 * time.Millisecond { // the first finds a place, however slow we are
		c, err := net.DialTimeout("tcp", target.String(), wait)
		if err != nil {
			break
		}
		fill = append(fill, c)
	}
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: sni, default: { forward: "127.0.0.1:%d" } } ]`, addr, target.Port()))
	hello := helloFor(t, "a.test")
	conn := dialTCP(t, addr)
	conn.Write(hello)
	time.Sleep(fastDial + 200*time.Millisecond)
	for range fill {
		c, _, err := unix.Accept(fd)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(c)
	}
	for _, c := range fill {
		c.Close()
	}
	accepted, _, err := unix.Accept(fd)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(accepted)
	unix.SetsockoptTimeval(accepted, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)})
	got := make([]byte, len(hello))
	for n := 0; n < len(got); {
		m, err := unix.Read(accepted, got[n:])
		if err != nil || m == 0 {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		n += m
	}
	if !bytes.Equal(got, hello) {
		t.Error("the target gets another hello than was sent")
	}
}
