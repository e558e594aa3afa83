package relay

import (
	"bytes"
	"cmp"
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

// The events of a socket whose bytes are relayed. They come once each time that there is something new; an
// urgent byte has one of its own since a read stops before it.
const onFlow = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET

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

// flowEvent does what has come for a flow. It is called with l.mu held and returns what is to be done
// without.
func (l *loop) flowEvent(s *side, events uint32) (then func()) {
	f := s.flow
	switch {
	case events&unix.EPOLLPRI != 0:
		return l.leave(f, f.resume)
	case s.state != ended:
		return l.pass(s, events&^(unix.EPOLLIN|unix.EPOLLOUT) != 0)
	case events&unix.EPOLLERR == 0:
		return nil // its stream has ended, as we know
	}
	err := cmp.Or(takeError(s.socket.fd), error(unix.ECONNRESET))
	return l.leave(f, func() { f.resumeBroken(s, &sideError{"watch", s.name(), err}) })
}

// pass moves what s has. With toEnd it reads until it is told that there is no more; else a read that doesn't
// fill the buffer says so, as epoll(7) promises. It is called with l.mu held.
func (l *loop) pass(s *side, toEnd bool) (then func()) {
	f, dst, moved := s.flow, s.other(), &s.flow.counters.down
	if s == &f.down {
		moved = &f.counters.up
	}
	buf := l.buf[:min(int64(len(l.buf)), f.o.Buffer)]
	for full := 0; ; {
		n, err := noEINTR(func() (int, error) { return unix.Read(s.socket.fd, buf) })
		switch {
		case err == unix.EAGAIN:
			return nil
		case err != nil:
			return l.leave(f, func() { f.resumeBroken(s, &sideError{"read from", s.name(), err}) })
		case n == 0:
			return l.eof(s)
		}
		m, err := noEINTR(func() (int, error) { return unix.Write(dst.socket.fd, buf[:n]) })
		moved.Add(int64(max(m, 0)))
		if err != nil && err != unix.EAGAIN {
			return l.leave(f, func() { f.resumeBroken(dst, &sideError{"write to", dst.name(), err}) })
		}
		if m < n {
			s.rest = bytes.Clone(buf[max(m, 0):n])
			return l.leave(f, f.resume)
		}
		if n < len(buf) {
			if full = 0; !toEnd {
				if f.o.WhenTalking != nil && dst.state != ended {
					if talking := f.talk.says(s, n); talking > 0 {
						return l.offerTalk(f, talking)
					}
				}
				return nil
			}
		} else if full++; full >= fullReads {
			return l.leave(f, f.resume)
		}
	}
}

// offerTalk takes f off the loop and offers it to who has room for all that talk, if anybody has. It is
// called with l.mu held.
func (l *loop) offerTalk(f *flow, talking int) (then func()) {
	var taker Sockets
	for _, d := range f.o.WhenTalking {
		if d.Room() >= talking {
			taker = d
			break
		}
	}
	if taker == nil {
		return nil
	}
	down, up := f.down.socket, f.up.socket
	for _, s := range f.sides() {
		l.remove(s.socket)
		s.socket = nil // a ctx that ends meanwhile is seen by who has the flow then
	}
	return func() {
		f.disarm()
		o := f.told(taker)
		o.Talks = true
		count, err := taker.SpliceSockets(f.ctx, down.fd, up.fd, o)
		if f.offered(taker, count, err) {
			talkers.gone()
			return
		}
		f.talk.turns = -talkAgain
		f.relayOn(down, up)
	}
}

// eof passes the end of s's stream on. An error besides is a reset that came behind it: a read gives one that
// came alone. It is called with l.mu held.
func (l *loop) eof(s *side) (then func()) {
	f, dst, fault := s.flow, s.other(), takeError(s.socket.fd)
	s.state = ended
	if dst.state == ended && fault == nil {
		return l.end(f)
	}
	dst.shut.Store(true)
	if err := unix.Shutdown(dst.socket.fd, unix.SHUT_WR); err != nil {
		return l.leave(f, func() { f.resumeBroken(dst, &sideError{"end the stream to", dst.name(), err}) })
	}
	if fault != nil {
		return l.leave(f, func() { f.resumeBroken(s, &sideError{"read from", s.name(), fault}) })
	}
	return nil
}

// end is the proper end of f. It is called with l.mu held.
func (l *loop) end(f *flow) (then func()) {
	for _, s := range f.sides() {
		l.forget(s.socket)
		unix.Close(s.socket.fd)
		s.socket = nil
	}
	return func() {
		f.disarm()
		up, down := f.counters.Load()
		f.done(Result{Up: up, Down: down, End: EndEOF, Datapath: userspace})
	}
}

// leave gives f to Go's poller, where then, which has a goroutine of its own, goes on with it. It is called
// with l.mu held.
func (l *loop) leave(f *flow, then func()) func() {
	f.o.Head = bytes.Clone(f.o.Head) // its memory may be somebody else's
	for _, s := range f.sides() {
		l.remove(s.socket)
		s.init(f, sockConn{os.NewFile(uintptr(s.socket.fd), "socket")})
		s.socket = nil
	}
	return func() {
		f.disarm()
		go then()
	}
}

// resume goes on with pumps.
func (f *flow) resume() {
	f.arm()
	f.userspace()
}

// resumeBroken ends f because of s; what s has sent before is still delivered.
func (f *flow) resumeBroken(s *side, err error) {
	f.arm()
	f.broken(s, err)
	f.userspace()
}

// resumeAborted ends f now.
func (f *flow) resumeAborted(end End, err error) {
	f.abort(end, err)
	f.userspace()
}

// cut ends f, if it is still here, for a reason that no event has.
func (l *loop) cut(f *flow, end End, err error) {
	l.mu.Lock()
	var then func()
	if f.down.socket != nil {
		then = l.leave(f, func() { f.resumeAborted(end, err) })
	}
	l.mu.Unlock()
	if then != nil {
		then()
	}
}
