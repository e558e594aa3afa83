package sockmap

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// What a direction can be woken for; more than one at a time.
const (
	isRunning uint32 = 1 << iota // a goroutine is at it
	wakeAgain                    // look again
	wakeEnded                    // the source's stream has ended (EPOLLRDHUP)
)

// strongOrder: an atomic add in BPF is a full barrier.
const strongOrder = runtime.GOARCH == "amd64" || runtime.GOARCH == "386"

// recheck is for a direction that goes to sleep after it has copied. On processors where a store may be
// seen late, f is called when the direction can see what the verdict stored before, and the verdict what
// the direction did. On others it is not called.
func (l *Engine) recheck(f func()) {
	switch {
	case l.hooks != nil && l.hooks.again != nil:
		l.hooks.again(f)
	case !strongOrder:
		time.AfterFunc(time.Millisecond, f)
	}
}

// chunk is how much is copied at a time, in bytes.
const chunk = 128 << 10

// turns is how often a direction copies before it lets others in between.
const turns = 8

// shortPause is how long a direction waits at most before it writes again to a socket that lacks memory:
// nobody tells when there is some.
const shortPause = 250 * time.Millisecond

// chunks are the buffers of directions that copy. A direction that redirects has none.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// direction is one direction: what userspace does for it. The verdict does the rest, see bpf/verdict.h for
// the protocol.
//
// It is an actor without a goroutine of its own: wake starts one, which works until there is nothing to do.
type direction struct {
	f         *flow
	side      uint32 // 0: downstream to upstream
	bits      atomic.Uint32
	isCopying atomic.Bool // the source has no verdict: everything is moved here
	isDone    atomic.Bool // the end was passed on
	isAtEnd   atomic.Bool // sawEOF, for those who don't run the direction

	read0    uint64 // bytes of the source's stream that were read before
	written0 uint64 // bytes that the peer's TCP had been given before

	// Only for who is running.
	buffer    *[]byte
	rest      []byte // read, not yet written; in buffer
	mustWait  bool   // rest must wait until what was redirected before it has been written
	sawFIN    bool
	sawEOF    bool // a read said so
	hasCopied bool // something, since it last had nothing to copy
	consumed  uint64
	settled   uint64 // the count redirected, when all that it counts was last found written
	patience  time.Duration

	detaching

	hasTimer atomic.Bool // a timer will wake it

	// The sweeper's, under the flow's mu held for reading; or of who has that for writing.
	still      uint64    // what consumed was at its last look, and 1; 0: nothing was passed
	seen       uint64    // what had moved
	since      time.Time // when that was seen first
	wasChecked bool      // for a stall, since
}

// shared is the direction's part of the map. Valid until the flow is closed.
func (d *direction) shared() *sockmapHalf { return &d.f.l.halves[2*d.f.slot+d.side] }

// resume makes the direction go on from where an earlier stay of the flow's here has left it.
func (d *direction) resume(redirected, copied, trimmed uint64) {
	m, n := d.shared(), redirected+copied
	m.Redirected, m.Passed, m.Consumed, m.Trimmed = redirected, copied, copied, uint32(trimmed)
	d.consumed, d.settled = copied, redirected
	d.read0, d.written0 = d.read0-n, d.written0-n
	d.f.before[d.side] -= int64(n)
}

// fault is why the verdict has given the direction up; FAULT_NONE if it has not.
func (d *direction) fault() sockmapFault { return sockmapFault(load32((*uint32)(&d.shared().Fault))) }

func (d *direction) source() socket { return d.f.sockets[d.side] }
func (d *direction) peer() socket   { return d.f.sockets[1-d.side] }

// given is how many bytes went to the peer by the verdict and by userspace, without those that went past TCP.
func (d *direction) given() uint64 {
	m := d.shared()
	return load64(&m.Redirected) + load64(&m.Consumed)
}

// moved is how many bytes were given to the peer, whichever way.
func (d *direction) moved() uint64 { return d.given() + d.f.bypass.Moved(d.side) }

