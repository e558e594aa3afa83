package dial

import (
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// An Attempt is one attempt to connect to an address.
type Attempt struct {
	FD        int  // its socket, which is non-blocking and which the caller owns
	Connected bool // there is nothing to wait for, which is usual on this host

	to       netip.AddrPort
	target   string
	outcomes *Outcomes
	began    time.Time
}

// Begin begins to connect to an address, for callers with a poller of their own. If it is not connected at
// once, the caller waits until its socket is writable and calls [Attempt.Check]. There is no timeout but
// TCP's own: where an attempt fails, [Dialer.Dial] tries again and explains. A socket that has connected to
// itself is reset, and the error is [ErrSelf]. An attempt that succeeds is noted in outcomes as one for
// target.
func Begin(to netip.AddrPort, target string, outcomes *Outcomes) (*Attempt, error) {
	a := &Attempt{to: to, target: target, outcomes: outcomes, began: time.Now()}
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	var err error
	a.FD, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	tcpsock.SetOptions(a.FD)
	if err = unix.Connect(a.FD, tcpsock.Sockaddr(to)); err != nil && err != unix.EINPROGRESS {
		unix.Close(a.FD)
		return nil, os.NewSyscallError("connect", err)
	}
	if to.Addr().IsLoopback() { // it is made, or refused, already
		if a.Connected, err = a.Check(); err != nil {
			unix.Close(a.FD)
			return nil, err
		}
	}
	return a, nil
}

// Check reports how far the attempt is; err says that it has failed. It is called until one of them is set.
func (a *Attempt) Check() (connected bool, err error) {
	switch err := unix.Connect(a.FD, tcpsock.Sockaddr(a.to)); err { // which says how the first one went
	case nil, unix.EISCONN:
		if isSelf(a.FD, a.to) {
			// A close would leave the port in TIME_WAIT, or in FIN_WAIT for as long as the caller takes.
			tcpsock.ResetFDOnClose(a.FD)
			return false, ErrSelf
		}
		if a.outcomes.Took != nil {
			a.outcomes.Took(time.Since(a.began).Seconds())
		}
		a.outcomes.Made(a.target)
		return true, nil
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
		return false, nil
	default:
		return false, os.NewSyscallError("connect", err)
	}
}

// isSelf reports whether fd, which is connected to an address, has the same address itself.
func isSelf(fd int, to netip.AddrPort) bool {
	own := tcpsock.Local(fd)
	// The other end is not to where that is the unspecified address.
	return own.IsValid() && own.Port() == to.Port() && own == tcpsock.Remote(fd)
}
