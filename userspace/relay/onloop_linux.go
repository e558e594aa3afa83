package relay

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// RunSockets is [Relay.Run] for two sockets of one loop that are connected, and that nobody waits for. It has
// written Head, or copied it, when it returns.
func (r *Relay) RunSockets(ctx context.Context, down, up *loop.Socket, o Options, done func(Result)) {
	f := r.newFlow(ctx, nil, nil, o, done)
	if len(o.Datapaths) > 0 && f.offerSockets(down, up) {
		return
	}
	f.attachTo(down, up)
}

// offerSockets offers the flow to the kernel datapaths, and reports whether somebody else goes on with it.
func (f *flow) offerSockets(down, up *loop.Socket) bool {
	simple := true
	for _, d := range f.o.Datapaths {
		if _, ok := d.(Sockets); !ok {
			simple = false
		}
	}
	if !simple || f.writeFirst(up.FD()) != nil {
		o := f.o
		o.Head, o.Counters = bytes.Clone(o.Head), f.counters
		go f.relay.runConns(f.ctx, down, up, o, f.done)
		return true
	}
	for _, d := range f.o.Datapaths {
		if f.prefer(d.(Sockets), down.FD(), up.FD()) {
			break
		}
	}
	return false
}

// runConns is [Relay.Run] for sockets that leave their loop.
func (r *Relay) runConns(ctx context.Context, down, up *loop.Socket, o Options, done func(Result)) {
	d, err := down.Conn()
	if err != nil {
		up.Close()
		done(Result{End: EndError, Err: err, Datapath: userspace})
		return
	}
	u, err := up.Conn()
	if err != nil {
		d.Close()
		done(Result{End: EndError, Err: err, Datapath: userspace})
		return
	}
	r.Run(ctx, d, u, o, done)
}

// attach gives f to a loop, if that can have it.
func (f *flow) attach() bool {
	if !f.down.bare || !f.up.bare || !f.disarm() {
		return false
	}
	down, up := f.socketsOnLoop()
	if up == nil {
		f.arm()
		return false
	}
	if !f.isTCP() {
		f.o.WhenTalking = nil
	}
	f.down.conn.Close() // out of Go's poller, which would wake for each message
	f.up.conn.Close()
	f.attachTo(down, up)
	return true
}

// socketsOnLoop makes new descriptors of both sockets, for a loop; nil if there can be none.
func (f *flow) socketsOnLoop() (down, up *loop.Socket) {
	downFD, err := tcpsock.Dup(f.down.sock)
	upFD, upErr := tcpsock.Dup(f.up.sock)
	if err == nil && upErr == nil {
		l := f.relay.loops.Loop()
		return l.NewSocket(downFD), l.NewSocket(upFD)
	}
	for _, fd := range []int{downFD, upFD} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	return nil, nil
}

// attachTo begins f on the loop of its sockets.
func (f *flow) attachTo(down, up *loop.Socket) {
	l := down.Loop()
	tcpsock.KeepUrgent(down.FD())
	tcpsock.KeepUrgent(up.FD())
	l.Do(func() (then func()) {
		f.mu.Lock()
		f.down = side{flow: f, socket: down, rest: f.down.rest, tried: f.down.tried, spared: f.down.spared}
		f.up = side{flow: f, socket: up, rest: f.up.rest, tried: f.up.tried, spared: f.up.spared}
		f.onLoop.Store(true)
		f.mu.Unlock()
		f.armOn(l)
		return f.begin(l)
	})
}

// begin attaches both sockets to l and writes what comes first. It is called with the loop held.
func (f *flow) begin(l *loop.Loop) (then func()) {
	var missed [2]bool
	for i, s := range f.sides() {
		var err error
		if missed[i], err = s.socket.Attach(s); err != nil {
			return f.detach(f.resume) // no memory
		}
	}
	if err := f.writeFirst(f.up.socket.FD()); err == unix.EAGAIN {
		return f.detach(f.resume) // where the rest is written
	} else if err != nil {
		return f.detach(func() { f.resumeBroken(&f.up, &sideError{"write to", f.up.name(), err}) })
	}
	if len(f.down.rest)+len(f.up.rest) > 0 {
		return f.detach(f.resume) // pumps write what is left of an earlier stay
	}
	f.relay.calm.add(f, l)
	for i, s := range f.sides() {
		if missed[i] {
			if then := s.pass(true); then != nil {
				return then
			}
		}
	}
	return nil
}

