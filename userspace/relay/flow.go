package relay

import (
	"cmp"
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// past is a deadline that wakes whoever waits.
var past = time.Unix(1, 0)

// A streamState is how far the stream that a side sends has come. It survives every change of hands.
//
//	flowing <-> waiting   by pumps, when the flow is idle or quiet, and when there are bytes
//	flowing  -> ended     by whoever reads the end of the stream
//	either   -> ended     when the flow ends for another reason, and what is unread is discarded
type streamState uint8

const (
	flowing streamState = iota // a loop or a pump reads it, or is about to
	waiting                    // watches looks out for its next byte, and nobody reads
	ended                      // nobody reads it any more; its end was passed on, if it had a proper one
)

// A side is one of the flow's two connections.
type side struct {
	flow  *flow
	conn  net.Conn
	sock  syscall.RawConn // the socket under conn, or nil
	state streamState     // guarded by the loop's mutex while the flow is on one, else by flow.mu

	isBare   bool        // conn is the socket itself, and can be read by way of sock
	isPutOff bool        // it held too much for the flow to leave; only for its pump
	isShut   atomic.Bool // our stream to it has ended, or is about to

	socket  *loop.Socket // while the flow is on a loop
	answers int64        // bytes of the other direction when a message was last looked for on trial
	lasting

	held       atomic.Int64  // bytes of its stream that its pump has no room for
	stoodAt    int64         // how many were moved when MeasureHeld looked
	stoodSince moment.Moment // and since when no more

	fault error // why it can't go on: the first reason, nil while it can; guarded by flow.mu

	// guarded by watches.mu
	watch   uint64 // its id there, or 0
	watched uint32 // what is looked out for

	pieces int32 // in a row that were read on a loop on trial, and were full
}

// lasting is what a side takes with it to a loop and back. It is guarded as the stream is.
type lasting struct {
	rest     []byte // read from it, and not yet written
	isTried  bool   // its stream is on trial no more: see trial_linux.go
	isSpared bool   // what is written on trial is kept short
	isShrunk bool   // see shrink: for its pump
}

// A flow is two sides, and who has it: see state.
type flow struct {
	relay    *Relay
	down     side
	up       side
	counters *Counters
	o        Options
	ctx      context.Context
	done     func(Result)
	cancel   context.CancelCauseFunc // of the datapath that has the flow, or is asked; guarded by mu

	recall     func()      // asks the datapath that has f to give it back; nil: it can't; guarded by mu
	handed     *handed     // the sockets that the datapath has; guarded by mu
	isRecalled atomic.Bool // the datapath was asked to give f back
	stops      atomic.Bool // pumps are to return: see stopPumps

	recorded *holder         // the datapath that has the flow in its tables; nil: none
	choice   datapath.Choice // of the datapath that gets it

	elsewhere *elsewhere // nil: it has always been in this relay, and is not to be offered again
	canceling cancelEntry

	mu sync.Mutex
	// +checklocks:mu
	progress

	// guarded by the loop's mutex while the flow is on one, else by mu
	tick  *time.Timer   // nil while nobody asks for idleness
	seen  int64         // bytes moved both ways, when they had last changed
	since moment.Moment // when that was seen
}

// elsewhere is the state of a flow that has been in another relay, or in a datapath that begins with flows,
// or that such a datapath may have later. Only the owner of the flow uses it.
type elsewhere struct {
	isWet bool                // bytes are held, or a stream has ended: no datapath may have it as it begins
	later []datapath.Datapath // are offered it when it is handed off
}

// addLater has f offered to d when it is handed off.
func (f *flow) addLater(d datapath.Datapath) {
	if f.elsewhere == nil {
		f.elsewhere = &elsewhere{}
	}
	f.elsewhere.later = append(f.elsewhere.later, d)
}

// progress is how far a flow has come.
type progress struct {
	state          state
	pumps          int8 // that run
	cannotPark     bool // watches had no descriptor or no memory
	cannotReattach bool // no loop can have the flow again
	isGuess        bool // end and err are what is likely: whoever reads from the broken side will know
	isCut          bool // nothing is delivered any more
	isTaken        bool // the datapath that was asked to has taken it

	end    End // the first reason wins
	err    error
	reader *reader // of what a broken side has sent; nil: none is broken

	quietSeen  int64         // bytes moved both ways, at quietSince
	quietSince moment.Moment // when pumps were last asked whether they move much
}

// A reader gets what was received from a side that broke.
type reader struct {
	recheck *time.Timer // looks whether it goes on
	taken   int64       // what it has acknowledged
	takenAt time.Time   // when that was seen first
}

func (r *Relay) newFlow(ctx context.Context, down, up net.Conn, o Options, done func(Result)) *flow {
	f := &flow{relay: r, ctx: ctx, o: o, done: done, counters: o.Counters, choice: datapath.Choice{Of: o.WhenPingPong}}
	if f.counters == nil {
		f.counters = new(Counters)
	}
	f.counters.flow.Store(f)
	if f.o.Buffer <= 0 {
		f.o.Buffer = DefaultBuffer
	}
	f.o.parkAfter = cmp.Or(o.parkAfter, parkAfter)
	if f.o.Refused == nil {
		f.o.Refused = func(string, error) {}
	}
	if down != nil {
		f.down.init(f, down)
		f.up.init(f, up)
	}
	return f
}

// control calls do with the descriptor of s, if there is one.
func (s *side) control(do func(fd int)) {
	if s.sock != nil {
		s.sock.Control(func(fd uintptr) { do(int(fd)) })
	}
}

func (s *side) init(f *flow, c net.Conn) {
	s.flow, s.conn = f, c
	s.sock, s.isBare = socket(c)
	s.keepUrgent()
}

// socket finds the socket under c. isBare: there is nothing else in between.
func socket(c net.Conn) (sock syscall.RawConn, isBare bool) {
	isBare = true
	for {
		switch s := c.(type) {
		case *net.TCPConn, *net.UnixConn, sockConn:
			sock, err := s.(syscall.Conn).SyscallConn()
			if err != nil {
				return nil, false
			}
			return sock, isBare
		case interface{ NetConn() net.Conn }: // *tls.Conn
			c, isBare = s.NetConn(), false
		default:
			return nil, false
		}
	}
}

func (s *side) other() *side {
	if s == &s.flow.down {
		return &s.flow.up
	}
	return &s.flow.down
}

func (s *side) name() string {
	if s == &s.flow.down {
		return "downstream"
	}
	return "upstream"
}

// moved counts what the other side was given of s's bytes.
func (s *side) moved() *atomic.Int64 {
	if s == &s.flow.down {
		return &s.flow.counters.up
	}
	return &s.flow.counters.down
}

// run gives the flow to a datapath or a loop, or begins to relay it here.
func (f *flow) run() {
	f.arm()
	if !f.attach() {
		f.userspace()
	}
}

// sides are down and up.
func (f *flow) sides() [2]*side { return [2]*side{&f.down, &f.up} }

// userspace relays here, with a pump for each stream that is still to be delivered, until they have ended or
// are parked.
func (f *flow) userspace() {
	f.mu.Lock()
	f.enter(pumping)
	f.takeKill()
	if f.end != "" {
		f.enter(ending)
	}
	for _, s := range f.sides() {
		switch {
		case s.state == ended:
			watchForReset(s)
		case f.wants(s):
			f.startPump(s)
		default:
			s.state = ended
		}
	}
	f.unlockAndFinish()
	f.letLeave()
}

// wants reports whether what src sends is still to be delivered: always until the flow is to end, and then
// what a broken src has sent before.
//
// +checklocks:f.mu
func (f *flow) wants(src *side) bool {
	if src.state == ended || f.isCut {
		return false
	}
	return f.end == "" || src.fault != nil && src.other().fault == nil
}

// startPump starts a pump for src, which none reads.
//
// +checklocks:f.mu
func (f *flow) startPump(src *side) {
	src.state = flowing
	f.pumps++
	go f.pump(src)
}

// pump moves what comes from src until that ends, is parked, or is not wanted any more.
func (f *flow) pump(src *side) {
	for {
		isOver := f.move(src)
		f.mu.Lock()
		if isOver || !f.wants(src) {
			src.state = ended
			break
		}
		if f.state == leaving {
			src.state = waiting
			break
		}
		// It was told to stop reading. If that was to be parked, and can't be, it goes on.
		src.conn.SetReadDeadline(time.Time{})
		if f.park(src) {
			if f.mayReattach() {
				f.pumps--
				f.noneWaits()
				f.enter(inTransit)
				f.mu.Unlock()
				f.reattach()
				return
			}
			break
		}
		f.mu.Unlock()
	}
	f.pumps--
	f.unlockAndFinish()
}

// noneWaits is for a flow in transit: watches that come late leave it alone.
//
// +checklocks:f.mu
func (f *flow) noneWaits() {
	for _, s := range f.sides() {
		if s.state == waiting {
			s.state = flowing
		}
	}
}

// unlockAndFinish is called by each who could be the last to see that the flow is over, is parked, or may
// leave.
//
// +checklocksrelease:f.mu
func (f *flow) unlockAndFinish() {
	next := func() {}
	if f.hasPumps() && f.pumps == 0 {
		switch {
		case f.end != "" || f.down.state == ended && f.up.state == ended:
			f.enter(done)
			next = f.finish
		case f.state == leaving:
			f.noneWaits()
			f.stops.Store(false)
			f.enter(inTransit)
			next = f.depart
		case f.state != parked:
			f.enter(parked)
		}
	}
	f.mu.Unlock()
	next()
}

// move copies from src to the other side. isOver: src's stream has ended, and its end was passed on, or one
// of the sides is broken. Else it was told to stop by a deadline.
func (f *flow) move(src *side) (isOver bool) {
	dst := src.other()
	if src == &f.down {
		if err := f.writeHead(); err != nil {
			return f.broken(dst, err)
		}
	}
	p := pump{relay: f.relay, src: src, dst: dst, moved: src.moved(), limit: int(min(f.o.Buffer, maxPipe))}
	if bad, err := p.run(); err != nil {
		return f.broken(bad, err)
	}
	proper, fault := src.howEnded()
	f.mu.Lock()
	isLast := f.end == "" && dst.state == ended // to end: then finish tells dst
	f.mu.Unlock()
	if proper && (fault != nil || !isLast) {
		if err := dst.closeWrite(); err != nil {
			f.broken(dst, &sideError{"end the stream to", dst.name(), err})
		}
	}
	if fault != nil {
		return f.broken(src, &sideError{"read from", src.name(), fault})
	}
	watchForReset(src)
	return true
}

// howEnded says what it means that a read from s gave no byte. proper: the stream has ended. If not, a reset,
// or another fault, has cut it off, and somebody else was told. fault is such an end, or one that has come
// behind the proper one.
func (s *side) howEnded() (proper bool, fault error) {
	s.flow.mu.Lock()
	fault = s.fault
	s.flow.mu.Unlock()
	gone := s.gone()
	// A read gives the error first, but behind a FIN. It is looked for last, so that a reset which comes
	// meanwhile is one behind the end, too.
	if err := s.takeError(); err != nil {
		return true, err
	}
	switch {
	case fault != nil:
		// A write was told. Whether a FIN had come before is not known: EPIPE would say so, but splice(2)
		// gives that also when it has swallowed the error, for having written a part. A wrong end would be
		// worse than none.
		return false, fault
	case gone:
		return false, syscall.ECONNRESET
	}
	return true, nil
}

// finish closes both sides and reports. Nothing of the flow runs any more, but for what may still cut it.
func (f *flow) finish() { f.over(f.close()) }

// over reports a flow whose sides are closed.
func (f *flow) over(end End, err error) {
	f.disarm()
	up, down := f.counters.Load()
	f.report(Result{Up: up, Down: down, End: end, Err: err, Datapath: userspace})
}

// report says how f has ended.
func (f *flow) report(r Result) {
	if f.recorded != nil {
		r.Datapath = f.recorded.name
	}
	f.forgetRecord()
	f.counters.flow.Store(nil)
	f.counters.endLeave(r.End)
	f.done(r)
}

// forgetRecord takes f, which goes on nowhere here, out of the tables of the datapath that has it there.
func (f *flow) forgetRecord() {
	if f.recorded != nil {
		f.recorded.forget()
	}
}

// writeHead writes, once, what comes before the first byte that is read.
func (f *flow) writeHead() error {
	for f.hasHead() {
		bufs := net.Buffers{f.o.Preface, f.o.Head}
		n, err := bufs.WriteTo(f.up.conn)
		p := min(int(n), len(f.o.Preface))
		f.counters.up.Add(n - int64(p))
		f.o.Preface, f.o.Head = f.o.Preface[p:], f.o.Head[int(n)-p:]
		if err != nil && !(errors.Is(err, os.ErrDeadlineExceeded) && f.stayAwhile(&f.down)) {
			return &sideError{"write to", f.up.name(), err}
		}
	}
	f.o.Preface, f.o.Head = nil, nil // they need not stay in memory for as long as the flow
	return nil
}

// hasHead: there is something left of what comes before the first byte that is read.
func (f *flow) hasHead() bool { return len(f.o.Preface)+len(f.o.Head) > 0 }

// closeWrite ends our stream to s. Once it has, it does nothing.
func (s *side) closeWrite() error {
	if s.isShut.Swap(true) {
		return nil
	}
	if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	s.flow.mu.Lock()
	defer s.flow.mu.Unlock()
	s.state = ended // no half-close: end the other direction too
	return s.conn.SetReadDeadline(past)
}

// broken says that s can't go on. The direction to it stops. What it has sent before is delivered, for as
// long as the reader goes on, with no pause of tcpsock.ResetGrace. isOver is false if s is not broken but was
// told to stop, by one who knows why.
func (f *flow) broken(s *side, err error) (isOver bool) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	if e := (*sideError)(nil); !tcpsock.IsReset(err) && errors.As(err, &e) {
		// While a reset comes in, epoll may tell of an error alone, and Go's poller then says "not pollable".
		if reason := s.takeError(); reason != nil {
			err = &sideError{e.op, e.side, reason}
		}
	}
	f.mu.Lock()
	f.breaks(s, err, false)
	f.unlockAndFinish()
	return true
}

