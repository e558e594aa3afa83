package sockmap

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// baseEvents is what a spliced socket is watched for: its end, and what epoll always tells (errors). Not for
// bytes: each message would wake us though none is for us.
const baseEvents = unix.EPOLLRDHUP | unix.EPOLLET

// poller is one epoll for many spliced sockets. Its descriptor is in Go's poller, so waiting takes no thread.
type poller struct {
	epoll *os.File
	fd    int
	busy  atomic.Bool // with events that it has taken
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create an epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that os.NewFile gives it to Go's poller
		_ = unix.Close(fd)
		return nil, fmt.Errorf("prepare an epoll: %w", err)
	}
	return &poller{epoll: os.NewFile(uintptr(fd), "tailsplice epoll"), fd: fd}, nil
}

// run calls event for everything that happens, until close. index is that of the direction whose source the
// socket is.
func (w *poller) run(event func(index, generation, events uint32)) {
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

// control sets what a socket is watched for besides baseEvents. What is already so is told at once.
func (w *poller) control(op int, s socket, index, generation, also uint32) error {
	e := unix.EpollEvent{Events: baseEvents | also, Fd: int32(index), Pad: int32(generation)}
	return unix.EpollCtl(w.fd, op, int(s), &e)
}

// hasPending reports whether there are events that run has not told of yet, since the machine is busy.
func (w *poller) hasPending() bool {
	if w.busy.Load() {
		return true
	}
	p := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return n > 0 && err == nil
}

func (w *poller) remove(s socket) { _ = unix.EpollCtl(w.fd, unix.EPOLL_CTL_DEL, int(s), nil) }

func (w *poller) close() error { return w.epoll.Close() }

func (f *flow) poller() *poller { return f.l.pollers[int(f.slot)%len(f.l.pollers)] }

// event does what an event of a socket asks for. A poller calls it.
func (l *Engine) event(index, generation, events uint32) {
	if int(index/2) >= len(l.live) {
		return
	}
	f := l.live[index/2].Load()
	if f == nil || f.generation != generation {
		return
	}
	side := index & 1
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 && l.hooks.Keeps(ruleReset) {
		f.checkSocket(side)
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 {
		f.directions[side].wake(wakeEnded)
	}
	if !l.hooks.Keeps(ruleEvents) {
		return
	}
	if events&unix.EPOLLIN != 0 {
		f.directions[side].wake(0)
	}
	if events&unix.EPOLLOUT != 0 {
		f.directions[1-side].wake(0)
	}
}

func (l *Engine) readRing() {
	var r ringbuf.Record
	for {
		if err := l.ring.ReadInto(&r); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				l.log.Error("read the ring of events; flows are looked at once a second now", "error", err)
			}
			return
		}
		l.ringBusy.Store(true)
		l.ringEvent(r.RawSample)
		l.ringBusy.Store(false)
	}
}

func (l *Engine) ringEvent(sample []byte) {
	if len(sample) < int(unsafe.Sizeof(sockmapEvent{})) {
		return
	}
	e := *(*sockmapEvent)(unsafe.Pointer(unsafe.SliceData(sample)))
	if int(e.Half/2) >= len(l.live) {
		return
	}
	if f := l.live[e.Half/2].Load(); f != nil {
		d := &f.directions[e.Half&1]
		if sockmapEventKind(e.Kind) == sockmapEventKindEVENT_BULK {
			d.noteRate(time.Now())
		} else {
			d.wake(0)
		}
	}
}

// ringHasPending reports whether there are events in the ring that no direction was told of yet.
func (l *Engine) ringHasPending() bool { return l.ringBusy.Load() || l.ring.AvailableBytes() > 0 }