// byTCP is how many bytes the peer's TCP was given, or will be when the worker comes to them.
func (d *direction) byTCP() uint64 {
	n := d.given()
	if d.side == 1 { // what a process gets past TCP, upstream never sees
		n += d.f.bypass.Moved(1)
	}
	return n
}

type snapshot struct{ redirected, passed, trimmed, local uint64 }

func (d *direction) snapshot() snapshot {
	m := d.shared()
	passed := &m.Passed
	if d.isCopying.Load() { // there is no verdict that counts
		passed = &m.Consumed
	}
	return snapshot{load64(&m.Redirected), load64(passed), uint64(load32(&m.Trimmed)), d.f.bypass.Moved(d.side)}
}

func (s snapshot) into(before uint64, bytes, redirected, passed, trimmed, local *uint64) {
	*bytes = before + s.redirected + s.passed + s.local
	*redirected, *passed, *trimmed, *local = s.redirected, s.passed, s.trimmed, s.local
}

// wake makes somebody look at the direction soon. It never blocks.
func (d *direction) wake(why uint32) {
	if d.bits.Or(why|wakeAgain|isRunning)&isRunning == 0 {
		go d.run()
	}
}

func (d *direction) run() {
	for !d.turn() {
	}
}

// turn makes a step. idle: there was nothing more to do, and the direction runs no more.
func (d *direction) turn() (idle bool) {
	if bits := d.bits.And(^(wakeAgain | wakeEnded)); bits&wakeEnded != 0 {
		d.sawFIN = true
	}
	d.step()
	return d.bits.CompareAndSwap(isRunning, 0)
}

// outcome is what follows from a step, to be done without the flow's lock. At most one field is set, and side
// with broken.
type outcome struct {
	fault     sockmapFault
	broken    error         // of the socket of side
	side      uint32        // 0: downstream
	isOver    bool          // a broken flow has nothing more to deliver
	isDone    bool          // the end of the direction's stream was passed on
	givesBack bool          // the flow can be given back
	after     time.Duration // the direction is to be woken after that
}

func (d *direction) step() {
	f := d.f
	f.mu.RLock()
	if f.isClosed {
		f.mu.RUnlock()
		return
	}
	o := d.work()
	if o.broken != nil {
		f.breaks(o.side, o.broken)
	}
	f.mu.RUnlock()
	d.hasTimer.Store(o.after > 0)
	switch {
	case o.fault != 0:
		f.fault(d.side, o.fault)
	case o.broken != nil:
		f.breakUp(o.side, o.broken)
	case o.isOver:
		f.finish(f.broken.Load().end())
	case o.isDone:
		d.isDone.Store(true)
		f.directionDone()
	case o.givesBack:
		f.giveBack()
		d.wake(0) // it may not have been possible
	case o.after > 0:
		time.AfterFunc(o.after, func() { d.wake(0) })
	default:
		d.patience = 0
	}
}

// work does what the state of the flow asks of the direction.
func (d *direction) work() outcome {
	b := d.f.broken.Load()
	switch {
	case b == nil:
		return d.workOpen()
	case b.side == d.side:
		return d.workBroken(b)
	}
	d.release() // its reader is dead
	return outcome{}
}

// workOpen is work while both sides live: the direction's bytes are moved, and then its end is passed on.
func (d *direction) workOpen() outcome {
	if d.side == 1 && d.f.bypass.ClosedUnread() {
		return outcome{broken: unix.ECONNRESET, side: 1}
	}
	if d.isDone.Load() {
		return d.workDone()
	}
	switch why := d.fault(); why {
	case sockmapFaultFAULT_NONE:
	case sockmapFaultFAULT_RESET:
		return outcome{broken: unix.ECONNRESET, side: d.side}
	default:
		return outcome{fault: why}
	}
	o, wait := d.copy()
	switch {
	case wait:
		return o
	case d.f.broken.Load() != nil: // who broke it meanwhile wakes the direction whose source is dead
		return outcome{}
	case !d.sawFIN && !d.sawEOF:
		return outcome{}
	case d.f.l.hooks.Keeps(ruleDrain) && !d.drained():
		return outcome{after: d.patient(20 * time.Millisecond)}
	}
	d.peer().closeWrite()
	return outcome{isDone: true}
}

