// Package loop is a reactor: a few goroutines, each with an epoll, that wait for the events of any number of
// sockets. An event costs no switch of goroutines, and a socket that waits is a few hundred bytes.
//
//	loop_linux.go    the loops, and the lock of each; there are none on other systems
//	socket_linux.go  a socket on a loop: one callback for first bytes or a connect, or a Handler for all
//	accept_linux.go  connections that are accepted on the loops
//	alive_linux.go   whether the loops still turn
//
// Whatever a loop calls must be quick and must not block. Each loop has one lock. Locks are taken in this
// order: an Acceptor's, a loop's, and then those of whoever is called with the loop's lock held.
package loop

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Reactor is a set of loops. Make it with [New].
type Reactor struct {
	loops  []*Loop
	next   atomic.Uint32
	asking chan struct{} // holds a token while Alive asks
}

// New starts so many loops, which must be at least one. A loop in epoll_wait keeps its share of Go's
// scheduler until somebody notices, which takes up to 10 ms: GOMAXPROCS should be greater than loops. The
// caller closes the Reactor.
func New(loops int) (*Reactor, error) {
	r := &Reactor{asking: make(chan struct{}, 1)}
	for range loops {
		l, err := newLoop(r)
		if err != nil {
			r.Close()
			return nil, fmt.Errorf("start an event loop: %w", err)
		}
		r.loops = append(r.loops, l)
	}
	return r, nil
}

// Close ends the loops. No event comes from then on to the sockets that are still on them, and whatever is
// asked of a loop fails. It must be called once only.
func (r *Reactor) Close() {
	for _, l := range r.loops {
		l.stop()
	}
}

// Loop gives the loop that has the next socket.
func (r *Reactor) Loop() *Loop { return r.loops[int(r.next.Add(1))%len(r.loops)] }

// Len is how many loops there are: one for each processor that the daemon may use.
func (r *Reactor) Len() int { return len(r.loops) }

// A Loop is one goroutine that waits for the events of its sockets.
type Loop struct {
	reactor *Reactor
	ask     *Socket       // an eventfd, for Alive: when somebody asks there may be none to be had
	answers answerer      // of ask
	ended   chan struct{} // closed when the goroutine has
	count   atomic.Int32  // sockets that are here

	mu      sync.Mutex // guards what follows, the sockets that are here, and what their handlers want guarded
	fd      int        // of the epoll; negative: the loop has ended
	last    uint64     // id of a socket
	sockets map[uint64]*Socket
	buf     [64 << 10]byte
}

func newLoop(r *Reactor) (*Loop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	l := &Loop{reactor: r, fd: fd, sockets: make(map[uint64]*Socket), ended: make(chan struct{})}
	if err := l.openAsk(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	go l.run(fd)
	return l, nil
}

// stop ends l, and waits for it.
func (l *Loop) stop() {
	l.mu.Lock()
	fd := l.fd
	l.fd = -1
	l.mu.Unlock()
	l.ask.wake()
	<-l.ended
	unix.Close(l.ask.FD())
	unix.Close(fd)
}

// Do calls f, which has the loop to itself: meanwhile no event of its sockets is handled. What f returns, if
// anything, is called afterwards, when the loop goes on. f must not call Do.
func (l *Loop) Do(f func() (then func())) {
	l.mu.Lock()
	then := f()
	l.mu.Unlock()
	if then != nil {
		then()
	}
}

// Buffer is 64 KiB for whoever has the loop to himself, for as long as he has it.
func (l *Loop) Buffer() []byte { return l.buf[:] }

// orIdler is l, since a socket that stays on l needs no switch of threads, unless another loop has clearly
// fewer sockets.
func (l *Loop) orIdler() *Loop {
	const clearly = 8 // sockets
	best := l
	for _, other := range l.reactor.loops {
		if other.count.Load() < best.count.Load()-clearly {
			best = other
		}
	}
	return best
}

func (l *Loop) run(epoll int) {
	defer close(l.ended)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(epoll, events, -1)
		if err != nil && err != unix.EINTR {
			panic("loop: epoll_wait: " + err.Error()) // the descriptor is ours alone
		}
		for _, ev := range events[:max(n, 0)] {
			if !l.event(uint64(uint32(ev.Fd))|uint64(uint32(ev.Pad))<<32, ev.Events) {
				return
			}
		}
	}
}

// event handles an event of the socket that has this id. It returns false when the loop has ended.
func (l *Loop) event(id uint64, events uint32) (goOn bool) {
	l.Do(func() (then func()) {
		s := l.sockets[id]
		switch goOn = l.fd >= 0; {
		case !goOn || s == nil: // it was closed by an event just before
			return nil
		case s.handler != nil:
			return s.handler.Handle(events)
		case s.wait == nil || events&^s.awaits != 0:
			s.hasMissed = true
		}
		return s.takeWait(false)
	})
	return goOn
}

// watch has events of s come from now on, and those at once that were missed and still hold. The caller has
// the loop to itself. It fails when the loop has ended, or the kernel has no memory.
func (l *Loop) watch(s *Socket, events uint32) error {
	op, id := unix.EPOLL_CTL_MOD, s.id
	if id == 0 {
		l.last++
		op, id = unix.EPOLL_CTL_ADD, l.last
	} else if s.events&events == events && !s.hasMissed {
		return nil
	}
	if err := l.control(op, s, id, events); err != nil {
		return err
	}
	if s.id == 0 { // no event of it is handled before this
		l.sockets[id] = s
		l.count.Add(1)
	}
	s.id, s.events = id, events
	return nil
}

func (l *Loop) control(op int, s *Socket, id uint64, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(id), Pad: int32(id >> 32)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.fd, op, s.FD(), &ev))
}

// forget takes s out of the loop's table, and its handler away. The epoll forgets s when it is closed, and
// every copy that another process has; what it tells until then concerns nobody. The caller has the loop to
// itself.
func (l *Loop) forget(s *Socket) {
	if s.id != 0 {
		delete(l.sockets, s.id)
		l.count.Add(-1)
	}
	s.id, s.handler = 0, nil
}
