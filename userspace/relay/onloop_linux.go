package relay

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// What is in this file and returns then has the loop to itself, but for attachTo. then is called without
// that.

// attachTo gives f, which is in transit, to the loop of its sockets.
func (f *flow) attachTo(down, up *loop.Socket) {
	l := down.Loop()
	l.Do(func() (then func()) {
		f.mu.Lock()
		f.down.move(f, down)
		f.up.move(f, up)
		f.enter(onLoop)
		f.mu.Unlock()
		f.armOn(l)
		if f.counters.Killed() != nil {
			return f.toPumps()
		}
		if f.counters.isAsked() && f.mayLeave() {
			return f.departOn()
		}
		return f.beginOn()
	})
}

// move makes s a side of f that is on a loop.
func (s *side) move(f *flow, to *loop.Socket) {
	isShut := s.isShut.Load()
	*s = side{flow: f, socket: to, state: s.state, lasting: s.lasting}
	s.isShut.Store(isShut)
}

// beginOn attaches both sockets to their loop.
func (f *flow) beginOn() (then func()) {
	if f.hasHead() || len(f.down.rest)+len(f.up.rest) > 0 {
		return f.toPumps() // they write what is left of what comes first, or of an earlier stay
	}
	var hasMissed [2]bool
	for i, s := range f.sides() {
		var err error
		if hasMissed[i], err = s.socket.Attach(s); err != nil {
			return f.toPumps() // no memory
		}
	}
	f.relay.quiet.add(f)
	for i, s := range f.sides() {
		if hasMissed[i] {
			if then := s.pass(true); then != nil {
				return then
			}
		}
	}
	return nil
}

// writeFirst writes what comes first to upstream. With an error some of it may be left.
func (f *flow) writeFirst(up int) error {
	for f.hasHead() {
		n, err := noEINTR(func() (int, error) { return unix.Writev(up, [][]byte{f.o.Preface, f.o.Head}) })
		if err != nil {
			return err
		}
		p := min(n, len(f.o.Preface))
		f.o.Preface, f.o.Head = f.o.Preface[p:], f.o.Head[n-p:]
		f.counters.up.Add(int64(n - p))
	}
	f.o.Preface, f.o.Head = nil, nil
	return nil
}

// Handle does what has come for a side whose flow is on a loop.
func (s *side) Handle(events uint32) (then func()) {
	switch {
	case s.state != ended:
		// A read stops in front of an urgent byte, too (EPOLLPRI).
		return s.pass(events&^(unix.EPOLLIN|unix.EPOLLOUT) != 0)
	case events&unix.EPOLLERR == 0 && (events&unix.EPOLLHUP == 0 || s.isShut.Load()):
		return nil // its stream has ended, as we know
	}
	// It has an error, or is closed though our stream to it goes on: somebody has taken the error.
	return s.flow.detachBroken("watch", s, cmp.Or(takeError(s.socket.FD()), error(unix.ECONNRESET)))
}

// pass moves what s has. With toEnd it reads until it is told that there is no more; else a read that doesn't
// fill the buffer says so, as epoll(7) promises.
func (s *side) pass(toEnd bool) (then func()) {
	buf := s.socket.Loop().Buffer()
	most := min(int64(len(buf)), s.flow.o.Buffer)
	buf = buf[:most:most]
	if piece, isOnTrial := s.piece(buf, s.other().socket.FD()); isOnTrial {
		return s.passPiece(piece, toEnd)
	}
	if s.pieces*trialRead >= leastBulk {
		return s.flow.toPumps()
	}
	for full := 0; full < fullReads; {
		n, then := s.transfer(buf, false)
		switch {
		case n == 0:
			return then
		case n == len(buf):
			full++
		case toEnd:
			full = 0
		default:
			return s.message(n)
		}
	}
	return s.flow.toPumps()
}

// passPiece is pass for a side on trial: others have their turn between two pieces. buf has room for one, and
// capacity for as much as is passed at once.
func (s *side) passPiece(buf []byte, toEnd bool) (then func()) {
	for isMessage := s.isAnswered(); ; isMessage = false {
		n, then := s.transfer(buf, isMessage)
		if n == 0 {
			s.pieces = 0
			return then
		}
		isCut := n == len(buf) && s.hasUnread()
		if isCut || n == len(buf) && !isMessage {
			s.pieces++
		}
		switch {
		case isCut:
			if s.socket.Again() != nil {
				return s.flow.toPumps()
			}
			return nil
		case !toEnd:
			return s.message(n)
		}
	}
}

// transfer fills buf by one read, and does one write. The rest of a message that buf is too short for goes
// with it. Where n is 0 there is nothing more to read, or s has left the loop, and then is what follows.
func (s *side) transfer(buf []byte, isMessage bool) (n int, then func()) {
	f, dst := s.flow, s.other()
	n, err := noEINTR(func() (int, error) { return unix.Read(s.socket.FD(), buf) })
	switch {
	case err == unix.EAGAIN:
		return 0, nil
	case err != nil:
		return 0, f.detachBroken("read from", s, err)
	case n == 0:
		return 0, s.eof()
	case n == len(buf) && isMessage:
		if rest := s.restOfMessage(buf); len(rest) > 0 {
			more, _ := noEINTR(func() (int, error) { return unix.Read(s.socket.FD(), rest) })
			buf = buf[:n+max(more, 0)]
			n = len(buf)
		}
	}
	m, err := noEINTR(func() (int, error) { return unix.Write(dst.socket.FD(), buf[:n]) })
	m = max(m, 0)
	s.moved().Add(int64(m))
	if err != nil && err != unix.EAGAIN {
		return 0, f.detachBroken("write to", dst, err)
	}
	if m < n {
		s.rest = bytes.Clone(buf[m:n])
		return 0, f.toPumps()
	}
	return n, nil
}