// faulty is told by watches that s has an error. While s is read its reader is told of that: taken from under
// it, the error would leave what looks like an end of the stream.
func (f *flow) faulty(s *side) {
	f.mu.Lock()
	if f.state == done {
		f.mu.Unlock()
		return
	}
	err, isGuess := error(syscall.ECONNRESET), s.state != ended
	if !isGuess {
		err = cmp.Or(s.takeError(), err)
	}
	f.breaks(s, &sideError{"watch", s.name(), err}, isGuess)
	f.unlockAndFinish()
}

// breaks notes that s can't go on.
//
// +checklocks:f.mu
func (f *flow) breaks(s *side, err error, isGuess bool) {
	f.unstop()
	if f.end == "" || f.isGuess && s.fault == f.err {
		f.end, f.err, f.isGuess = EndError, err, isGuess
		if tcpsock.IsReset(err) {
			f.end = End(s.name() + "_reset")
		}
		s.fault = err
	}
	if s.fault == nil {
		s.fault = err
	}
	if f.reader == nil {
		f.reader = &reader{taken: f.acknowledged(s.other()), takenAt: time.Now()}
		f.reader.recheck = time.AfterFunc(tcpsock.ResetGrace, func() { f.cutIfStopped(s.other()) })
	}
	s.conn.SetWriteDeadline(past)
	s.other().conn.SetReadDeadline(past)
	f.beginToEnd()
}

