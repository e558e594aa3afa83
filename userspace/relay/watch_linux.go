package relay

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const haveWatches = true

// A watcher looks out on the sockets that nobody reads from. It is an epoll of our own because Go's poller
// would need a goroutine for each, and would wake it for each message.
type watcher struct {
	mu sync.Mutex
	// +checklocks:mu
	epoll *os.File // and its descriptor
	// +checklocks:mu
	fd int
	// +checklocks:mu
	last uint64 // id of a side
	// +checklocks:mu
	sides map[uint64]*side
}

const (
	onReset = unix.EPOLLET // errors are always reported, and with this nothing else
	onBytes = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT
)

// watchForReset makes a reset of s break its flow: its stream has ended, or the pump that reads it is held
// up.
func watchForReset(s *side) { s.flow.relay.watches.watch(s, onReset) }

// watchForBytes makes the next byte of s, or the end of its stream, or a reset call unpark.
func watchForBytes(s *side) bool { return s.flow.relay.watches.watch(s, onBytes) }

func (w *watcher) watch(s *side, events uint32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.watched == events && events == onReset {
		return true
	}
	if s.sock == nil || !w.start() {
		return false
	}
	op, id := unix.EPOLL_CTL_MOD, s.watch
	if id == 0 {
		w.last++
		op, id = unix.EPOLL_CTL_ADD, w.last
		w.sides[id] = s // before there can be an event
	}
	var err error
	epoll, ev := w.fd, unix.EpollEvent{Events: events, Fd: int32(id), Pad: int32(id >> 32)}
	cerr := s.sock.Control(func(fd uintptr) { err = unix.EpollCtl(epoll, op, int(fd), &ev) })
	if cerr != nil || err != nil {
		if s.watch == 0 {
			delete(w.sides, id)
		}
		return false
	}
	s.watch, s.watched = id, events
	return true
}

// unwatch is to be called before s is closed. A socket with another descriptor would stay in the epoll, and
// could not be added again under the number of this one.
func unwatch(s *side) {
	w := &s.flow.relay.watches
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.watch == 0 {
		return
	}
	epoll := w.fd
	s.sock.Control(func(fd uintptr) { unix.EpollCtl(epoll, unix.EPOLL_CTL_DEL, int(fd), nil) })
	delete(w.sides, s.watch)
	s.watch, s.watched = 0, 0
}

// start opens the epoll when it's needed first.
//
// +checklocks:w.mu
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
	go w.run(w.epoll)
	return true
}

// close ends run.
func (w *watcher) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.epoll != nil {
		w.epoll.Close()
	}
}

func (w *watcher) run(epoll *os.File) {
	raw, err := epoll.SyscallConn()
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
	if s == nil || s.flow.unpark(s) || events&unix.EPOLLERR == 0 {
		return // closed meanwhile; or a new pump finds out; or both streams have ended, and that was all
	}
	go s.flow.faulty(s) // which may wait for the other side
}
