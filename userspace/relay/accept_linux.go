package relay

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// acceptPause is how long an Acceptor that can't accept, for lack of whatever, keeps off the CPU.
const acceptPause = 10 * time.Millisecond

// An Acceptor takes connections from a listening socket on the loops of this package: that wakes no
// goroutine, and the loop that has accepted a connection goes on with it. One event accepts one connection;
// while more wait, their events come among those of the flows.
type Acceptor struct {
	fd    int
	taken func(s *Socket, peer unix.Sockaddr)
	fail  func(err error) (goOn bool)

	// accepting is read-held while a loop accepts, and held while fail is called besides. It guards what
	// follows.
	accepting sync.RWMutex
	ids       map[*loop]uint64
	stopped   bool
}

// NewAcceptor makes an Acceptor of fd, a non-blocking socket that listens, and that the caller closes after
// [Acceptor.Stop]. taken is given each connection, and fail each error of accept4(2), which may be that of a
// peer that is gone; when it returns false, nothing is accepted for 10 ms. Both are called on the loops, also
// at the same time, and must not block. It is nil when there is no loop for lack of descriptors.
func NewAcceptor(fd int, taken func(s *Socket, peer unix.Sockaddr),
	fail func(err error) (goOn bool)) *Acceptor {
	if pickLoop() == nil {
		return nil
	}
	return &Acceptor{fd: fd, taken: taken, fail: fail, ids: make(map[*loop]uint64)}
}

// Start begins to accept.
func (a *Acceptor) Start() {
	a.accepting.Lock()
	defer a.accepting.Unlock()
	if a.stopped || len(a.ids) > 0 { // two loops may have paused at the same time
		return
	}
	if err := a.watch(); err != nil {
		a.fail(err)
		a.unwatch()
		time.AfterFunc(acceptPause, a.Start)
	}
}

// watch lets one loop know of each connection. EPOLLEXCLUSIVE, which wakes one and not all, is in Linux 4.5:
// see epoll_ctl(2). It is called with a.accepting held.
func (a *Acceptor) watch() error {
	for _, l := range allLoops() {
		l.mu.Lock()
		l.last++
		id := l.last
		l.acceptors[id] = a
		l.mu.Unlock()
		a.ids[l] = id
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(id), Pad: int32(id >> 32)}
		if err := unix.EpollCtl(l.fd, unix.EPOLL_CTL_ADD, a.fd, &ev); err != nil {
			return os.NewSyscallError("epoll_ctl", err)
		}
	}
	return nil
}

// unwatch is called with a.accepting held.
func (a *Acceptor) unwatch() {
	for l, id := range a.ids {
		unix.EpollCtl(l.fd, unix.EPOLL_CTL_DEL, a.fd, &unix.EpollEvent{})
		l.mu.Lock()
		delete(l.acceptors, id)
		l.mu.Unlock()
	}
	clear(a.ids)
}

// Stop ends it. When it returns neither taken nor fail runs, or will.
func (a *Acceptor) Stop() {
	a.accepting.Lock()
	defer a.accepting.Unlock()
	a.stopped = true
	a.unwatch()
}

// event accepts what waits, on l.
func (a *Acceptor) event(l *loop) {
	if !a.acceptOne(l) {
		a.pause()
	}
}

func (a *Acceptor) pause() {
	a.accepting.Lock()
	a.unwatch()
	a.accepting.Unlock()
	time.AfterFunc(acceptPause, a.Start)
}

func (a *Acceptor) acceptOne(l *loop) (goOn bool) {
	a.accepting.RLock()
	defer a.accepting.RUnlock()
	if a.stopped {
		return true
	}
	var peer unix.Sockaddr
	fd, err := noEINTR(func() (fd int, err error) {
		fd, peer, err = unix.Accept4(a.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		return fd, err
	})
	switch err {
	case nil:
		a.taken(&Socket{fd: fd, loop: l.orIdler()}, peer)
		return true
	case unix.EAGAIN: // another loop was quicker, or the peer is gone
		return true
	}
	return a.fail(os.NewSyscallError("accept4", err))
}
