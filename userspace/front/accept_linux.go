package front

import (
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// accepted is a connection that nobody reads from yet.
type accepted = *loop.Socket

// acceptor is a socket which is not in Go's poller: connections are accepted by the loops.
type acceptor struct {
	fd   int
	loop *loop.Acceptor // nil before prepare
}

// newListenerSocket makes one of ln, which is closed then.
func newListenerSocket(written string, ln *net.TCPListener) (*listenerSocket, error) {
	defer ln.Close()
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err := tcpsock.Dup(raw)
	return &listenerSocket{written: written, addr: ln.Addr(), acceptor: acceptor{fd: fd}}, err
}

// prepare makes accept possible.
func (s *listenerSocket) prepare(f *Front) error {
	s.loop = f.opts.Loops.NewAcceptor(s.fd, func(c *loop.Socket, peer unix.Sockaddr) {
		f.spare.refill()
		if s.tailnet.Load() {
			f.admitTailnet(s, c, tcpsock.AddrPort(peer))
			return
		}
		f.admit(s.owner.Load(), c, tcpsock.AddrPort(peer))
	}, func(err error) (goOn bool) { return f.failed(s, err) })
	return nil
}

// admitTailnet admits what came to an address of the tailnet by the interface that has it, or from this host.
// The kernel takes connections to it on every interface, so that neighbours in the LAN could come who route
// to it through this host. tailscaled makes the interface anew as it likes, so who comes by another one than
// before is looked at, off the loop.
func (f *Front) admitTailnet(s *listenerSocket, c *loop.Socket, peer netip.AddrPort) {
	local := addrPort(s.addr).Addr()
	index, err := arrivedOn(c.FD(), local)
	if err == nil && (index == loopbackIndex || int64(index) == s.via.Load()) {
		f.admit(s.owner.Load(), c, peer)
		return
	}
	go func() {
		name, ok := has(index, local)
		if ok {
			s.via.Store(int64(index))
			f.admit(s.owner.Load(), c, peer)
			return
		}
		c.Reset()
		l := s.owner.Load().name
		f.metrics.Accepted.WithLabelValues(l).Inc()
		f.metrics.Refused.WithLabelValues(l, notByTailnet).Inc()
		f.limited.Warn(notByTailnet, "connection refused: it came to a tailnet address, and not by the tailnet", "listener", l,
			"reason", notByTailnet, "peer", peer, "interface", name, "address", s.written, "err", err)
	}()
}

// notByTailnet is the metric's word for a connection that came to a tailnet listener by another network.
const notByTailnet = "not_by_tailnet"

// accept begins to admit connections.
func (s *listenerSocket) accept() { s.loop.Start() }

// Close ends that, and waits until nobody is being admitted.
func (s *listenerSocket) Close() {
	if s.loop != nil {
		s.loop.Stop()
	}
	unix.Close(s.fd)
}

// refuseOne resets the connection that waits.
func (s *listenerSocket) refuseOne() error {
	fd, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	return tcpsock.Reset(fd)
}

func (s *listenerSocket) sharePort(on bool) error { return sharePort(uintptr(s.fd), on) }