// writeFirst writes what comes first to upstream. With an error some of it may be left.
func (f *flow) writeFirst(up int) error {
	for len(f.o.Preface)+len(f.o.Head) > 0 {
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

// Handle does what has come for a side whose flow is on a loop. It is called with the loop held.
func (s *side) Handle(events uint32) (then func()) {
	f := s.flow
	switch {
	case s.state != ended:
		// A read stops in front of an urgent byte, too (EPOLLPRI).
		return s.pass(events&^(unix.EPOLLIN|unix.EPOLLOUT) != 0)
	case events&unix.EPOLLERR == 0:
		return nil // its stream has ended, as we know
	}
	err := cmp.Or(takeError(s.socket.FD()), error(unix.ECONNRESET))
	return f.detach(func() { f.resumeBroken(s, &sideError{"watch", s.name(), err}) })
}

// pass moves what s has. With toEnd it reads until it is told that there is no more; else a read that doesn't
// fill the buffer says so, as epoll(7) promises. It is called with the loop held.
func (s *side) pass(toEnd bool) (then func()) {
	f, dst, moved := s.flow, s.other(), &s.flow.counters.down
	if s == &f.down {
		moved = &f.counters.up
	}
	buf := s.socket.Loop().Buffer()
	buf = buf[:min(int64(len(buf)), f.o.Buffer)]
	buf, onTrial := s.piece(buf, dst.socket.FD())
	if !onTrial && s.pieces*trialRead >= leastBulk {
		return f.detach(f.resume)
	}
	for full := 0; ; {
		n, err := noEINTR(func() (int, error) { return unix.Read(s.socket.FD(), buf) })
		switch {
		case err == unix.EAGAIN:
			return nil
		case err != nil:
			return f.detach(func() { f.resumeBroken(s, &sideError{"read from", s.name(), err}) })
		case n == 0:
			return s.eof()
		}
		m, err := noEINTR(func() (int, error) { return unix.Write(dst.socket.FD(), buf[:n]) })
		moved.Add(int64(max(m, 0)))
		if err != nil && err != unix.EAGAIN {
			return f.detach(func() { f.resumeBroken(dst, &sideError{"write to", dst.name(), err}) })
		}
		if m < n {
			s.rest = bytes.Clone(buf[max(m, 0):n])
			return f.detach(f.resume)
		}
		if n < len(buf) {
			if full = 0; !toEnd {
				if s.pieces > 0 {
					n, s.pieces = preferredBytes+1, 0 // it may be bulk as well as a message
				}
				if f.o.WhenTalking != nil && dst.state != ended && dst.pieces == 0 { // else dst is read in part
					return s.offerTalk(n)
				}
				return nil
			}
			continue
		}
		if onTrial && s.socket.Again() == nil {
			s.pieces++
			return nil
		}
		if full++; full >= fullReads {
			return f.detach(f.resume)
		}
	}
}

// eof passes the end of s's stream on. An error besides is a reset that came behind it: a read gives one that
// came alone. It is called with the loop held.
func (s *side) eof() (then func()) {
	f, dst, fault := s.flow, s.other(), takeError(s.socket.FD())
	s.state = ended
	if dst.state == ended && fault == nil {
		return f.endOnLoop()
	}
	dst.shut.Store(true)
	if err := unix.Shutdown(dst.socket.FD(), unix.SHUT_WR); err != nil {
		return f.detach(func() { f.resumeBroken(dst, &sideError{"end the stream to", dst.name(), err}) })
	}
	if fault != nil {
		return f.detach(func() { f.resumeBroken(s, &sideError{"read from", s.name(), fault}) })
	}
	return nil
}

// endOnLoop is the proper end of f. It is called with the loop held.
func (f *flow) endOnLoop() (then func()) {
	f.relay.calm.remove(f)
	f.onLoop.Store(false)
	for _, s := range f.sides() {
		s.socket.Discard()
		s.socket = nil
	}
	return func() {
		f.disarm()
		up, down := f.counters.Load()
		f.report(Result{Up: up, Down: down, End: EndEOF, Datapath: userspace})
	}
}

// detach gives f to Go's poller, where then, which has a goroutine of its own, goes on with it. It is called
// with the loop held.
func (f *flow) detach(then func()) func() {
	f.relay.calm.remove(f)
	f.onLoop.Store(false)
	f.o.Head = bytes.Clone(f.o.Head) // its memory may be somebody else's
	for _, s := range f.sides() {
		s.socket.Detach()
		s.init(f, sockConn{os.NewFile(uintptr(s.socket.FD()), "socket")})
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

// cutOn ends f, if it is still on l, for a reason that no event has.
func (f *flow) cutOn(l *loop.Loop, end End, err error) {
	l.Do(func() (then func()) {
		if !f.onLoop.Load() {
			return nil
		}
		return f.detach(func() { f.resumeAborted(end, err) })
	})
}

// armOn makes ctx and idleness end the flow while it is on l. It is called with the loop held.
func (f *flow) armOn(l *loop.Loop) {
	if f.ctx.Done() != nil {
		f.uncancel = context.AfterFunc(f.ctx, func() { f.cutOn(l, EndCanceled, context.Cause(f.ctx)) })
	}
	if f.o.Idle > 0 {
		f.seen, f.since = -1, time.Now()
		f.tick = time.AfterFunc(f.o.Idle/4, func() { f.lookOn(l) })
	}
}

// lookOn sees whether bytes have moved on l since the last time.
func (f *flow) lookOn(l *loop.Loop) {
	up, down := f.counters.Load()
	now := time.Now()
	l.Do(func() (then func()) {
		if !f.onLoop.Load() {
			return nil
		}
		if up+down != f.seen {
			f.seen, f.since = up+down, now
		}
		quiet := now.Sub(f.since)
		if quiet < f.o.Idle {
			f.tick.Reset(min(f.o.Idle/4, f.o.Idle-quiet))
			return nil
		}
		return f.detach(func() { f.resumeAborted(EndIdle, fmt.Errorf("no byte for %v", f.o.Idle)) })
	})
}

// A sockConn is a socket that was on a loop, now in Go's poller.
type sockConn struct{ *os.File }

func (c sockConn) LocalAddr() net.Addr { return nil }

func (c sockConn) RemoteAddr() net.Addr { return nil }

func (c sockConn) control(do func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

func (c sockConn) CloseWrite() error {
	return c.control(func(fd int) error {
		return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_WR))
	})
}

func (c sockConn) SetLinger(seconds int) error {
	return c.control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER,
			&unix.Linger{Onoff: 1, Linger: int32(seconds)})
	})
}
