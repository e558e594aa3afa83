package relay

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// loops relay the small messages of most flows: one goroutine each, for any number of flows. A message costs
// no switch of goroutines there, and a flow that waits is a few hundred bytes.
//
// A loop does only what is quick and needs no waiting. A flow whose reader falls behind, that has much to
// move at once, that breaks or is to be cut leaves the loop for pumps, for good (see leave).
var loops struct {
	once sync.Once
	all  []*loop
	next atomic.Uint32
}

// allLoops gives the loops, which it starts if nobody has yet. There are none where there is no descriptor for any.
func allLoops() []*loop {
	loops.once.Do(func() {
		n := runtime.GOMAXPROCS(0)
		for range n {
			if l := newLoop(); l != nil {
				loops.all = append(loops.all, l)
			}
		}
		// A loop in epoll_wait keeps its share of Go's scheduler until somebody notices, which takes up to 10
		// ms. There must be one more than loops, for all other goroutines.
		runtime.GOMAXPROCS(n + 1)
	})
	return loops.all
}

// pickLoop gives the loop that has the next flow, or nil where there is none.
func pickLoop() *loop {
	all := allLoops()
	if len(all) == 0 {
		return nil
	}
	return all[int(loops.next.Add(1))%len(all)]
}

type loop struct {
	fd  int     // of the epoll
	ask *Socket // an eventfd, for Alive: when somebody asks there may be none to be had

	count atomic.Int32 // sockets that are here

	mu        sync.Mutex // guards what follows, and the flows that are here
	last      uint64
	sockets   map[uint64]*Socket
	acceptors map[uint64]*Acceptor
	buf       [64 << 10]byte
}

func newLoop() *loop {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil
	}
	l := &loop{fd: fd, sockets: make(map[uint64]*Socket), acceptors: make(map[uint64]*Acceptor)}
	if !l.openAsk() {
		unix.Close(fd)
		return nil
	}
	go l.run()
	return l
}

// orIdler is l, which needs no switch of threads to go on, unless another loop has clearly less to do.
func (l *loop) orIdler() *loop {
	const clearly = 8 // sockets
	best := l
	for _, other := range loops.all {
		if other.count.Load() < best.count.Load()-clearly {
			best = other
		}
	}
	return best
}

func (l *loop) run() {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(l.fd, events, -1)
		if err != nil && err != unix.EINTR {
			panic("relay: epoll_wait: " + err.Error()) // the descriptor is ours alone
		}
		for _, ev := range events[:max(n, 0)] {
			l.event(uint64(uint32(ev.Fd))|uint64(uint32(ev.Pad))<<32, ev.Events)
		}
	}
}

// watch makes events of s come. It is called with l.mu held.
func (l *loop) watch(s *Socket, events uint32) error {
	op, id := unix.EPOLL_CTL_MOD, s.id
	if id == 0 {
		l.last++
		op, id = unix.EPOLL_CTL_ADD, l.last
		l.sockets[id] = s
		l.count.Add(1)
	} else if s.events&events == events {
		return nil
	}
	ev := unix.EpollEvent{Events: events, Fd: int32(id), Pad: int32(id >> 32)}
	if err := unix.EpollCtl(l.fd, op, s.fd, &ev); err != nil {
		if s.id == 0 {
			delete(l.sockets, id)
			l.count.Add(-1)
		}
		return os.NewSyscallError("epoll_ctl", err)
	}
	s.id, s.events = id, events
	return nil
}

// forget is called with l.mu held.
func (l *loop) forget(s *Socket) {
	if s.id != 0 {
		delete(l.sockets, s.id)
		l.count.Add(-1)
	}
	s.id, s.side = 0, nil
}

// remove is forget for a socket that stays open.
func (l *loop) remove(s *Socket) {
	l.forget(s)
	unix.EpollCtl(l.fd, unix.EPOLL_CTL_DEL, s.fd, &unix.EpollEvent{})
}

func (l *loop) event(id uint64, events uint32) {
	l.mu.Lock()
	s := l.sockets[id]
	if s == nil {
		a := l.acceptors[id]
		l.mu.Unlock()
		if a != nil { // else it was closed by an event just before
			a.event(l)
		}
		return
	}
	var then func()
	switch {
	case s.side != nil:
		then = l.flowEvent(s.side, events)
	case s.wait == nil || events&^s.awaits != 0:
		s.more = true
		fallthrough
	default:
		then = s.takeWait(false)
	}
	l.mu.Unlock()
	if then != nil {
		then()
	}
}

// The events of a socket whose bytes are relayed. They come once each time that there is something new; an
// urgent byte has one of its own since a read stops before it.
const onFlow = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
