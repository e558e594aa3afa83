package server

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// accepted is a connection that nobody reads from yet.
type accepted = *loop.Socket

// acceptor is a socket which is not in Go's poller: connections are accepted by the loops.
type acceptor struct {
	fd        int
	loop      *loop.Acceptor // nil before prepare
	stopped   bool
	admitting sync.WaitGroup // what admits connections off the loops
	arrivals  arrivals       // that it has to look at
	taken     atomic.Int64   // connections that were accepted, or could not be for lack of resources
}

// newListenerSocket makes one of ln, which is closed then.
func newListenerSocket(written string, ln *net.TCPListener) (*listenerSocket, error) {
	defer ln.Close()
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err := tcpsock.Dup(raw)
	s := &listenerSocket{written: written, addr: ln.Addr()}
	s.fd = fd
	return s, err
}

// prepare makes accept possible.
func (s *listenerSocket) prepare(srv *Server) {
	s.stopped = false
	s.loop = srv.opts.Loops.NewAcceptor(s.fd, func(c *loop.Socket, peer unix.Sockaddr) loop.Wait {
		s.taken.Add(1)
		srv.spare.refill()
		if s.onTailnet.Load() {
			return srv.admitTailnet(s, c, tcpsock.AddrPort(peer))
		}
		return srv.admit(s.owner.Load(), c, tcpsock.AddrPort(peer))
	}, func(err error) (goOn bool) {
		if outOfResources(err) {
			s.taken.Add(1) // it is no hang, which a restart would mend
		}
		return srv.failed(s, err)
	})
}

// admitTailnet admits what came to an address of the tailnet by the interface that has it, or from this host.
// The kernel takes connections to it on every interface, so that neighbours in the LAN could come who route
// to it through this host. tailscaled makes the interface anew as it likes, so who comes by another one than
// before is looked at, off the loop, by one goroutine for all who come meanwhile.
func (srv *Server) admitTailnet(s *listenerSocket, c *loop.Socket, peer netip.AddrPort) (first loop.Wait) {
	local := tcpsock.AddrPortOf(s.addr).Addr()
	index, err := arrivedOn(c.FD(), local)
	if err == nil && (index == loopbackIndex || int64(index) == s.via.Load()) {
		return srv.admit(s.owner.Load(), c, peer)
	}
	if s.arrivals.add(arrival{c, peer, index, err}) {
		s.admitting.Go(func() { srv.lookAtArrivals(s, local) })
	}
	return first
}

// An arrival is a connection to an address of the tailnet of which it is not known whether it came by the
// tailnet.
type arrival struct {
	c     *loop.Socket
	peer  netip.AddrPort
	index int   // the interface's
	err   error // why that is not known
}

// arrivals wait for a goroutine that looks at interfaces.
type arrivals struct {
	mu sync.Mutex
	// +checklocks:mu
	waiting []arrival
	// +checklocks:mu
	isLookedAt bool // by a goroutine, which comes back for more
}

// add has one more wait. isFirst: a goroutine has to be started that takes them.
func (a *arrivals) add(one arrival) (isFirst bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = append(a.waiting, one)
	isFirst, a.isLookedAt = !a.isLookedAt, true
	return isFirst
}

// take gives all that wait. Where none do, whoever has called it is to end.
func (a *arrivals) take() (all []arrival) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, a.waiting = a.waiting, nil
	a.isLookedAt = len(all) > 0
	return all
}

// lookAtArrivals admits who came to local by the interface that has it, and refuses the others. Each
// interface is looked at once for all who have come by it in the meantime.
func (srv *Server) lookAtArrivals(s *listenerSocket, local netip.Addr) {
	type seen struct {
		name string
		ok   bool
	}
	for all := s.arrivals.take(); len(all) > 0; all = s.arrivals.take() {
		interfaces := make(map[int]seen)
		for _, a := range all {
			by, ok := interfaces[a.index]
			if !ok {
				by.name, by.ok = has(a.index, local)
				interfaces[a.index] = by
			}
			if by.ok {
				s.via.Store(int64(a.index))
				a.c.AwaitFirst(srv.admit(s.owner.Load(), a.c, a.peer))
				continue
			}
			a.c.Reset()
			l := s.owner.Load().name
			srv.metrics.Accepted.WithLabelValues(l).Inc()
			srv.noteRefused(l, notByTailnet,
				"connection refused: it came to a tailnet address, and not by the tailnet",
				"listener", l, "reason", notByTailnet, "peer", a.peer, "interface", by.name,
				"address", s.written, "err", a.err)
		}
	}
}

