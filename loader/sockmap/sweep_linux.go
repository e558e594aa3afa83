package sockmap

import (
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// sweeper looks at all flows from time to time: for idle ones, for events that found no place in the ring,
// and for stalls, which should not be: it ends them, counts them and says so, since each is a defect of ours
// or of the kernel's.
type sweeper struct {
	ticker *time.Ticker
	quit   chan struct{}

	mu sync.Mutex
	// +checklocks:mu
	pause time.Duration // between two sweeps
	// +checklocks:mu
	asked time.Duration // the least that atLeast has asked for since the last sweep began
}

func newSweeper() *sweeper {
	return &sweeper{ticker: time.NewTicker(sweepEvery), quit: make(chan struct{}), pause: sweepEvery}
}

// atLeast has sweeps come at least that often, or every 10 ms.
func (s *sweeper) atLeast(every time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	every = max(every, 10*time.Millisecond)
	if s.asked = min(s.asked, every); every < s.pause {
		s.pause = every
		s.ticker.Reset(every)
	}
}

// run calls sweep until close. sweep gives the pause that the flows it saw need.
func (s *sweeper) run(sweep func(time.Time) time.Duration) {
	for {
		select {
		case <-s.quit:
			return
		case now := <-s.ticker.C:
			s.mu.Lock()
			s.asked = math.MaxInt64
			s.mu.Unlock()
			pause := sweep(now)
			s.mu.Lock()
			if pause = min(pause, s.asked); pause != s.pause {
				s.pause = pause
				s.ticker.Reset(pause)
			}
			s.mu.Unlock()
		}
	}
}

func (s *sweeper) close() {
	s.ticker.Stop()
	close(s.quit)
}

func (l *Engine) sweep(now time.Time) time.Duration {
	pause, quiet := restEvery, int32(0)
	for i := range l.live {
		f := l.live[i].Load()
		if f == nil {
			continue
		}
		if pause = min(pause, sweepEvery); f.o.Idle > 0 {
			pause = min(pause, max(f.o.Idle/4, 10*time.Millisecond))
		}
		if f.sweep(now) {
			go f.finish(prove.EndIdle, nil)
		}
		if f.isQuiet(now) {
			quiet++
		}
	}
	l.quiet.Store(quiet)
	if hasRecords := l.ledger.publish(); l.onSweep(now) || hasRecords {
		pause = min(pause, sweepEvery)
	}
	return pause
}

// sweep says whether the flow has been idle too long.
func (f *flow) sweep(now time.Time) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return false
	}
	moves := false
	for i := range f.directions {
		moves = f.directions[i].sweep(now) || moves
	}
	if f.directions[0].isDetached.Load() || f.directions[1].isDetached.Load() || f.isRecalled.Load() {
		f.l.detacher.ask(f) // the other one, too
		if moves {          // no verdict counts
			f.publish(func(*sockmapFlow) {})
		}
	}
	f.settle(now)
	return f.o.Idle > 0 && now.Sub(f.lastMoved()) >= f.o.Idle
}

// sweep looks for what no event has told of, and reports whether the direction has moved since the last
// sweep.
func (d *direction) sweep(now time.Time) (moves bool) {
	m := d.shared()
	switch moves = d.look(now); {
	case moves:
	// Once after each time that it moved, so that idle flows cost nothing.
	case !d.wasChecked && d.f.l.hooks.Keeps(ruleSweep):
		d.wasChecked = true
		d.checkVerdict()
	}
	if d.fault() != 0 {
		d.wake(0)
	}
	consumed, still := load64(&m.Consumed), uint64(0)
	if d.snapshot().passed != consumed {
		still = consumed + 1
	}
	if still != 0 && still == d.still && d.f.l.hooks.Keeps(ruleSweep) && d.hasMissed() {
		d.nudgeLater(consumed)
	}
	d.still = still
	return moves
}

// look reports whether the direction has moved since the last look, or nobody has looked.
func (d *direction) look(now time.Time) (moves bool) {
	n, isFirst := d.moved(), d.since.IsZero()
	if n == d.seen && !isFirst {
		return false
	}
	d.seen, d.since, d.wasChecked = n, now, false
	o := &d.f.o
	if was := [2]int64{o.Up, o.Down}[d.side]; isFirst && !o.LastMoved.IsZero() && d.f.before[d.side]+int64(n) == was {
		d.since = o.LastMoved // nothing has moved here
	}
	return true
}

// lookLast gives lastMoved of a flow that moves nothing here any more. mu is held for writing.
func (f *flow) lookLast(now time.Time) time.Time {
	for i := range f.directions {
		f.directions[i].look(now)
	}
	return f.lastMoved()
}

// lastMoved is when a byte was last seen to have moved, either way. Called with mu held.
func (f *flow) lastMoved() time.Time {
	if t := f.directions[0].since; t.After(f.directions[1].since) {
		return t
	}
	return f.directions[1].since
}

