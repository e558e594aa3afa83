package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// A Parcel is a flow between two relays, of one process or of two: nobody moves its bytes, and its sockets
// are in no epoll. Its other ends see a pause. Whoever has it closes both conns, or resumes it.
type Parcel struct {
	Down, Up           ParcelSide
	UpBytes, DownBytes int64     // as from [Counters.Load]: Rest is not counted
	IdleSince          time.Time // when a byte was last seen to move; the zero Time is not known
}

// A ParcelSide is one of a Parcel's connections.
type ParcelSide struct {
	// a *tcpsock.Bare; Resume takes a *net.TCPConn or a *net.UnixConn, too, without deadlines
	Conn    net.Conn
	Rest    []byte // was read from Conn, and is to be written to the other side; at most 64 KiB
	IsEnded bool   // the end of its stream was read, and is to be passed on behind Rest
	IsShut  bool   // our stream to it has ended
}

const (
	maxRest    = 64 << 10    // bytes that a side of a Parcel has at most
	stoppedFor = time.Second // a reader that takes nothing for so long is not waited for
)

// Why a flow stays.
var (
	errNoFlow   = errors.New("there is no flow: it has not begun, or has ended")
	errAsked    = errors.New("it was asked to leave before, and is about to")
	errWrapped  = errors.New("it is no flow between two bare sockets")
	errEnding   = errors.New("it is about to end")
	errStopped  = errors.New("more is held for a reader that has stopped than can go along")
	errNoReturn = errors.New("its datapath gives no flow back")
)

// A leaveRequest is made by [Counters.Leave]. Whoever takes it out of its Counters answers it.
type leaveRequest struct {
	gave     func(*Parcel, error)
	uncancel func() bool
}

// Leave asks the flow that is counted to leave its relay, and calls gave once, on any goroutine: with the
// flow, whose done is not called then, or with why it stays and goes on as before: it has ended or was
// killed first, ctx was over first, a reader has stopped and more is held for it than a [Parcel] takes, or
// a connection is none that can go. A flow with much to move leaves when little of it is held here. gave
// must not block. Leave may be called from any goroutine that holds no lock of a loop.
//
// As with [Counters.Kill], each new owner of the flow is recorded first, and then looks whether the flow was
// asked to leave. Leave asks first, and then looks who owns it. So one of the two sees the other.
func (c *Counters) Leave(ctx context.Context, gave func(*Parcel, error)) {
	q := &leaveRequest{gave: gave}
	giveUp := func() { c.refuseLeave(q, context.Cause(ctx)) }
	q.uncancel = context.AfterFunc(ctx, giveUp)
	if !c.leave.CompareAndSwap(nil, q) {
		q.uncancel()
		gave(nil, errAsked)
		return
	}
	f := c.flow.Load()
	switch {
	case ctx.Err() != nil: // giveUp may have come before there was something to give up
		giveUp()
	case f == nil:
		c.refuseLeave(q, errNoFlow)
	default:
		f.letLeave()
	}
}

// refuseLeave answers q, if nobody has. q may be nil.
func (c *Counters) refuseLeave(q *leaveRequest, why error) {
	if q != nil && c.leave.CompareAndSwap(q, nil) {
		q.uncancel()
		q.gave(nil, why)
	}
}

// isAsked reports whether the flow is to leave.
func (c *Counters) isAsked() bool { return c.leave.Load() != nil }

// letLeave has whoever has f stop, if f was asked to leave. In transit that is seen to by who gets it.
func (f *flow) letLeave() {
	q := f.counters.leave.Load()
	if q == nil {
		return
	}
	f.mu.Lock()
	switch f.state {
	case onLoop:
		socket := f.down.socket
		f.mu.Unlock()
		f.leaveLoop(socket)
	case handedOff:
		recall, isTaken := f.recall, f.isTaken
		f.mu.Unlock()
		switch {
		case !isTaken: // offer sees to it
		case recall == nil:
			f.counters.refuseLeave(q, errNoReturn)
		default:
			f.isRecalled.Store(true)
			recall()
			f.expectReturn(q, -1)
		}
	case pumping, parking, parked:
		if !f.parkable() {
			f.mu.Unlock()
			f.counters.refuseLeave(q, errWrapped)
			return
		}
		f.stopPumps()
		f.unlockAndFinish()
	case ending:
		f.mu.Unlock()
		f.counters.refuseLeave(q, errEnding)
	default:
		f.mu.Unlock()
	}
}

// stopPumps tells pumps to return as soon as little is held, or as they are, if little is.
//
// +checklocks:f.mu
func (f *flow) stopPumps() {
	f.enter(leaving)
	f.stops.Store(true)
	f.wake()
}

// unstop undoes stopPumps, but for the pumps that have returned.
//
// +checklocks:f.mu
func (f *flow) unstop() {
	if f.state != leaving {
		return
	}
	f.stops.Store(false)
	f.down.conn.SetDeadline(time.Time{})
	f.up.conn.SetDeadline(time.Time{})
}

// stayAwhile is called by the pump of src, which was told to return and holds too much. It is to go on if
// that was for f to leave, and so do all others. It tries again when it holds less.
func (f *flow) stayAwhile(src *side) (goesOn bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	src.isPutOff = true
	if f.state == leaving {
		f.unstop()
		f.enter(pumping)
		for _, s := range f.sides() {
			if s.state == waiting {
				f.startPump(s)
			}
		}
		f.resetTick(0)
		f.expectRoom(src)
	}
	return f.wants(src)
}

