package relay

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// resetGrace bounds how long bytes that were received before a reset may take to reach the other
// side, before that is reset as well. End to end, TCP would not have waited at all.
const resetGrace = 2 * time.Second

// past is a deadline that wakes whoever waits.
var past = time.Unix(1, 0)

// A side is one of the flow's two connections.
type side struct {
	flow *flow
	conn net.Conn
	sock syscall.RawConn // the socket under conn, or nil
	bare bool            // conn is the socket itself, and can be read by way of sock
	dead atomic.Bool     // broken: what reads as an end of stream is none
	shut atomic.Bool     // its stream from us has ended, or is about to

	socket *Socket // while the flow is on a loop, whose mutex then guards this and ended
	rest   []byte  // read from it there, and not yet written

	// guarded by flow.mu
	ended  bool // its stream to us has ended
	parked bool // no pump reads from it: watches looks out for bytes

	// guarded by watches.mu
	watch   uint64 // its id there, or 0
	watched uint32 // what is looked out for
}

// A flow is two sides, and a pump for each stream that has not ended and is not parked.
type flow struct {
	down, up side
	counters *Counters
	o        Options
	ctx      context.Context
	done     func(Result)
	uncancel func() bool // unhooks ctx

	mu      sync.Mutex
	pumps   int  // that run
	over    bool // somebody has seen to finish
	noPark  bool // it does not work
	end     End  // the first reason wins
	err     error
	grace   *time.Timer // until a broken flow is cut off
	late    time.Time   // when that is
	settled bool        // no kernel datapath counts any more

	talk talk // on a loop

	tick  *time.Timer // nil while nobody looks for idleness
	seen  int64       // bytes moved both ways, when they had last changed
	since time.Time   // when that was seen
}

func newFlow(ctx context.Context, down, up net.Conn, o Options, done func(Result)) *flow {
	f := &flow{ctx: ctx, o: o, done: done, counters: o.Counters}
	f.pumps = 1 // not yet one, but nobody may finish the flow before userspace is called
	if f.counters == nil {
		f.counters = new(Counters)
	}
	if f.o.Buffer <= 0 {
		f.o.Buffer = DefaultBuffer
	}
	if down != nil {
		f.down.init(f, down)
		f.up.init(f, up)
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
	if !f.ending() && f.quicken() {
		return
	}
	f.userspace()
}

// userspace relays here, at least until downstream's stream has ended or the flow is parked.
func (f *flow) userspace() {
	f.mu.Lock()
	if f.end != "" {
		f.pumps--
		f.unlockAndFinish()
		return
	}
	f.startPump(&f.up)
	f.mu.Unlock()
	f.pump(&f.down) // this goroutine's stack has grown already
}

// startPump is called with f.mu held.
func (f *flow) startPump(src *side) {
	f.pumps++
	go f.pump(src)
}

// pump moves what comes from src until that ends, or there is a reason to stop.
func (f *flow) pump(src *side) {
	ended := f.move(src)
	f.mu.Lock()
	f.pumps--
	if f.end == "" && !ended && f.parkable() {
		f.park(src)
	} else {
		src.ended = true
	}
	f.unlockAndFinish()
}

// unlockAndFinish is called with f.mu held, by each who could be the last to see that the flow is over.
func (f *flow) unlockAndFinish() {
	last := !f.over && f.pumps == 0 && (f.end != "" || f.down.ended && f.up.ended)
	f.over = f.over || last
	f.mu.Unlock()
	if last {
		f.finish()
	}
}

// move copies from src to the other side, and reports whether src's stream has ended and the end is passed on.
func (f *flow) move(src *side) (ended bool) {
	dst, moved := src.other(), &f.counters.down
	if src == &f.down {
		moved = &f.counters.up
		if err := f.writeHead(); err != nil {
			f.broken(dst, err)
			return false
		}
	}
	p := pump{src: src, dst: dst, moved: moved, limit: int(min(f.o.Buffer, maxPipe))}
	if bad, err := p.run(); err != nil {
		f.broken(bad, err)
		return false
	}
	if src.dead.Load() || src.gone() {
		f.broken(src, &sideError{"read from", src.name(), syscall.ECONNRESET})
		return false
	}
	if f.lastToEnd(src) {
		return true // finish closes both, which tells dst
	}
	dst.shut.Store(true)
	if err := dst.closeWrite(); err != nil {
		f.broken(dst, &sideError{"end the stream to", dst.name(), err})
		return false
	}
	watchForReset(src)
	return true
}

// lastToEnd reports whether the end of src's stream is all that was missing.
func (f *flow) lastToEnd(src *side) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.end == "" && src.other().ended
}

// finish closes both sides and reports. Nothing of the flow runs any more.
func (f *flow) finish() {
	f.disarm()
	f.close()
	up, down := f.counters.Load()
	f.done(Result{Up: up, Down: down, End: f.end, Err: f.err, Datapath: userspace})
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

// closeWrite ends our stream to s.
func (s *side) closeWrite() error {
	if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return s.conn.SetReadDeadline(past) // no half-close: end the other direction too
}

// broken says that s can't go on. The direction to it stops; the direction from it has until resetGrace
// to deliver what was received.
func (f *flow) broken(s *side, err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return // not broken but told to stop, by one who knows why
	}
	s.dead.Store(true)
	end := EndError
	if isReset(err) {
		end = s.resetEnd()
	}
	f.mu.Lock()
	if f.end == "" {
		f.end, f.err = end, err
		f.grace = time.AfterFunc(resetGrace, f.wake)
		f.late = time.Now().Add(resetGrace)
	}
	s.conn.SetWriteDeadline(past)
	s.other().conn.SetReadDeadline(past)
	f.unlockAndFinish()
}

// abort ends the flow now.
func (f *flow) abort(end End, err error) {
	f.mu.Lock()
	if f.end == "" {
		f.end, f.err = end, err
	}
	f.late = time.Time{}
	f.wake()
	f.unlockAndFinish()
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
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}

// close closes both sides, in the way that tells them how the flow ended.
func (f *flow) close() {
	unwatch(&f.down)
	unwatch(&f.up)
	f.mu.Lock()
	late := f.late
	if f.end == "" {
		f.end = EndEOF
		f.mu.Unlock()
		f.down.conn.Close()
		f.up.conn.Close()
		return
	}
	f.mu.Unlock()
	for _, s := range []*side{&f.down, &f.up} {
		if !s.dead.Load() {
			s.drain(f.ctx, late)
		}
		s.reset()
	}
}

// drain waits until the other end has acknowledged all that it was sent, or until late.
func (s *side) drain(ctx context.Context, late time.Time) {
	for wait := time.Millisecond; s.unacked() > 0 && time.Now().Before(late) && ctx.Err() == nil; wait = min(2*wait, 50*time.Millisecond) {
		time.Sleep(wait)
	}
}

// reset closes s so that the other end sees a reset, where there is such a thing.
func (s *side) reset() {
	c := s.conn
	for {
		switch u := c.(type) {
		case interface{ SetLinger(int) error }: // *net.TCPConn, or a socket that was on a loop
			u.SetLinger(0)
			c.Close()
			if c != s.conn {
				s.conn.Close()
			}
			return
		case interface{ NetConn() net.Conn }:
			c = u.NetConn()
		default:
			s.conn.Close()
			return
		}
	}
}
