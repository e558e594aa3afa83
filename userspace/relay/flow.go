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
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// resetGrace is how long the reader of bytes that were received before a reset may stop, before it is
// reset as well. One that goes on reading gets all of them.
const resetGrace = 2 * time.Second

// tcpGrace is the same where the reader has room, and TCP brings it nothing: it paces, or it retransmits to a
// network that is silent. After a silence of 8 s it tries again within 13 s, or 15 s on a slow path.
const tcpGrace = 30 * time.Second

// past is a deadline that wakes whoever waits.
var past = time.Unix(1, 0)

// A streamState is how far the stream that a side sends has come. It survives every change of hands.
//
//	flowing <-> parked    by pumps, when the flow is quiet, and when there are bytes
//	flowing  -> ended     by whoever reads the end of the stream
//	either   -> ended     when the flow ends for another reason, and nobody wants the rest
type streamState uint8

const (
	flowing streamState = iota // a loop or a pump reads it, or is about to
	parked                     // watches looks out for its next byte, and nobody reads
	ended                      // nobody reads it any more; its end was passed on, if it had a proper one
)

// A side is one of the flow's two connections.
type side struct {
	flow  *flow
	conn  net.Conn
	sock  syscall.RawConn // the socket under conn, or nil
	bare  bool            // conn is the socket itself, and can be read by way of sock
	state streamState     // guarded by the loop's mutex while the flow is on one, else by flow.mu
	shut  atomic.Bool     // our stream to it has ended, or is about to

	socket *loop.Socket // while the flow is on a loop
	rest   []byte       // read from it there, and not yet written
	tried  bool         // its stream is on trial no more: see trial_linux.go; guarded as the stream is
	spared bool         // what is written on trial is kept short; as tried
	pieces int          // in a row that were read on trial, on a loop, and were full

	held       atomic.Int64 // bytes of its stream that its pump has no room for
	stoodAt    int64        // how many were moved when MeasureHeld looked
	stoodSince int64        // and since when no more; Unix time in ns, 0 is never

	fault error // why it can't go on: the first reason, nil while it can; guarded by flow.mu

	// guarded by watches.mu
	watch   uint64 // its id there, or 0
	watched uint32 // what is looked out for
}

// A flow is two sides, and a pump for each stream that has not ended and is not parked.
type flow struct {
	relay    *Relay
	down, up side
	counters *Counters
	o        Options
	ctx      context.Context
	done     func(Result)
	uncancel func() bool // unhooks ctx
	onLoop   atomic.Bool // set by who has the loop

	mu        sync.Mutex
	pumps     int  // that run
	over      bool // somebody has seen to finish
	noPark    bool // it does not work
	noCalm    bool // no loop can have the flow again
	parking   bool // its pumps were told to return as soon as they have nothing to write
	guessed   bool // end and err are what is likely: whoever reads from the broken side will know
	cut       bool // nothing is delivered any more
	end       End  // the first reason wins
	err       error
	grace     *time.Timer // looks whether the reader of a broken flow goes on
	delivered int64       // what that reader has acknowledged
	takenAt   time.Time   // when that was seen first

	recorded *holder // the datapath that has the flow in its tables; nil: none
	prefers  bool    // to be in that one
	talk     talk    // on a loop

	tick  *time.Timer // nil while nobody looks for idleness
	seen  int64       // bytes moved both ways, when they had last changed
	since time.Time   // when that was seen

	calmSeen  int64     // bytes moved both ways, at calmSince
	calmSince time.Time // when pumps were last asked whether they move much
}

func (r *Relay) newFlow(ctx context.Context, down, up net.Conn, o Options, done func(Result)) *flow {
	f := &flow{relay: r, ctx: ctx, o: o, done: done, counters: o.Counters}
	f.pumps = 1 // not yet one, but nobody may finish the flow before userspace is called
	if f.counters == nil {
		f.counters = new(Counters)
	}
	f.counters.flow.Store(f)
	if f.o.Buffer <= 0 {
		f.o.Buffer = DefaultBuffer
	}
	if down != nil {
		f.down.init(f, down)
		f.up.init(f, up)
		f.down.keepUrgent()
		f.up.keepUrgent()
	}
	return f
}

func (s *side) init(f *flow, c net.Conn) {
	s.flow, s.conn = f, c
	s.sock, s.bare = socket(c)
}

