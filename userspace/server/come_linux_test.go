package server

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// socketTo is an address where connections arrive at a listener of f once it accepts, from whom peer says, by
// the slow path or by the one that is for them. admitted is called behind each.
func socketTo(t *testing.T, f *Server, name string, slow bool, peer func() netip.AddrPort, admitted func()) *listenerSocket {
	t.Helper()
	return socketFor(t, f, name, func(l *listener, s *loop.Socket) (first loop.Wait) {
		defer admitted()
		if !slow {
			return f.admit(l, s, peer())
		}
		if in := f.takeIn(l, s, peer()); in != nil {
			go f.slowPath(in, s, nil)
		}
		return first
	})
}

// socketFor is an address where connections arrive once it accepts, for what taken does with them, which is
// given a listener of f.
func socketFor(t *testing.T, f *Server, name string, taken func(l *listener, s *loop.Socket) loop.Wait) *listenerSocket {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d, err := newListenerSocket("", ln.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	l := f.listeners[name]
	f.mu.Unlock()
	d.loop = f.opts.Loops.NewAcceptor(d.fd, func(s *loop.Socket, _ unix.Sockaddr) loop.Wait { return taken(l, s) },
		func(error) bool { return true })
	return d
}

// come connects to a listener of d as somebody from peer would, and returns the peer's end.
func (d *daemon) come(t *testing.T, listener, peer string) *net.TCPConn {
	t.Helper()
	return d.comeBy(t, listener, peer, false)
}

func (d *daemon) comeBy(t *testing.T, listener, peer string, slow bool) *net.TCPConn {
	t.Helper()
	admitted := make(chan struct{}, 1)
	at := socketTo(t, d.Server, listener, slow, func() netip.AddrPort { return netip.MustParseAddrPort(peer) },
		func() { admitted <- struct{}{} })
	defer at.Close()
	c := dialTCP(t, at.addr.String()) // before it may be reset
	at.accept()
	<-admitted
	return c
}