// expectRoom ends a request to leave when nothing was taken of what src has sent for a while.
func (f *flow) expectRoom(src *side) {
	q, moved := f.counters.leave.Load(), src.moved().Load()
	if q == nil {
		return
	}
	time.AfterFunc(stoppedFor, func() {
		switch {
		case f.counters.leave.Load() != q:
		case src.moved().Load() == moved:
			f.counters.refuseLeave(q, errStopped)
		default:
			f.expectRoom(src)
		}
	})
}

// expectReturn ends a request to leave when the datapath that is asked to give f back has moved nothing for a
// while, as where a process does not read what went to it past TCP. moved is what it had moved before.
func (f *flow) expectReturn(q *leaveRequest, moved int64) {
	up, down := f.counters.Load()
	switch now := up + down; {
	case f.counters.leave.Load() != q:
	case now == moved:
		f.counters.refuseLeave(q, errStopped)
	default:
		time.AfterFunc(2*stoppedFor, func() { f.expectReturn(q, now) })
	}
}

// pack takes the request to leave, if there still is one, and ends f with what it is given. f is in transit,
// nothing of it runs, and nobody watches its sockets. q is nil where f stays.
func (f *flow) pack(down, up net.Conn) (q *leaveRequest, p *Parcel) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.end != "" || f.counters.Killed() != nil || !f.mayLeave() {
		return nil, nil
	}
	if q = f.counters.leave.Load(); q == nil || !f.counters.leave.CompareAndSwap(q, nil) {
		return nil, nil
	}
	q.uncancel()
	f.enter(done)
	f.counters.kernel.Store(nil)
	f.counters.flow.Store(nil)
	if f.down.isSpared {
		unspare(up)
	}
	if f.up.isSpared {
		unspare(down)
	}
	f.beginIdle() // it may have moved since somebody looked
	p = &Parcel{Down: f.down.pack(down), Up: f.up.pack(up), IdleSince: f.since.Time()}
	p.UpBytes, p.DownBytes = f.counters.own()
	return q, p
}

// mayLeave reports whether little is held of f's bytes, which nobody moves.
func (f *flow) mayLeave() bool {
	return !f.hasHead() && len(f.down.rest) <= maxRest && len(f.up.rest) <= maxRest
}

func (s *side) pack(c net.Conn) ParcelSide {
	return ParcelSide{Conn: c, Rest: s.rest, IsEnded: s.state == ended, IsShut: s.isShut.Load()}
}

// Resume goes on with a flow that has left, in this relay or in another. It is as Run, whose notes hold,
// but for o: Preface and Head are not used, Counters begin with p's counts, and where bytes of p are held,
// here or in a receive queue, or a stream has ended, Datapaths that give no flow back when it is busy get the
// flow no earlier than those that do.
func (r *Relay) Resume(ctx context.Context, p *Parcel, o Options, done func(Result)) {
	if o.MeasureRTT {
		done = withRTT(done, roundTrip(p.Down.Conn), roundTrip(p.Up.Conn))
	}
	o.Preface, o.Head = nil, nil
	if o.Counters == nil {
		o.Counters = new(Counters)
	}
	o.Counters.up.Store(p.UpBytes)
	o.Counters.down.Store(p.DownBytes)
	f := r.newFlow(ctx, nil, nil, o, done)
	if len(o.Datapaths) > 0 {
		f.elsewhere = &elsewhere{isWet: !p.isDry()}
	}
	f.seen, f.since = p.UpBytes+p.DownBytes, sinceHere(p.IdleSince)
	f.down.unpack(p.Down, p.Up)
	f.up.unpack(p.Up, p.Down)
	ungrown(p.Down.Conn, p.Up.Conn) // their process may have died
	isOver := f.down.state == ended && f.up.state == ended
	if !isOver && f.beginBare(p) {
		return
	}
	f.down.init(f, pollable(p.Down.Conn))
	f.up.init(f, pollable(p.Up.Conn))
	if isOver {
		f.arm()
		f.userspace()
		return
	}
	f.run()
}

// sinceHere gives t, which may be by the clock of the machine, and may be never.
func sinceHere(t time.Time) moment.Moment {
	if t.IsZero() {
		return 0
	}
	now := time.Now()
	return moment.Of(now.Add(-max(now.Sub(t), 0)))
}

// unpack is pack undone. An end that was not passed on is read again, behind what is left.
func (s *side) unpack(own, other ParcelSide) {
	s.rest = own.Rest
	s.isShut.Store(own.IsShut)
	if own.IsEnded && other.IsShut && len(own.Rest) == 0 {
		s.state = ended
	}
}

// isDry: both streams go on, and all that came was read and written.
func (p *Parcel) isDry() bool {
	for _, s := range []ParcelSide{p.Down, p.Up} {
		if s.IsEnded || s.IsShut || len(s.Rest) > 0 || unread(s.Conn) > 0 {
			return false
		}
	}
	return true
}

// endLeave answers a request to leave of a flow that has ended.
func (c *Counters) endLeave(end End) {
	if q := c.leave.Load(); q != nil {
		c.refuseLeave(q, fmt.Errorf("it has ended: %s", end))
	}
}