// message hands the flow off if that is due now that a message of s, whose last n bytes were read, has
// passed.
func (s *side) message(n int) (then func()) {
	f, dst := s.flow, s.other()
	if s.pieces > 0 {
		n, s.pieces = math.MaxInt, 0 // it may be bulk as well as a message
	}
	if len(f.choice.Of) == 0 || dst.state == ended || dst.pieces > 0 { // then dst is read in part
		return nil
	}
	from := datapath.Downstream
	if s == &f.up {
		from = datapath.Upstream
	}
	d := f.relay.chooser.Message(&f.choice, from, n)
	if d == nil {
		return nil
	}
	offer := f.handOff(d)
	return func() { go offer() } // it takes 0.1 ms, and the loop has other flows
}

// hasUnread reports whether there are bytes to be read from s, or that can't be said.
func (s *side) hasUnread() bool {
	n, err := tcpsock.Unread(s.socket.FD())
	return n > 0 || err != nil
}

// eof passes the end of s's stream on. An error besides is a reset that came behind it: a read gives one that
// came alone.
func (s *side) eof() (then func()) {
	f, dst, fault := s.flow, s.other(), takeError(s.socket.FD())
	s.state = ended
	if dst.state == ended && fault == nil {
		// to close it tells nobody while another process has a copy
		unix.Shutdown(dst.socket.FD(), unix.SHUT_WR)
		return f.endOnLoop()
	}
	dst.isShut.Store(true)
	if err := unix.Shutdown(dst.socket.FD(), unix.SHUT_WR); err != nil {
		return f.detachBroken("end the stream to", dst, err)
	}
	if fault != nil {
		return f.detachBroken("read from", s, fault)
	}
	return nil
}

// leave takes f off its loop. The sockets are still in that.
func (f *flow) leave(next state) (down, up *loop.Socket) {
	f.relay.quiet.remove(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enter(next)
	down, up = f.down.socket, f.up.socket
	f.down.socket, f.up.socket = nil, nil
	return down, up
}

// endOnLoop is the proper end of f.
func (f *flow) endOnLoop() (then func()) {
	down, up := f.leave(done)
	down.Discard()
	up.Discard()
	return func() { f.over(EndEOF, nil) }
}

// detach takes f off its loop. After next, pumps go on with it.
func (f *flow) detach(next func()) (then func()) {
	down, up := f.leave(inTransit)
	return f.pumpsAfter(down, up, next)
}

// pumpsAfter has pumps go on with f, which is in transit, after next.
func (f *flow) pumpsAfter(down, up *loop.Socket, next func()) (then func()) {
	f.toPoller(down, up)
	return func() {
		f.disarm()
		go func() {
			f.arm()
			next()
			f.userspace()
		}()
	}
}

func (f *flow) toPumps() (then func()) { return f.detach(func() {}) }

// detachBroken ends f because of s; what s has sent before is still delivered.
func (f *flow) detachBroken(op string, s *side, err error) (then func()) {
	return f.detach(f.breaking(op, s, err))
}

func (f *flow) breaking(op string, s *side, err error) func() {
	return func() { f.broken(s, &sideError{op, s.name(), err}) }
}

// toPoller gives both sockets, which leave their loop, to Go's poller.
func (f *flow) toPoller(down, up *loop.Socket) {
	down.Detach()
	up.Detach()
	f.poll(down, up)
}

// poll is toPoller for sockets that have left their loop.
func (f *flow) poll(down, up *loop.Socket) {
	f.o.Head = bytes.Clone(f.o.Head) // its memory may be somebody else's
	f.down.init(f, sockConn{os.NewFile(uintptr(down.FD()), "socket")})
	f.up.init(f, sockConn{os.NewFile(uintptr(up.FD()), "socket")})
}

// armOn makes ctx and idleness end the flow while it is on l.
func (f *flow) armOn(l *loop.Loop) {
	f.relay.cancels.add(f, l)
	if idle := f.beginIdle(); f.o.Idle > 0 {
		f.tick = time.AfterFunc(min(f.o.Idle/4, f.o.Idle-idle), func() { l.Do(f.checkIdleOn) })
	}
}

// cancelOn ends f, whose context is done; it was on l, if not nil, when that was seen.
func (f *flow) cancelOn(l *loop.Loop) {
	end := func() { f.abort(EndCanceled, context.Cause(f.ctx)) }
	if l == nil {
		end()
		return
	}
	l.Do(func() (then func()) {
		if f.isIn(onLoop) {
			then = f.detach(end)
		}
		return then
	})
}

// checkIdleOn sees whether bytes have moved on the loop since the last time.
func (f *flow) checkIdleOn() (then func()) {
	if !f.isIn(onLoop) {
		return nil
	}
	idle := f.idle(moment.Now())
	if idle >= f.o.Idle {
		return f.detach(func() { f.abort(EndIdle, fmt.Errorf("no byte for %v", f.o.Idle)) })
	}
	f.tick.Reset(min(f.o.Idle/4, f.o.Idle-idle))
	return nil
}

// A sockConn is a socket that was on a loop, now in Go's poller.
type sockConn struct{ *os.File }

func (c sockConn) LocalAddr() net.Addr { return nil }

func (c sockConn) RemoteAddr() net.Addr { return nil }

func (c sockConn) CloseWrite() (err error) {
	if !tcpsock.Control(c, func(fd int) { err = unix.Shutdown(fd, unix.SHUT_WR) }) {
		return net.ErrClosed
	}
	return os.NewSyscallError("shutdown", err)
}

func (c sockConn) SetLinger(seconds int) (err error) {
	tcpsock.Control(c, func(fd int) {
		err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(seconds)})
	})
	return err
}
