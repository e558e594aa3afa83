package loader

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What a half can be woken for; more than one at a time.
const (
	running uint32 = 1 << iota // a goroutine is at it
	again                      // look again
	ended                      // the source's stream has ended (EPOLLRDHUP)
)

// strongOrder: an atomic add in BPF is a full barrier.
const strongOrder = runtime.GOARCH == "amd64" || runtime.GOARCH == "386"

// lookAgain is for a half that goes to sleep after it has copied: look is called when what the verdict stored
// before can be seen, and what the half stored could be seen by the verdict. nil where that is so at once.
func lookAgain() func(look func()) {
	if strongOrder {
		return nil
	}
	return func(look func()) { time.AfterFunc(time.Millisecond, look) }
}

// chunk is how much is copied at a time, in bytes.
const chunk = 128 << 10

// turns is how often a half copies before it lets others in between.
const turns = 8

// chunks are the buffers of halves that copy. A half that redirects has none.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// half is one direction: what userspace does for it. The verdict does the rest, see bpf/splice.bpf.c for the
// protocol.
//
// It is an actor without a goroutine of its own: wake starts one, which works until there is nothing to do.
type half struct {
	f       *flow
	i       uint32 // 0: downstream to upstream
	bits    atomic.Uint32
	copying atomic.Bool // the source has no verdict: everything is moved here
	done    atomic.Bool // the end was passed on

	read0    uint64 // bytes of the source's stream that were read before
	written0 uint64 // bytes that the peer's TCP had been given before

	// Only for who is running.
	buffer    *[]byte
	rest      []byte // read, not yet written; in buffer
	held      bool   // rest must wait until what was redirected before it has been written
	fin       bool
	eof       bool // a read said so
	hasCopied bool // something, since it last had nothing to copy
	consumed  uint64
	settled   uint64 // what redirected was when it was last found written
	patience  time.Duration

	leaving

	timed atomic.Bool // a timer will wake it

	// The sweeper's.
	still  uint64    // what consumed was at its last look, and 1; 0: nothing was passed
	seen   uint64    // what had moved
	since  time.Time // when that was seen first
	looked bool      // for a stall, since
}

func (h *half) init(f *flow, i uint32, read uint64) { h.f, h.i, h.read0 = f, i, read }

// shared is the half's part of the map. Valid until the flow is closed.
func (h *half) shared() *spliceHalf { return &h.f.l.halves[2*h.f.slot+h.i] }

// resume makes the half go on from where an earlier stay of the flow's here has left it.
func (h *half) resume(redirected, copied, trimmed uint64) {
	m, n := h.shared(), redirected+copied
	m.Redirected, m.Passed, m.Consumed, m.Trimmed = redirected, copied, copied, uint32(trimmed)
	h.consumed, h.settled = copied, redirected
	h.read0, h.written0 = h.read0-n, h.written0-n
	h.f.before[h.i] -= int64(n)
}

func (h *half) source() socket { return h.f.sockets[h.i] }
func (h *half) peer() socket   { return h.f.sockets[1-h.i] }

// moved is how many bytes were given to the peer.
func (h *half) moved() uint64 {
	m := h.shared()
	return load64(&m.Redirected) + load64(&m.Consumed) + h.f.process.moved(h.i)
}

// byTCP is how many bytes the peer's TCP was given, or will be when the worker comes to them.
func (h *half) byTCP() uint64 {
	m := h.shared()
	n := load64(&m.Redirected) + load64(&m.Consumed)
	if h.i == 1 { // what a process gets past TCP, upstream never sees
		n += h.f.process.moved(1)
	}
	return n
}

type snapshot struct{ redirected, passed, trimmed, local uint64 }

func (h *half) snapshot() snapshot {
	m := h.shared()
	if h.copying.Load() { // there is no verdict that counts
		return snapshot{load64(&m.Redirected), load64(&m.Consumed), uint64(atomic.LoadUint32(&m.Trimmed)),
			h.f.process.moved(h.i)}
	}
	return snapshot{load64(&m.Redirected), load64(&m.Passed), uint64(atomic.LoadUint32(&m.Trimmed)),
		h.f.process.moved(h.i)}
}

func (s snapshot) into(before uint64, bytes, redirected, passed, trimmed, local *uint64) {
	*bytes = before + s.redirected + s.passed + s.local
	*redirected, *passed, *trimmed, *local = s.redirected, s.passed, s.trimmed, s.local
}