// workDone is work when the end of the direction was passed on: it leaves the sockmap if the flow was
// recalled.
func (d *direction) workDone() outcome {
	if !d.f.isRecalled.Load() {
		return outcome{}
	}
	if err := d.takeOffer(); err != nil {
		return outcome{broken: err, side: d.side}
	}
	return outcome{givesBack: d.isReadyToo()}
}

// workBroken is work while the source is dead: what it sent before goes to the reader while that goes on
// reading.
func (d *direction) workBroken(b *breakage) outcome {
	if !d.isDone.Load() {
		if o, wait := d.copy(); wait {
			if d.readerStopped(b) {
				return outcome{isOver: true}
			}
			if o.after == 0 {
				o.after = d.patient(20 * time.Millisecond)
			}
			return o
		}
		// An end came before the reset, if that is none which only we know of.
		if d.redirectedIsWritten() && !d.isCut() && !(d.side == 1 && d.f.bypass.ClosedUnread()) {
			d.peer().closeWrite()
			d.isDone.Store(true)
		}
	}
	if d.delivered() || d.readerStopped(b) {
		return outcome{isOver: true}
	}
	return outcome{after: d.patient(20 * time.Millisecond)}
}

// patient is how long to wait before the next look at something that is about to happen.
func (d *direction) patient(most time.Duration) time.Duration {
	d.patience = min(max(2*d.patience, 50*time.Microsecond), most)
	return d.patience
}

// A move is what a direction can do next for the bytes that were passed.
type move int

const (
	goOn  move = iota // it has moved something, and there may be more
	sleep             // it goes on when it is woken
	idle              // there is nothing to move
)

// copy moves what was passed, while there is any. wait: it has to go on later, when woken.
func (d *direction) copy() (o outcome, wait bool) {
	for range turns {
		switch o, next := d.next(); next {
		case sleep:
			return o, true
		case idle:
			d.goIdle()
			return outcome{}, false
		}
	}
	d.bits.Or(wakeAgain) // whoever wants to close the flow gets the lock in between
	return outcome{}, true
}

// next makes one move. The order is the protocol: what was read before is written before anything else is
// read, and nothing is read before what was redirected is written.
func (d *direction) next() (outcome, move) {
	m := d.shared()
	if err := d.takeOffer(); err != nil {
		return outcome{broken: err, side: d.side}, sleep
	}
	switch {
	case len(d.rest) > 0:
		return d.writeRest()
	case d.sawEOF:
		return outcome{}, idle
	case !d.isCopying.Load() && load64(&m.Passed) == d.consumed:
		return outcome{}, idle // the verdict redirects again
	case d.f.l.hooks.Keeps(ruleOrder) && load64(&m.Redirected) != d.settled && !d.redirectedIsWritten():
		// Else both would wait, and be more than Limit.
		return outcome{after: d.patient(10 * time.Millisecond)}, sleep
	case d.isDetached.Load() && d.readyToReturn():
		return outcome{givesBack: true}, sleep
	}
	room := d.peer().room()
	switch {
	case room == 0 && d.sawFIN && d.isCopying.Load():
		room = chunk // only a read tells of the end, which needs no room
	case room == 0:
		return d.awaitRoom(), sleep
	}
	return d.readPassed(room)
}