// eventDelay is how late an event may be on a busy machine before it counts as lost.
const eventDelay = 200 * time.Millisecond

// hasMissed reports whether nobody is at the direction though it could go on.
func (d *direction) hasMissed() bool {
	f := d.f
	if d.bits.Load()&isRunning != 0 || d.hasTimer.Load() || f.broken.Load() != nil {
		return false
	}
	f.watchMu.Lock()
	in, out := f.watched[d.side]&unix.EPOLLIN != 0, f.watched[1-d.side]&unix.EPOLLOUT != 0
	f.watchMu.Unlock()
	switch { // see awaitRoom
	case in:
		if !d.source().readable() {
			if !d.isDetached.Load() { // nothing is in front of what comes to those
				d.makeWay()
			}
			return false
		}
	case out:
		p := []unix.PollFd{{Fd: int32(d.peer()), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, 0); n <= 0 || err != nil {
			return false
		}
	default: // asleep, with bytes that were passed
		return !f.l.ringHasPending()
	}
	return !f.poller().hasPending() // else the event may be one of those that wait
}

// nudgeLater calls nudge when an event that is only late would have come.
func (d *direction) nudgeLater(consumed uint64) {
	time.AfterFunc(eventDelay, func() { d.nudge(consumed) })
}

// nudge ends a stall of copying, if it still is one. It was one only if that helps: short of memory, TCP
// takes nothing though poll says so.
func (d *direction) nudge(consumed uint64) {
	f := d.f
	f.mu.RLock()
	if f.isClosed || load64(&d.shared().Consumed) != consumed || !d.hasMissed() {
		f.mu.RUnlock()
		return
	}
	before := d.moved()
	f.mu.RUnlock()
	d.wake(0)
	time.AfterFunc(eventDelay, func() {
		f.mu.RLock()
		now := f.total[d.side]
		if !f.isClosed {
			now = d.moved()
		}
		f.mu.RUnlock()
		if now != before {
			f.counts.countStall(f.l.log, f.cookies[0], "nobody was told of bytes to copy, or of room for them")
		}
	})
}

// checkVerdict finds bytes that were received and that the verdict was not run for, and makes it run; or,
// without a verdict, that were not copied.
func (d *direction) checkVerdict() {
	if d.isDone.Load() {
		return
	}
	if d.isCopying.Load() {
		if consumed := load64(&d.shared().Consumed); d.hasMissed() {
			d.nudgeLater(consumed)
		}
		return
	}
	if d.offer.Load() != nil { // the verdict may be kept from what comes
		d.wasChecked = false
		return
	}
	s := d.source()
	var i unix.TCPInfo
	// The verdict runs under the lock that TCP_INFO takes, so what is handled is read after it.
	if s.info(&i) != nil || i.State != tcpsock.Established { // a FIN is looked at by drained
		return
	}
	handled := d.handled()
	if int64(i.Bytes_received-d.read0-handled) <= 0 {
		return
	}
	s.kick()
	if d.handled() != handled && d.offer.Load() == nil {
		d.f.counts.countStall(d.f.l.log, d.f.cookies[0], "the verdict was not run for bytes that had come")
	}
}

// Active is how many spliced flows moved something lately. ok is false where the datapath takes none.
func (l *Engine) Active() (flows int, ok bool) {
	// The sweeper may know of some that have ended since.
	return int(max(l.inside.Load()-l.quiet.Load(), 0)), !l.counts.IsOff()
}

// quietAfter is how long a quiet flow has moved nothing at least.
const quietAfter = time.Second

// isQuiet reports, for the sweeper, whether the flow has moved nothing for quietAfter.
func (f *flow) isQuiet(now time.Time) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return now.Sub(f.lastMoved()) >= quietAfter
}

// settle is for the sweeper. Where the way back has not moved for a while, and what went past TCP has not all
// reached downstream's TCP, a redirect was cut short: how far it came is found out then.
func (f *flow) settle(now time.Time) {
	d := &f.directions[1]
	if f.settled == d.seen || f.bypass.Moved(1) == 0 || now.Sub(d.since) < 2*sweepEvery {
		return
	}
	byTCP := d.given()
	// A verdict counts before it redirects, under the lock that TCP_INFO takes.
	var i unix.TCPInfo
	if d.source().info(&i) != nil {
		return
	}
	n, err := d.peer().written()
	if err != nil {
		return
	}
	if int64(n-d.written0-d.byTCP()) >= 0 {
		f.settled = d.seen
	} else if f.bypass.Settle(uint32(byTCP)) {
		f.l.log.Debug("a redirect from a process was cut short, and its bytes go by TCP",
			"flow", f.cookies[0], "bytes", d.seen-d.moved())
	}
}