// wake makes somebody look at the half soon. It never blocks.
func (h *half) wake(why uint32) {
	if h.bits.Or(why|again|running)&running == 0 {
		go h.run()
	}
}

func (h *half) run() {
	for !h.turn() {
	}
}

// turn makes a step. idle: there is nothing to do, and nobody at the half any more.
func (h *half) turn() (idle bool) {
	if bits := h.bits.And(^(again | ended)); bits&ended != 0 {
		h.fin = true
	}
	h.step()
	return h.bits.CompareAndSwap(running, 0)
}

// what a step found out, to be done without the lock
type outcome struct {
	fault    spliceFault
	broken   error // a socket said so, that of side
	side     uint32
	finish   bool // a broken flow has nothing more to deliver
	halfDone bool
	giveBack bool
	after    time.Duration // look again then
}

func (h *half) step() {
	f := h.f
	f.mu.RLock()
	if f.closed {
		f.mu.RUnlock()
		return
	}
	o := h.work()
	if o.broken != nil {
		f.breaks(o.side, o.broken)
	}
	f.mu.RUnlock()
	h.timed.Store(o.after > 0)
	switch {
	case o.fault != 0:
		f.fault(h.i, o.fault)
	case o.broken != nil:
		f.breakUp(o.side, o.broken)
	case o.finish:
		f.finish(f.broken.Load().end())
	case o.halfDone:
		h.done.Store(true)
		f.halfDone()
	case o.giveBack:
		f.giveBack()
		h.wake(0) // it may not have been possible
	case o.after > 0:
		time.AfterFunc(o.after, func() { h.wake(0) })
	default:
		h.patience = 0
	}
}

func (h *half) work() outcome {
	b := h.f.broken.Load()
	if b != nil && b.side != h.i { // its reader is dead
		h.release()
		return outcome{}
	}
	if h.i == 1 && b == nil && h.f.process.closedUnread() {
		return outcome{broken: unix.ECONNRESET, side: 1}
	}
	if h.done.Load() && b == nil {
		return outcome{}
	}
	if why := spliceFault(atomic.LoadUint32((*uint32)(&h.shared().Fault))); why != 0 && b == nil {
		if why == spliceFaultFAULT_RESET {
			return outcome{broken: unix.ECONNRESET, side: h.i}
		}
		return outcome{fault: why}
	}
	if !h.done.Load() {
		if o, wait := h.copy(); wait {
			if b != nil && h.readerStopped(b) {
				return outcome{finish: true}
			}
			if b != nil && o.after == 0 {
				o.after = h.patient(20 * time.Millisecond)
			}
			return o
		}
	}
	if b == nil && h.f.broken.Load() != nil {
		return outcome{} // who broke it meanwhile wakes the half whose source is dead
	}
	if b != nil {
		// An end came before the reset, if that is none which only we know of.
		if !h.done.Load() && h.redirectedIsWritten() && !h.isCut() &&
			!(h.i == 1 && h.f.process.closedUnread()) {
			h.peer().closeWrite()
			h.done.Store(true)
		}
		if h.delivered() || h.readerStopped(b) {
			return outcome{finish: true}
		}
		return outcome{after: h.patient(20 * time.Millisecond)}
	}
	if !h.fin && !h.eof {
		return outcome{}
	}
	if h.f.l.rules.drain && !h.drained() {
		return outcome{after: h.patient(20 * time.Millisecond)}
	}
	h.peer().closeWrite()
	return outcome{halfDone: true}
}

// patient is how long to wait before the next look at something that is about to happen.
func (h *half) patient(most time.Duration) time.Duration {
	h.patience = min(max(2*h.patience, 50*time.Microsecond), most)
	return h.patience
}

// A move is what a half can do next for the bytes that were passed.
type move int

const (
	goOn  move = iota // it has moved something, and there may be more
	sleep             // it goes on when it is woken
	idle              // there is nothing to move
)

// copy moves what was passed, while there is any. wait: it has to go on later, when woken.
func (h *half) copy() (o outcome, wait bool) {
	for range turns {
		switch o, next := h.next(); next {
		case sleep:
			return o, true
		case idle:
			h.rests()
			return outcome{}, false
		}
	}
	h.bits.Or(again) // whoever wants to close the flow gets the lock in between
	return outcome{}, true
}