// writeRest writes what was read before.
func (d *direction) writeRest() (outcome, move) {
	if d.mustWait && !d.redirectedIsWritten() {
		return outcome{after: d.patient(10 * time.Millisecond)}, sleep
	}
	d.mustWait = false
	n, err := d.peer().write(d.rest)
	if n > 0 {
		d.patience = 0
	}
	d.rest = d.rest[n:]
	d.consumed, d.hasCopied = d.consumed+uint64(n), true
	// A release: the verdict may redirect from here on, behind what was just written.
	store64(&d.shared().Consumed, d.consumed)
	if len(d.rest) == 0 || err != nil && !isAgain(err) && !isShortOfMemory(err) {
		d.openHand()
	}
	switch {
	case isAgain(err):
		return d.awaitRoom(), sleep
	case isShortOfMemory(err):
		return outcome{after: d.patient(shortPause)}, sleep
	case err != nil: // the peer is dead
		d.rest = nil
		return outcome{broken: err, side: 1 - d.side}, sleep
	}
	return outcome{}, goOn
}

// readPassed reads what was passed, or what comes if there is no verdict any more. It reads no more than the
// peer has room for: while a reader has stopped, nothing is in the hands of this process, and lost with it.
func (d *direction) readPassed(room int) (outcome, move) {
	m, f := d.shared(), d.f
	if d.buffer == nil {
		d.buffer = chunks.Get().(*[]byte)
	}
	b := (*d.buffer)[:min(chunk, room)]
	if limit := load32(&m.Limit); uint32(len(b)) > limit && limit > 0 {
		b = b[:limit]
	}
	n, err := d.source().read(b)
	unread := load64(&m.Passed) != d.consumed
	switch {
	case n > 0:
		// Only now: the source's lock, which read took, makes all that was redirected before these bytes
		// visible.
		d.rest = b[:n]
		d.mustWait = f.l.hooks.Keeps(ruleOrder) &&
			(load64(&m.Redirected) != d.settled || d.side == 0 && f.bypass.HasBacklog())
		return outcome{}, goOn
	case isAgain(err) && (unread || d.isCopying.Load()):
		f.watchFor(d.side, unix.EPOLLIN, true) // what was passed is not in the queue yet
		return outcome{}, sleep
	case err == nil && unread && !d.isCopying.Load():
		// The stream has ended, and bytes that were passed are still in the backlog, behind some that go the
		// other way: what looks like the end of the stream is none.
		return outcome{after: d.patient(10 * time.Millisecond)}, sleep
	case isAgain(err), err == nil && !d.isCopying.Load():
		return outcome{}, idle
	}
	return d.readEnd(err)
}

// readEnd is told that no more comes from the source: err is nil where that looks like the end of its stream.
func (d *direction) readEnd(err error) (outcome, move) {
	d.sawEOF = true
	d.isAtEnd.Store(true)
	if err == nil && d.isCut() {
		err = unix.ECONNRESET
	}
	if err != nil && d.f.broken.Load() == nil {
		return outcome{broken: err, side: d.side}, sleep
	}
	return outcome{}, idle
}

// goIdle is for a direction that has nothing to move.
func (d *direction) goIdle() {
	if d.hasCopied {
		// The verdict's add to passed may not be visible yet, and it may not have seen our consumed either.
		d.f.l.recheck(func() { d.wake(0) })
	}
	d.hasCopied = false
	d.release()
	d.f.watchFor(d.side, unix.EPOLLIN, false)
	d.f.watchFor(1-d.side, unix.EPOLLOUT, false)
}

// isCut reports whether the source's stream has ended without a FIN. All that came must have been moved; of a
// direction that copies, a read of 0 bytes says so. A socket tells of a reset once, to whoever reads or
// writes next, and that may be the kernel's worker. Later reads say what they say at the end of a stream.
func (d *direction) isCut() bool {
	n := d.given()
	if d.side == 0 { // but not what a process sends past TCP
		n += d.f.bypass.Moved(0)
	}
	received, err := d.source().received()
	return err == nil && received-d.read0-1 != n
}