// cutIfStopped ends the delivery to a reader that has acknowledged nothing since the last look, and has no
// room, or has acknowledged nothing for very long.
func (f *flow) cutIfStopped(s *side) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.reader
	if n := f.acknowledged(s); n != r.taken {
		r.taken, r.takenAt = n, time.Now()
		r.recheck.Reset(tcpsock.ResetGrace)
		return
	}
	if !s.refuses() && time.Since(r.takenAt) < tcpsock.TCPGrace {
		r.recheck.Reset(tcpsock.ResetGrace)
		return
	}
	f.isCut = true
	f.wake()
}

// acknowledged is how many bytes of the flow the other end of s has, give or take what else it was sent.
func (f *flow) acknowledged(s *side) int64 {
	up, down := f.counters.Load()
	if s == &f.up {
		return up - int64(s.unacked())
	}
	return down - int64(s.unacked())
}

// abort ends the flow now, unless it has left for a loop, where others see to that, or is done.
func (f *flow) abort(end End, err error) {
	f.mu.Lock()
	if f.state != inTransit && !f.hasPumps() {
		f.mu.Unlock()
		return
	}
	if f.end == "" {
		f.end, f.err = end, err
	}
	f.isCut = true
	f.wake()
	f.beginToEnd()
	f.unlockAndFinish()
}

