package relay

import (
	"fmt"
	"math"
	"time"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// parkAfter is how long a flow is idle before its goroutines go. Long enough for what parking and waking
// cost (some µs) not to matter, short enough for flows that come and stay idle not to pile up stacks: memory
// that a burst of 10,000 took once stays with the process.
const parkAfter = 500 * time.Millisecond

// arm makes ctx and idleness end the flow, which is in transit.
func (f *flow) arm() {
	f.down.conn.SetDeadline(time.Time{})
	f.up.conn.SetDeadline(time.Time{})
	f.relay.cancels.add(f, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tick = time.AfterFunc(math.MaxInt64, f.checkIdle)
	f.resetTick(f.beginIdle())
}

// disarm undoes arm. It is false when ctx is ending the flow already.
func (f *flow) disarm() (ok bool) {
	ok = f.relay.cancels.remove(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tick != nil {
		f.tick.Stop()
		f.tick = nil
	}
	if f.reader != nil {
		f.reader.recheck.Stop()
	}
	return ok
}

// checkIdle sees whether bytes have moved since the last time, so that no message has to touch a timer.
func (f *flow) checkIdle() {
	f.mu.Lock()
	if f.state == onLoop || f.tick == nil {
		// it was disarmed when the timer had fired; a loop has its own look
		f.mu.Unlock()
		return
	}
	now := moment.Now()
	idle := f.idle(now)
	if f.o.Idle > 0 && idle >= f.o.Idle {
		f.mu.Unlock()
		f.abort(EndIdle, fmt.Errorf("no byte for %v", f.o.Idle))
		return
	}
	defer f.mu.Unlock()
	if f.state == pumping && f.canPark() && (idle >= f.o.parkAfter || f.isQuiet(f.seen, now)) {
		// A pump returns by this as soon as it has nothing to read and nothing left to write.
		f.down.conn.SetReadDeadline(past)
		f.up.conn.SetReadDeadline(past)
		f.enter(parking)
	}
	f.resetTick(idle)
}

// beginIdle begins to see for how long no byte moves, or goes on with that. The caller has what guards
// seen and since.
func (f *flow) beginIdle() (idle time.Duration) {
	now := moment.Now()
	if up, down := f.counters.own(); f.since == 0 || up+down != f.seen {
		f.seen, f.since = up+down, now
	}
	return f.since.Age(now)
}

// idle is for how long no byte has moved. The caller has what guards seen and since.
func (f *flow) idle(now moment.Moment) time.Duration {
	if up, down := f.counters.Load(); up+down != f.seen {
		f.seen, f.since = up+down, now
	}
	return f.since.Age(now)
}

// resetTick sets the timer for a flow that has been idle for so long. Pumps that were told to return need
// none: each of them parks its side before it reads again, also one that waits for room.
//
// +checklocks:f.mu
func (f *flow) resetTick(idle time.Duration) {
	again := time.Duration(math.MaxInt64)
	if (f.state == pumping || f.state == inTransit) && f.canPark() {
		again = f.o.parkAfter
	}
	switch {
	case f.o.Idle > 0 && (f.pumps > 0 || f.state == inTransit):
		again = min(again, f.o.Idle/4, f.o.Idle-idle)
	case f.o.Idle > 0: // nothing moves unseen
		again = f.o.Idle - idle
	}
	if f.tick != nil && again < math.MaxInt64 {
		f.tick.Reset(max(again, time.Millisecond))
	}
}

// parkable: the pumps wait in a way that can be taken over.
func (f *flow) parkable() bool { return haveWatches && f.down.isBare && f.up.isBare }

// +checklocks:f.mu
func (f *flow) canPark() bool { return f.parkable() && !f.cannotPark }

// isQuiet reports, every parkAfter, whether a flow that a datapath may have has moved so little since the
// last time that it is no work for pumps.
//
// +checklocks:f.mu
func (f *flow) isQuiet(moved int64, now moment.Moment) (isQuiet bool) {
	within := f.quietSince.Age(now)
	if len(f.choice.Of) == 0 || f.cannotReattach || within < f.o.parkAfter {
		return false
	}
	isQuiet = f.quietSince != 0 && datapath.IsQuiet(moved-f.quietSeen, within)
	f.quietSeen, f.quietSince = moved, now
	return isQuiet
}

// mayReattach reports whether the flow, whose last pump calls, is to go back to a loop, where a datapath may
// have it again.
//
// +checklocks:f.mu
func (f *flow) mayReattach() bool {
	return len(f.choice.Of) > 0 && !f.cannotReattach && f.pumps == 1 && f.down.state == waiting && f.up.state == waiting
}

// park leaves src, whose pump is about to return, to watches, if it can.
//
// +checklocks:f.mu
func (f *flow) park(src *side) bool {
	if f.end != "" || !f.canPark() || len(src.rest) > 0 {
		return false
	}
	if !watchForBytes(src) {
		f.cannotPark = true
		if f.state == parking {
			f.enter(pumping)
		}
		return false
	}
	src.state = waiting
	return true
}

// unpark goes on with src if it was parked, since there is something to read.
func (f *flow) unpark(src *side) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if src.state != waiting || f.state == leaving {
		return false
	}
	if f.state != pumping {
		f.enter(pumping)
	}
	f.startPump(src)
	f.resetTick(0)
	return true
}