// awaitRoom has the direction woken when the peer's send buffer has room. Until then the source is not
// watched for bytes: each segment that comes would wake the direction in vain.
func (d *direction) awaitRoom() outcome {
	d.f.watchFor(d.side, unix.EPOLLIN, false)
	d.f.watchFor(1-d.side, unix.EPOLLOUT, true)
	return outcome{}
}

// makeWay makes the source's send buffer larger where bytes that were redirected to the source wait for room
// in it. The kernel has one queue for these and for the bytes that the source has passed, so what was passed
// waits behind them. The verdict found room, and TCP has cut the buffer down since, for lack of memory. Each
// way must go on without the other: the reader of the bytes in front may wait for those behind. And what is
// in front is charged to nobody, so its sender does not stop by itself.
func (d *direction) makeWay() {
	if d.source().writable() {
		return // there is room, and what waits is on its way
	}
	back := &d.f.directions[1-d.side]
	written, err := d.source().written()
	if waiting := int64(back.byTCP() - (written - back.written0)); err == nil && waiting > 0 {
		d.source().widen(int(waiting))
		d.f.l.log.Debug("a send buffer was made larger, for bytes that wait in front of the other way's",
			"flow", d.f.cookies[0], "bytes", waiting)
	}
}

// redirectedIsWritten reports whether the peer's TCP has all bytes of this direction that come before d.rest.
func (d *direction) redirectedIsWritten() bool {
	if d.side == 0 && d.f.bypass.HasBacklog() {
		return false
	}
	redirected, given := load64(&d.shared().Redirected), d.byTCP()
	n, err := d.peer().written()
	if err != nil {
		return true
	}
	if int64(n-d.written0-given) < 0 {
		return false
	}
	d.settled = redirected
	return true
}

// handled is how many bytes the verdict was run for.
func (d *direction) handled() uint64 {
	m := d.shared()
	n := load64(&m.Redirected) + load64(&m.Passed)
	if d.side == 0 { // what a process sends past TCP, no verdict sees
		n += d.f.bypass.Moved(0)
	}
	return n
}

// drained reports whether all that the source received before its FIN was given to the peer's TCP.
func (d *direction) drained() bool {
	m := d.shared()
	if d.isCopying.Load() {
		return d.sawEOF && len(d.rest) == 0 && d.redirectedIsWritten()
	}
	received, err := d.source().received()
	if err != nil {
		return true
	}
	return received-d.read0-1 == d.handled() && load64(&m.Passed) == d.consumed && d.redirectedIsWritten()
}

// delivered reports whether all that a dead source sent has reached the other side, so that a reset can't
// take it away.
func (d *direction) delivered() bool {
	if !d.isCopying.Load() {
		// The verdict was not run yet for what came before the insertion, or was kept from it.
		d.source().kick()
		if load64(&d.shared().Passed) != d.consumed {
			return false
		}
	}
	if !d.redirectedIsWritten() {
		return false
	}
	n, err := d.peer().unacked()
	return err != nil || n <= 0
}

// readerStopped reports whether the reader of a direction whose source is dead has taken nothing for
// tcpsock.ResetGrace and has no room, or has taken nothing for tcpsock.TCPGrace. It is called again and
// again.
func (d *direction) readerStopped(b *breakage) bool {
	var i unix.TCPInfo
	if d.peer().info(&i) != nil {
		return true
	}
	now, n := time.Now(), i.Bytes_acked+d.f.bypass.Moved(d.side)
	if b.takenAt.IsZero() || n != b.taken {
		b.taken, b.takenAt = n, now
	}
	stopped := now.Sub(b.takenAt)
	return stopped >= tcpsock.TCPGrace || stopped >= tcpsock.ResetGrace &&
		(!d.f.isByTCP() || tcpsock.Refuses(&i))
}

// release gives the buffer back, if nothing is in it.
func (d *direction) release() {
	if d.f.isClosed {
		d.openHand()
	}
	if d.buffer != nil && len(d.rest) == 0 {
		chunks.Put(d.buffer)
		d.buffer = nil
	}
}