// beginToEnd has pumps deliver what is wanted of a flow that is to end, and leaves no side parked. Where
// pumps don't have it, whoever does sees that it ends.
//
// +checklocks:f.mu
func (f *flow) beginToEnd() {
	if f.hasPumps() && f.state != ending {
		f.enter(ending)
	}
	for _, s := range f.sides() {
		switch {
		case s.state != waiting:
		case f.wants(s):
			f.startPump(s)
		default:
			s.state = ended
		}
	}
}

// wake makes both pumps return.
func (f *flow) wake() {
	f.down.conn.SetDeadline(past)
	f.up.conn.SetDeadline(past)
}

// A sideError says what failed on which side.
type sideError struct {
	op, side string
	err      error
}

func (e *sideError) Error() string {
	err := e.err
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err // without the addresses: the flow's log line has them
	}
	return e.op + " " + e.side + ": " + err.Error()
}

func (e *sideError) Unwrap() error { return e.err }

// close closes both sides, in the way that tells them how the flow ended.
func (f *flow) close() (end End, err error) {
	unwatch(&f.down)
	unwatch(&f.up)
	f.mu.Lock()
	f.end = cmp.Or(f.end, EndEOF)
	end, err = f.end, f.err
	f.mu.Unlock()
	for _, s := range f.sides() {
		if end == EndEOF {
			if s.isBare {
				s.closeWrite() // to close it tells nobody while another process has a copy
			}
			s.conn.Close()
			continue
		}
		s.drain()
		tcpsock.ResetConn(s.conn)
	}
	return end, err
}

// drain waits until the other end of s has acknowledged all that it was sent, if s is not broken, or until
// the flow is cut.
func (s *side) drain() {
	waits := func() bool {
		s.flow.mu.Lock()
		defer s.flow.mu.Unlock()
		return !s.flow.isCut && s.fault == nil
	}
	for wait := time.Millisecond; waits() && s.unacked() > 0; wait = min(2*wait, 50*time.Millisecond) {
		time.Sleep(wait)
	}
}
