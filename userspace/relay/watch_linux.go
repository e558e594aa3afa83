package relay

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// watches look out for resets on sockets that nobody reads from: their stream has ended, or the
// reader is busy with a peer that takes nothing. It is an epoll of our own that asks for no event, and
// gets the errors only: bytes that come never wake it, unlike Go's poller.
var watches watcher

type watcher struct {
	mu    sync.Mutex
	epoll *os.File
	fd    int
	last  uint64
	sides map[uint64]*side
}

// watchForReset makes a reset of s break its flow, until unwatch.
func watchForReset(s *side) {
	w := &watches
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.watch != 0 || s.sock == nil || !w.start() {
		return
	}
	w.last++
	id := w.last
	s.sock.Control(func(fd uintptr) {
		ev := unix.EpollEvent{Events: unix.EPOLLET, Fd: int32(id), Pad: int32(id >> 32)}
		if unix.EpollCtl(w.fd, unix.EPOLL_CTL_ADD, int(fd), &ev) == nil {
			s.watch = id
			w.sides[id] = s
		}
	})
}

// unwatch is to be called before s is closed. Closing takes it out of the epoll.
func unwatch(s *side) {
	w := &watches
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.sides, s.watch)
	s.watch = 0
}

// start opens the epoll when it's needed first. It stays for the life of the process.
func (w *watcher) start() bool {
	if w.epoll != nil {
		return true
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return false
	}
	unix.SetNonblock(fd, true) // so that Go's poller takes it
	w.fd, w.epoll, w.sides = fd, os.NewFile(uintptr(fd), "epoll"), make(map[uint64]*side)
	go w.run()
	return true
}

func (w *watcher) run() {
	raw, err := w.epoll.SyscallConn()
	if err != nil {
		return
	}
	events := make([]unix.EpollEvent, 64)
	raw.Read(func(fd uintptr) bool {
		for {
			n, err := unix.EpollWait(int(fd), events, 0)
			if err == unix.EINTR {
				continue
			}
			for _, ev := range events[:max(n, 0)] {
				w.event(uint64(uint32(ev.Fd))|uint64(uint32(ev.Pad))<<32, ev.Events)
			}
			if n < len(events) {
				return false
			}
		}
	})
}

func (w *watcher) event(id uint64, events uint32) {
	w.mu.Lock()
	s := w.sides[id]
	w.mu.Unlock()
	if s == nil || events&unix.EPOLLERR == 0 {
		return // closed meanwhile; or a hangup without an error: both streams have ended
	}
	s.dead.Store(true) // before the error is taken from under its reader, who then sees an end of stream
	err := error(syscall.ECONNRESET)
	s.sock.Control(func(fd uintptr) {
		if errno, e := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); e == nil && errno != 0 {
			err = syscall.Errno(errno)
		}
	})
	s.flow.broken(s, &sideError{"watch", s.name(), err})
}
