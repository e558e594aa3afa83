package loop

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// acceptPause is how long an Acceptor that can't accept, for lack of whatever, keeps off the CPU.
const acceptPause = 10 * time.Millisecond

// An Acceptor takes connections from a listening socket on the loops: that wakes no goroutine, and the loop
// that has accepted a connection goes on with it. One event accepts one connection; while more wait, their
// events come among those of the other sockets.
type Acceptor struct {
	reactor *Reactor
	fd      int
	taken   func(s *Socket, peer unix.Sockaddr) Wait
	fail    func(err error) (goOn bool)

	// accepting is read-held while a loop accepts, which includes the calls of taken and fail, and held while
	// the Acceptor starts, pauses or stops.
	accepting sync.RWMutex
	// +checklocks:accepting
	sockets []*Socket // fd on each loop, while it accepts
	// +checklocks:accepting
	isStopped bool
}

// NewAcceptor makes an Acceptor of fd, a non-blocking socket that listens, and that the caller closes after
// [Acceptor.Stop]. taken is given each connection, which it owns from then on. Where it returns a Wait that
// has Ready, the connection waits so for its first bytes; if it can't, Ready is called at once. fail is given
// each error of accept4(2), which may be that of a peer that is gone; when it returns false, nothing is
// accepted for 10 ms. Both are called on the loops, also at the same time, and must not block.
func (r *Reactor) NewAcceptor(fd int, taken func(s *Socket, peer unix.Sockaddr) Wait,
	fail func(err error) (goOn bool)) *Acceptor {
	return &Acceptor{reactor: r, fd: fd, taken: taken, fail: fail}
}

// Start begins to accept.
func (a *Acceptor) Start() {
	a.accepting.Lock()
	defer a.accepting.Unlock()
	if a.isStopped || len(a.sockets) > 0 { // two loops may have paused at the same time
		return
	}
	if err := a.watch(); err != nil {
		a.fail(err)
		a.unwatch()
		time.AfterFunc(acceptPause, a.Start)
	}
}

// watch has each connection wake one loop, and not all: EPOLLEXCLUSIVE is in Linux since 4.5, see
// epoll_ctl(2).
//
// +checklocks:a.accepting
func (a *Acceptor) watch() (err error) {
	for _, l := range a.reactor.loops {
		s := l.NewSocket(a.fd)
		a.sockets = append(a.sockets, s)
		l.Do(func() func() {
			err = l.watch(s, unix.EPOLLIN|unix.EPOLLEXCLUSIVE)
			s.handler = acceptHandler(func() {
				if !a.acceptOne(l) {
					a.pause()
				}
			})
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// +checklocks:a.accepting
func (a *Acceptor) unwatch() {
	for _, s := range a.sockets {
		s.loop.Do(func() func() {
			s.Detach()
			return nil
		})
	}
	a.sockets = nil
}

// Stop ends accepting. When it returns neither taken nor fail runs, or will.
func (a *Acceptor) Stop() {
	a.accepting.Lock()
	defer a.accepting.Unlock()
	a.isStopped = true
	a.unwatch()
}

// An acceptHandler has an Acceptor accept what waits, on one loop.
type acceptHandler func()

func (h acceptHandler) Handle(uint32) (then func()) { return h }

// pause accepts nothing for acceptPause.
func (a *Acceptor) pause() {
	a.accepting.Lock()
	a.unwatch()
	a.accepting.Unlock()
	time.AfterFunc(acceptPause, a.Start)
}

// acceptOne accepts one connection on l, if any waits. goOn is false where the Acceptor is to pause.
func (a *Acceptor) acceptOne(l *Loop) (goOn bool) {
	a.accepting.RLock()
	defer a.accepting.RUnlock()
	if a.isStopped {
		return true
	}
	fd, peer, err := unix.Accept4(a.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch err {
	case nil:
		s := l.orIdler().NewSocket(fd)
		s.AwaitFirst(a.taken(s, peer))
		return true
	case unix.EAGAIN, unix.EINTR:
		// another loop was quicker, or the peer is gone; an event comes while one waits
		return true
	}
	return a.fail(os.NewSyscallError("accept4", err))
}