// next makes one move. The order is the protocol: what was read before is written before anything else is
// read, and nothing is read before what was redirected is written.
func (h *half) next() (outcome, move) {
	m := h.shared()
	if err := h.takeOffer(); err != nil {
		return outcome{broken: err, side: h.i}, sleep
	}
	switch {
	case len(h.rest) > 0:
		return h.writeRest()
	case h.eof:
		return outcome{}, idle
	case !h.copying.Load() && load64(&m.Passed) == h.consumed:
		return outcome{}, idle // the verdict redirects again
	case h.f.l.rules.order && load64(&m.Redirected) != h.settled && !h.redirectedIsWritten():
		// Else both would wait, and be more than Limit.
		return outcome{after: h.patient(10 * time.Millisecond)}, sleep
	case h.left.Load() && h.readyToReturn():
		return outcome{giveBack: true}, sleep
	}
	return h.readPassed()
}

// writeRest writes what was read before.
func (h *half) writeRest() (outcome, move) {
	if h.held && !h.redirectedIsWritten() {
		return outcome{after: h.patient(10 * time.Millisecond)}, sleep
	}
	h.held, h.patience = false, 0
	n, err := h.peer().write(h.rest)
	h.rest = h.rest[n:]
	h.consumed, h.hasCopied = h.consumed+uint64(n), true
	// A release: the verdict may redirect from here on, behind what was just written.
	atomic.StoreUint64(&h.shared().Consumed, h.consumed)
	if len(h.rest) == 0 || err != nil && !isAgain(err) {
		h.openHand()
	}
	switch {
	case isAgain(err):
		return h.awaitRoom(), sleep
	case err != nil: // the peer is dead
		h.rest = nil
		return outcome{broken: err, side: 1 - h.i}, sleep
	}
	return outcome{}, goOn
}

// readPassed reads what was passed, or what comes if there is no verdict any more.
func (h *half) readPassed() (outcome, move) {
	m, f := h.shared(), h.f
	if h.buffer == nil {
		h.buffer = chunks.Get().(*[]byte)
	}
	b := *h.buffer
	if limit := atomic.LoadUint32(&m.Limit); uint32(len(b)) > limit && limit > 0 {
		b = b[:limit]
	}
	n, err := h.source().read(b)
	switch {
	case n > 0:
		// Only now: the source's lock, which read took, makes all that was redirected before these bytes
		// visible.
		h.rest = b[:n]
		h.held = f.l.rules.order &&
			(load64(&m.Redirected) != h.settled || h.i == 0 && f.process.isComing())
		return outcome{}, goOn
	case isAgain(err):
		if h.copying.Load() || load64(&m.Passed) != h.consumed {
			// Passed, and not in the queue yet.
			f.watchAlso(h.i, unix.EPOLLIN, true)
			return outcome{}, sleep
		}
		return outcome{}, idle
	case err == nil && !h.copying.Load():
		if load64(&m.Passed) != h.consumed {
			// The stream has ended, and bytes that were passed are still in the backlog, behind some that
			// go the other way: what looks like the end of the stream is none.
			return outcome{after: h.patient(10 * time.Millisecond)}, sleep
		}
		return outcome{}, idle
	}
	h.eof = true
	if err == nil && h.isCut() {
		err = unix.ECONNRESET
	}
	if err != nil && f.broken.Load() == nil {
		return outcome{broken: err, side: h.i}, sleep
	}
	return outcome{}, idle
}

// rests is for a half that has nothing to move.
func (h *half) rests() {
	if h.hasCopied && h.f.l.rules.again != nil {
		// The verdict's add to passed may not be visible yet, and it may not have seen our consumed either.
		h.f.l.rules.again(func() { h.wake(0) })
	}
	h.hasCopied = false
	h.release()
	h.f.watchAlso(h.i, unix.EPOLLIN, false)
	h.f.watchAlso(1-h.i, unix.EPOLLOUT, false)
}

// isCut is for a half that has moved all that came, which a read of 0 bytes says if it copies: no FIN has
// come. A socket tells of its reset once, and it may have told somebody else: who wrote to it, the worker
// even. To who reads it looks like the end of the stream then.
func (h *half) isCut() bool {
	m := h.shared()
	n := load64(&m.Redirected) + load64(&m.Consumed)
	if h.i == 0 { // but not what a process sends past TCP
		n += h.f.process.moved(0)
	}
	received, err := h.source().received()
	return err == nil && received-h.read0-1 != n
}

