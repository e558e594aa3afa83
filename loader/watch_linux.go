package loader

import (
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// quiet is what a spliced socket is watched for: its end, and what epoll always tells (errors). Not for
// bytes: each message would wake us though none is for us.
const quiet = unix.EPOLLRDHUP | unix.EPOLLET

// watcher is one epoll for many spliced sockets. Its descriptor is in Go's poller, so waiting takes no thread.
type watcher struct {
	epoll *os.File
	fd    int
	busy  atomic.Bool // with events that it has taken
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create an epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that os.NewFile gives it to Go's poller
		_ = unix.Close(fd)
		return nil, fmt.Errorf("prepare an epoll: %w", err)
	}
	return &watcher{epoll: os.NewFile(uintptr(fd), "tailsplice epoll"), fd: fd}, nil
}

// run calls event for everything that happens, until close. half is the half that the socket is the source of.
func (w *watcher) run(event func(half, generation, events uint32)) {
	raw, err := w.epoll.SyscallConn()
	if err != nil {
		return
	}
	list := make([]unix.EpollEvent, 128)
	_ = raw.Read(func(fd uintptr) bool {
		for {
			w.busy.Store(true)
			n, err := unix.EpollWait(int(fd), list, 0)
			if err == unix.EINTR {
				continue
			}
			for _, e := range list[:max(n, 0)] {
				event(uint32(e.Fd), uint32(e.Pad), e.Events)
			}
			if n < len(list) {
				w.busy.Store(false)
				return false // wait in Go's poller
			}
		}
	})
}

func (w *watcher) add(s socket, half, generation uint32) error {
	e := unix.EpollEvent{Events: quiet, Fd: int32(half), Pad: int32(generation)}
	return unix.EpollCtl(w.fd, unix.EPOLL_CTL_ADD, int(s), &e)
}

// change sets what is watched besides quiet. What is already so is told at once.
func (w *watcher) change(s socket, half, generation, also uint32) {
	e := unix.EpollEvent{Events: quiet | also, Fd: int32(half), Pad: int32(generation)}
	_ = unix.EpollCtl(w.fd, unix.EPOLL_CTL_MOD, int(s), &e)
}

// behind: there are events that run has not told of yet, since the machine is busy.
func (w *watcher) behind() bool {
	if w.busy.Load() {
		return true
	}
	p := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return n > 0 && err == nil
}

func (w *watcher) remove(s socket) { _ = unix.EpollCtl(w.fd, unix.EPOLL_CTL_DEL, int(s), nil) }

func (w *watcher) close() error { return w.epoll.Close() }

func (f *flow) watcher() *watcher { return f.l.watchers[int(f.slot)%len(f.l.watchers)] }

// event is what a watcher tells.
func (l *Loader) event(half, generation, events uint32) {
	if int(half/2) >= len(l.live) {
		return
	}
	f := l.live[half/2].Load()
	if f == nil || f.generation != generation {
		return
	}
	side := half & 1
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 && l.rules.reset {
		f.look(side)
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 {
		f.halves[side].wake(ended)
	}
	if !l.rules.events {
		return
	}
	if events&unix.EPOLLIN != 0 {
		f.halves[side].wake(0)
	}
	if events&unix.EPOLLOUT != 0 {
		f.halves[1-side].wake(0)
	}
}
