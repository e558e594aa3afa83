package front

import (
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// A door is a bound address. It is not in Go's poller: connections are accepted by package relay's loops.
type door struct {
	fd       int
	addr     net.Addr
	acceptor *relay.Acceptor // nil before accept
}

// newDoor makes a door of ln, which is closed then.
func newDoor(ln *net.TCPListener) (*door, error) {
	defer ln.Close()
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &door{fd: -1, addr: ln.Addr()}
	cerr := raw.Control(func(fd uintptr) { d.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if cerr != nil {
		return nil, cerr
	}
	return d, os.NewSyscallError("fcntl", err)
}

// prepare makes accept possible.
func (d *door) prepare(f *Front, s *socket) error {
	d.acceptor = relay.NewAcceptor(d.fd, func(c *relay.Socket, peer unix.Sockaddr) {
		f.spare.refill()
		f.admit(s.owner.Load(), c, sockaddrPort(peer))
	}, func(err error) (goOn bool) { return f.failed(s, err) })
	if d.acceptor == nil {
		return os.NewSyscallError("epoll_create1", unix.EMFILE)
	}
	return nil
}

// accept begins to admit connections.
func (d *door) accept() { d.acceptor.Start() }

// Close ends that, and waits until nobody is being admitted.
func (d *door) Close() {
	if d.acceptor != nil {
		d.acceptor.Stop()
	}
	unix.Close(d.fd)
}

// refuseOne resets the connection that waits.
func (d *door) refuseOne() error {
	fd, _, err := unix.Accept4(d.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	return unix.Close(fd)
}

func (d *door) sharePort(on bool) error { return sharePort(uintptr(d.fd), on) }

func sockaddrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(a.Addr).Unmap()
		if a.ZoneId != 0 {
			if i, err := net.InterfaceByIndex(int(a.ZoneId)); err == nil {
				addr = addr.WithZone(i.Name)
			}
		}
		return netip.AddrPortFrom(addr, uint16(a.Port))
	}
	return netip.AddrPort{}
}