// awaitRoom: until there is some, what the source has is no reason to look, and there may be a look for every
// segment that comes.
func (h *half) awaitRoom() outcome {
	h.f.watchAlso(h.i, unix.EPOLLIN, false)
	h.f.watchAlso(1-h.i, unix.EPOLLOUT, true)
	return outcome{}
}

// makeWay lets bytes that were passed get past some that go the other way and wait in front of them, since
// the kernel has one queue for both, for a send buffer to take them: TCP may have cut the buffer down after
// the verdict found room, for lack of memory. It is made larger. Each way must go on without the other: it
// may be for the bytes behind that those before are not read. And what waits there is charged to nobody, so
// the sender is not held up.
func (h *half) makeWay() {
	p := []unix.PollFd{{Fd: int32(h.source()), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p, 0); n > 0 || err != nil {
		return // there is room, and what waits is on its way
	}
	back := &h.f.halves[1-h.i]
	written, err := h.source().written()
	if waiting := int64(back.byTCP() - (written - back.written0)); err == nil && waiting > 0 {
		h.source().widen(int(waiting))
		h.f.l.log.Debug("a send buffer was made larger, for bytes that wait in front of the other way's",
			"flow", h.f.cookies[0], "bytes", waiting)
	}
}

// redirectedIsWritten: the peer's TCP has all bytes of this half that come before h.rest.
func (h *half) redirectedIsWritten() bool {
	if h.i == 0 && h.f.process.isComing() {
		return false
	}
	redirected, given := load64(&h.shared().Redirected), h.byTCP()
	n, err := h.peer().written()
	if err != nil {
		return true
	}
	if int64(n-h.written0-given) < 0 {
		return false
	}
	h.settled = redirected
	return true
}

// handled is how many bytes the verdict was run for.
func (h *half) handled() uint64 {
	m := h.shared()
	n := load64(&m.Redirected) + load64(&m.Passed)
	if h.i == 0 { // what a process sends past TCP, no verdict sees
		n += h.f.process.moved(0)
	}
	return n
}

// drained: all that the source received before its FIN was given to the peer's TCP.
func (h *half) drained() bool {
	m := h.shared()
	if h.copying.Load() {
		return h.eof && len(h.rest) == 0 && h.redirectedIsWritten()
	}
	received, err := h.source().received()
	if err != nil {
		return true
	}
	return received-h.read0-1 == h.handled() && load64(&m.Passed) == h.consumed && h.redirectedIsWritten()
}

// delivered: all that a dead source sent has reached the other side, so that a reset can't take it away.
func (h *half) delivered() bool {
	if !h.copying.Load() {
		// The verdict was not run yet for what came before the insertion, or was kept from it.
		h.source().kick()
		if load64(&h.shared().Passed) != h.consumed {
			return false
		}
	}
	if !h.redirectedIsWritten() {
		return false
	}
	n, err := h.peer().unacked()
	return err != nil || n <= 0
}

// readerStopped is asked again and again of a half whose source is dead: has the other end of its peer taken
// nothing for resetGrace, and has no room, or has it taken nothing for tcpGrace?
func (h *half) readerStopped(b *breakage) bool {
	var i unix.TCPInfo
	if h.peer().info(&i) != nil {
		return true
	}
	now, n := time.Now(), i.Bytes_acked+h.f.process.moved(h.i)
	if b.takenAt.IsZero() || n != b.taken {
		b.taken, b.takenAt = n, now
	}
	stopped := now.Sub(b.takenAt)
	return stopped >= tcpGrace || stopped >= resetGrace && (h.f.process != nil || refuses(&i))
}

// refuses reports whether the other end has no room for what is written: it has said so, and again when it
// was asked. While it has room, or says nothing, it is TCP or the network that holds things up.
func refuses(i *unix.TCPInfo) bool {
	if i.Unacked > 0 { // they are on their way, or the window was closed behind them
		return i.Snd_wnd == 0 && i.Last_ack_recv < uint32(resetGrace.Milliseconds())
	}
	return i.Snd_wnd < i.Snd_mss && i.Backoff > 0 && i.Probes == 0
}

// release gives the buffer back.
func (h *half) release() {
	if h.f.closed {
		h.openHand()
	}
	if h.buffer != nil && len(h.rest) == 0 {
		chunks.Put(h.buffer)
		h.buffer = nil
	}
}