// socket finds the socket under c. bare: there is nothing else in between.
func socket(c net.Conn) (sock syscall.RawConn, bare bool) {
	bare = true
	for {
		switch s := c.(type) {
		case *net.TCPConn, *net.UnixConn, sockConn:
			sock, err := s.(syscall.Conn).SyscallConn()
			if err != nil {
				return nil, false
			}
			return sock, bare
		case interface{ NetConn() net.Conn }: // *tls.Conn
			c, bare = s.NetConn(), false
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

func (s *side) resetEnd() End {
	if s == &s.flow.down {
		return EndDownstreamReset
	}
	return EndUpstreamReset
}

// run offers the flow to the kernel datapaths, or begins to relay it here.
func (f *flow) run() {
	f.arm()
	if f.canOffer() {
		if err := f.writeHead(); err != nil {
			f.broken(&f.up, err)
		} else if f.offer() {
			return
		}
	}
	if !f.ending() && f.attach() {
		return
	}
	f.userspace()
}

// sides are down and up.
func (f *flow) sides() [2]*side { return [2]*side{&f.down, &f.up} }

// userspace relays here, with a pump for each stream that is still to be delivered, until they have ended or
// are parked.
func (f *flow) userspace() {
	f.mu.Lock()
	var own *side // pumped by this goroutine, whose stack has grown already
	for _, s := range f.sides() {
		switch {
		case s.state == ended:
			watchForReset(s)
		case !f.wants(s):
			s.state = ended
		case own == nil:
			own = s
		default:
			f.startPump(s)
		}
	}
	if own == nil {
		f.pumps--
		f.unlockAndFinish()
		return
	}
	f.mu.Unlock()
	f.pump(own)
}

// wants reports whether what src sends is still to be delivered: always until the flow is to end, and then
// what a broken src has sent before. It is called with f.mu held.
func (f *flow) wants(src *side) bool {
	if src.state == ended || f.cut {
		return false
	}
	return f.end == "" || src.fault != nil && src.other().fault == nil
}

// startPump is called with f.mu held.
func (f *flow) startPump(src *side) {
	src.state = flowing
	f.pumps++
	go f.pump(src)
}

// pump moves what comes from src until that ends, is parked, or is not wanted any more.
func (f *flow) pump(src *side) {
	for {
		over := f.move(src)
		f.mu.Lock()
		if over || !f.wants(src) {
			src.state = ended
			break
		}
		// It was told to stop reading. If that was to be parked, and can't be, it goes on.
		src.conn.SetReadDeadline(time.Time{})
		if f.park(src) {
			if f.mayCalmDown() {
				f.down.state, f.up.state = flowing, flowing
				f.mu.Unlock()
				f.calmDown()
				return
			}
			break
		}
		f.mu.Unlock()
	}
	f.pumps--
	f.unlockAndFinish()
}

// unlockAndFinish is called with f.mu held, by each who could be the last to see that the flow is over.
func (f *flow) unlockAndFinish() {
	last := !f.over && f.pumps == 0 && (f.end != "" || f.down.state == ended && f.up.state == ended)
	f.over = f.over || last
	f.mu.Unlock()
	if last {
		f.finish()
	}
}

// move copies from src to the other side. over: src's stream has ended, and its end was passed on, or one of
// the sides is broken. Else it was told to stop by a deadline.
func (f *flow) move(src *side) (over bool) {
	dst, moved := src.other(), &f.counters.down
	if src == &f.down {
		moved = &f.counters.up
		if err := f.writeHead(); err != nil {
			return f.broken(dst, err)
		}
	}
	p := pump{relay: f.relay, src: src, dst: dst, moved: moved, limit: int(min(f.o.Buffer, maxPipe))}
	if bad, err := p.run(); err != nil {
		return f.broken(bad, err)
	}
	proper, fault := src.howEnded()
	if proper && (fault != nil || !f.lastToEnd(src)) { // else finish closes both, which tells dst
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

// lastToEnd reports whether the end of src's stream is all that was missing.
func (f *flow) lastToEnd(src *side) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.end == "" && src.other().state == ended
}

// finish closes both sides and reports. Nothing of the flow runs any more, but for what may still cut it.
func (f *flow) finish() {
	f.close()
	f.disarm()
	up, down := f.counters.Load()
	f.mu.Lock()
	r := Result{Up: up, Down: down, End: f.end, Err: f.err, Datapath: userspace}
	f.mu.Unlock()
	f.report(r)
}

// report says how f has ended.
func (f *flow) report(r Result) {
	f.counters.flow.Store(nil)
	f.done(r)
}

// writeHead writes, once, what comes before the first byte that is read.
func (f *flow) writeHead() error {
	preface, head := f.o.Preface, f.o.Head
	if len(preface)+len(head) == 0 {
		return nil
	}
	f.o.Preface, f.o.Head = nil, nil // they need not stay in memory for as long as the flow
	bufs := net.Buffers{preface, head}
	n, err := bufs.WriteTo(f.up.conn)
	f.counters.up.Add(max(0, n-int64(len(preface))))
	if err != nil {
		return &sideError{"write to", f.up.name(), err}
	}
	return nil
}

// closeWrite ends our stream to s. Once it has, it does nothing.
func (s *side) closeWrite() error {
	if s.shut.Swap(true) {
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
// long as the reader goes on, with no pause of resetGrace. over is false if s is not broken but was told to
// stop, by one who knows why.
func (f *flow) broken(s *side, err error) (over bool) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	if e := (*sideError)(nil); !isReset(err) && errors.As(err, &e) {
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
	err, guess := error(syscall.ECONNRESET), s.state != ended
	if !guess {
		err = cmp.Or(s.takeError(), err)
	}
	f.breaks(s, &sideError{"watch", s.name(), err}, guess)
	f.unlockAndFinish()
}

// breaks is called with f.mu held.
func (f *flow) breaks(s *side, err error, guess bool) {
	if f.end == "" || f.guessed && s.fault == f.err {
		f.end, f.err, f.guessed = EndError, err, guess
		if isReset(err) {
			f.end = s.resetEnd()
		}
		s.fault = err
	}
	if s.fault == nil {
		s.fault = err
	}
	if f.grace == nil {
		f.delivered, f.takenAt = f.acknowledged(s.other()), time.Now()
		f.grace = time.AfterFunc(resetGrace, func() { f.cutIfStopped(s.other()) })
	}
	s.conn.SetWriteDeadline(past)
	s.other().conn.SetReadDeadline(past)
	f.wakeParked()
}

// cutIfStopped ends the delivery to a reader that has acknowledged nothing since the last look, and has no
// room, or has acknowledged nothing for very long.
func (f *flow) cutIfStopped(reader *side) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.acknowledged(reader); n != f.delivered {
		f.delivered, f.takenAt = n, time.Now()
		f.grace.Reset(resetGrace)
		return
	}
	if !reader.refuses() && time.Since(f.takenAt) < tcpGrace {
		f.grace.Reset(resetGrace)
		return
	}
	f.cut = true
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

// abort ends the flow now.
func (f *flow) abort(end End, err error) {
	f.mu.Lock()
	if f.end == "" {
		f.end, f.err = end, err
	}
	f.cut = true
	f.wake()
	f.wakeParked()
	f.unlockAndFinish()
}

// wakeParked leaves no side parked, since the flow is to end. It is called with f.mu held.
func (f *flow) wakeParked() {
	for _, s := range f.sides() {
		switch {
		case s.state != parked:
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

// ending reports whether there is a reason for the flow to end, other than that both sides have.
func (f *flow) ending() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.end != ""
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

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, syscall.ENOTCONN)
}

// close closes both sides, in the way that tells them how the flow ended.
func (f *flow) close() {
	unwatch(&f.down)
	unwatch(&f.up)
	f.mu.Lock()
	proper := f.end == ""
	if proper {
		f.end = EndEOF
	}
	f.mu.Unlock()
	for _, s := range f.sides() {
		if proper {
			s.conn.Close()
			continue
		}
		s.drain()
		tcpsock.ResetConn(s.conn)
	}
}

// drain waits until the other end of s has acknowledged all that it was sent, if s is not broken, or until
// the flow is cut.
func (s *side) drain() {
	waits := func() bool {
		s.flow.mu.Lock()
		defer s.flow.mu.Unlock()
		return !s.flow.cut && s.fault == nil
	}
	for wait := time.Millisecond; waits() && s.unacked() > 0; wait = min(2*wait, 50*time.Millisecond) {
		time.Sleep(wait)
	}
}
