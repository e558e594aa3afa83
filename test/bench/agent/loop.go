package agent

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

// A loop is one thread and its flows. Everything in it but do and the atomics belongs to its thread.
type loop struct {
	epoll, wakeup int
	buf           [stream.Chunk]byte
	flows         []*flow       // by file descriptor
	onEvent       func(f *flow) // after each event of a flow
	onClosed      func(f *flow) // after a flow has ended, or broken
	accept        func(fd int)  // the listening socket is readable
	listener      int           // its file descriptor, or -1

	mu    sync.Mutex
	tasks []func()
	ended atomic.Bool
}

func newLoop() (*loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	l := &loop{epoll: ep, wakeup: wake, listener: -1, onEvent: func(*flow) {}, onClosed: func(*flow) {}}
	if err := l.watch(wake, unix.EPOLLIN, unix.EPOLL_CTL_ADD); err != nil {
		return nil, err
	}
	go l.run()
	return l, nil
}

func (l *loop) watch(fd int, events uint32, op int) error {
	err := unix.EpollCtl(l.epoll, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
	if err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// do runs f on the loop's thread, and waits for it.
func (l *loop) do(f func()) {
	done := make(chan struct{})
	l.mu.Lock()
	l.tasks = append(l.tasks, func() { f(); close(done) })
	l.mu.Unlock()
	unix.Write(l.wakeup, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-done
}

func (l *loop) run() {
	runtime.LockOSThread()
	events := make([]unix.EpollEvent, 256)
	for !l.ended.Load() {
		n, err := unix.EpollWait(l.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			panic(fmt.Sprintf("epoll_wait: %v", err))
		}
		for i := range max(n, 0) {
			ev := &events[i]
			switch fd := int(ev.Fd); fd {
			case l.wakeup:
				var b [8]byte
				unix.Read(fd, b[:])
				l.mu.Lock()
				tasks := l.tasks
				l.tasks = nil
				l.mu.Unlock()
				for _, t := range tasks {
					t()
				}
			case l.listener:
				l.accept(fd)
			default:
				if f := l.at(fd); f != nil {
					l.event(f, ev.Events)
				}
			}
		}
	}
}

func (l *loop) at(fd int) *flow {
	if fd < len(l.flows) {
		return l.flows[fd]
	}
	return nil
}

// add puts a flow, whose socket is non-blocking, into the loop.
func (l *loop) add(f *flow, events uint32) error {
	for f.fd >= len(l.flows) {
		l.flows = append(l.flows, make([]*flow, 1024)...)
	}
	f.loop, f.events = l, events
	if err := l.watch(f.fd, events, unix.EPOLL_CTL_ADD); err != nil {
		return err
	}
	l.flows[f.fd] = f
	return nil
}

// close closes the flow's socket; reset makes the other end see it as a reset.
func (l *loop) close(f *flow, reset bool) {
	if f.closed {
		return
	}
	f.closed = true
	if reset {
		unix.SetsockoptLinger(f.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	unix.Close(f.fd)
	l.flows[f.fd] = nil
	l.onClosed(f)
}

func (l *loop) event(f *flow, events uint32) {
	if !f.connected && events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if errno, err := unix.GetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
			f.fail(fmt.Errorf("connect: %w", unix.Errno(errno)))
			return
		}
		f.connected = true
	}
	if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) != 0 && !f.paused && !f.eof {
		f.receive(l.buf[:])
	} else if events&unix.EPOLLERR != 0 {
		f.fail(errors.New("reset while it waited"))
	}
	f.send()
	if !f.closed {
		l.onEvent(f)
	}
}

// now is a monotonic time in ns.
func now() int64 { return int64(time.Since(epoch)) }

var epoch = time.Now()
