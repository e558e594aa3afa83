package dial

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// Begin begins to connect a non-blocking socket to an address, for callers with a poller of their own; the
// caller owns fd. Where connected, as is usual on this host, there is nothing to wait for. Else the caller
// waits until fd is writable and calls [Connected]. There is one attempt, and no timeout but TCP's own: where
// it fails, [Dialer.Dial] tries again and explains. A socket connected to itself is reset: [ErrSelf].
func Begin(to netip.AddrPort) (fd int, connected bool, err error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, false, os.NewSyscallError("socket", err)
	}
	tcpsock.SetOptions(fd)
	if err = unix.Connect(fd, tcpsock.Sockaddr(to)); err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return -1, false, os.NewSyscallError("connect", err)
	}
	if to.Addr().IsLoopback() { // it is made, or refused, already
		if connected, err = Connected(fd, to); err != nil {
			unix.Close(fd)
			return -1, false, err
		}
	}
	return fd, connected, nil
}

// Connected reports how far a socket of [Begin] is; err says that the attempt has failed.
func Connected(fd int, to netip.AddrPort) (connected bool, err error) {
	switch err := unix.Connect(fd, tcpsock.Sockaddr(to)); err { // which says how the first one went
	case nil, unix.EISCONN:
		if isSelf(fd, to) {
			// A close would leave the port in TIME_WAIT, or in FIN_WAIT for as long as the caller takes.
			tcpsock.ResetFDOnClose(fd)
			return false, ErrSelf
		}
		return true, nil
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
		return false, nil
	default:
		return false, os.NewSyscallError("connect", err)
	}
}

// isSelf: fd, connected to an address, has that for its own, too.
func isSelf(fd int, to netip.AddrPort) bool {
	own := tcpsock.Local(fd)
	// The other end is not to where that is the unspecified address.
	return own.IsValid() && own.Port() == to.Port() && own == tcpsock.Remote(fd)
}