// accept begins to admit connections.
func (s *listenerSocket) accept() { s.loop.Start() }

// stop ends that until prepare and accept are called again, and waits until nobody is being admitted.
func (s *listenerSocket) stop() {
	s.loop.Stop()
	s.admitting.Wait()
	s.stopped = true
}

// isStopped says whether stop was called last.
func (s *listenerSocket) isStopped() bool { return s.stopped }

// listens says whether nobody has ended the socket.
func (s *listenerSocket) listens() bool {
	on, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && on == 1
}

// copy returns a copy of the socket.
func (s *listenerSocket) copy() (*os.File, error) {
	fd, err := tcpsock.DupFD(s.fd)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), s.written), nil
}

// Close closes the socket, and waits until nobody is being admitted.
func (s *listenerSocket) Close() {
	if s.loop != nil {
		s.stop()
	}
	unix.Close(s.fd)
}

// end is Close for all processes that have the socket: nobody can connect any more, whoever keeps a copy.
func (s *listenerSocket) end() {
	if s.loop != nil {
		s.loop.Stop()
	}
	unix.Shutdown(s.fd, unix.SHUT_RDWR)
	unix.Close(s.fd)
}

// queue says how many connections were accepted, or tried to be, and whether one waits.
func (s *listenerSocket) queue() (taken int64, waits bool) {
	var i unix.TCPInfo
	err := tcpsock.Info(s.fd, &i)
	// of a socket that listens it is the length of its queue
	return s.taken.Load(), err == nil && i.Unacked > 0
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

// loopback is the index of lo, in every network namespace.
const loopbackIndex = 1

// arrivedOn says by which interface the connection of a socket came. The kernel keeps that since Linux 2.6:
// see IP_PKTOPTIONS in ip_sockglue.c, and RFC 2292 section 6.
func arrivedOn(fd int, local netip.Addr) (index int, err error) {
	level, want, get, kind := unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, unix.IPV6_2292PKTOPTIONS, unix.IPV6_PKTINFO
	if local.Is4() {
		level, want, get, kind = unix.IPPROTO_IP, unix.IP_PKTINFO, unix.IP_PKTOPTIONS, unix.IP_PKTINFO
	}
	if err := unix.SetsockoptInt(fd, level, want, 1); err != nil {
		return 0, os.NewSyscallError("setsockopt", err)
	}
	defer unix.SetsockoptInt(fd, level, want, 0) // else each segment of IPv6 is copied for it
	var buf [256]byte
	n := uint32(len(buf))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(get), uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return 0, os.NewSyscallError("getsockopt", errno)
	}
	messages, err := unix.ParseSocketControlMessage(buf[:n])
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		switch {
		case int(m.Header.Level) != level || int(m.Header.Type) != kind:
		case local.Is4() && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return int(binary.NativeEndian.Uint32(m.Data)), nil
		case !local.Is4() && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return int(binary.NativeEndian.Uint32(m.Data[16:])), nil
		}
	}
	return 0, unix.ENOENT
}

// has says whether an interface has an address, and how it is called.
func has(index int, a netip.Addr) (name string, ok bool) {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return "", false
	}
	addrs, err := i.Addrs()
	if err != nil {
		return i.Name, false
	}
	for _, n := range addrs {
		if p, err := netip.ParsePrefix(n.String()); err == nil && p.Addr() == a {
			return i.Name, true
		}
	}
	return i.Name, false
}

// cameByTailnet says whether c came by the interface that has its local address, or from this host.
func cameByTailnet(c *net.TCPConn) (ok bool) {
	local := tcpsock.AddrPortOf(c.LocalAddr()).Addr()
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		index, err := arrivedOn(int(fd), local)
		if err == nil && index != loopbackIndex {
			_, ok = has(index, local)
			return
		}
		ok = err == nil
	})
	return ok && err == nil
}
