package relay

import (
	"context"
	"fmt"
	"math"
	"time"
)

// parkAfter is how long a flow is quiet before its goroutines go. Long enough for what parking and waking
// cost (some µs) not to matter, short enough for flows that come and stay quiet not to pile up stacks: memory
// that a burst of 10,000 took once stays with the process.
const parkAfter = 500 * time.Millisecond

// arm makes ctx and idleness end the flow.
func (f *flow) arm() {
	f.down.conn.SetDeadline(time.Time{})
	f.up.conn.SetDeadline(time.Time{})
	if f.ctx.Done() != nil {
		f.uncancel = context.AfterFunc(f.ctx, func() { f.abort(EndCanceled, context.Cause(f.ctx)) })
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen, f.since, f.parking = -1, time.Now(), false
	f.tick = time.AfterFunc(math.MaxInt64, f.look)
	f.lookAgain(0)
}

// disarm undoes arm. It is false when ctx is ending the flow already.
func (f *flow) disarm() (ok bool) {
	ok = f.uncancel == nil || f.uncancel()
	f.uncancel = nil
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tick != nil {
		f.tick.Stop()
		f.tick = nil
	}
	if f.grace != nil {
		f.grace.Stop()
	}
	return ok
}

// look sees whether bytes have moved since the last time, so that no message has to touch a timer.
func (f *flow) look() {
	up, down := f.counters.Load()
	now := time.Now()
	f.mu.Lock()
	if f.tick == nil {
		f.mu.Unlock()
		return
	}
	if up+down != f.seen {
		f.seen, f.since = up+down, now
	}
	quiet := now.Sub(f.since)
	if f.o.Idle > 0 && quiet >= f.o.Idle {
		f.mu.Unlock()
		f.abort(EndIdle, fmt.Errorf("no byte for %v", f.o.Idle))
		return
	}
	defer f.mu.Unlock()
	if f.canPark() && f.end == "" && (quiet >= f.parkAfter() || f.movesLittle(up+down, now)) {
		// A pump returns by this as soon as it has nothing to read and nothing left to write.
		f.down.conn.SetReadDeadline(past)
		f.up.conn.SetReadDeadline(past)
		f.parking = true
	}
	f.lookAgain(quiet)
}

// lookAgain sets the timer for a flow that has been quiet for so long. Pumps that were told to return need no
// look: each of them parks its side before it reads again, also one that waits for room. It is called with f.mu
// held.
func (f *flow) lookAgain(quiet time.Duration) {
	again := time.Duration(math.MaxInt64)
	if f.pumps > 0 && f.canPark() && !f.parking {
		again = f.parkAfter()
	}
	switch {
	case f.o.Idle > 0 && f.pumps > 0:
		again = min(again, f.o.Idle/4)
	case f.o.Idle > 0: // nothing moves unseen
		again = f.o.Idle - quiet
	}
	if f.tick != nil && again < math.MaxInt64 {
		f.tick.Reset(max(again, time.Millisecond))
	}
}

func (f *flow) parkAfter() time.Duration {
	if f.o.parkAfter > 0 {
		return f.o.parkAfter
	}
	return parkAfter
}

// parkable: the pumps wait in a way that can be taken over.
func (f *flow) parkable() bool { return haveWatches && f.down.bare && f.up.bare }

// canPark is called with f.mu held.
func (f *flow) canPark() bool { return f.parkable() && !f.noPark }

// movesLittle reports, every parkAfter, whether a flow that a datapath may have has moved so little since the last time
// that it is no work for pumps. It is called with f.mu held.
func (f *flow) movesLittle(moved int64, now time.Time) bool {
	if len(f.o.WhenTalking) == 0 || f.noCalm || now.Sub(f.calmSince) < f.parkAfter() {
		return false
	}
	known, most := !f.calmSince.IsZero(), int64(calmBytes*now.Sub(f.calmSince).Seconds()/calmWithin.Seconds())
	little := known && moved-f.calmSeen <= most
	f.calmSeen, f.calmSince = moved, now
	return little
}

// mayCalmDown reports whether the flow, both of whose sides are parked, is to go back to a loop, where a datapath may
// have it again. It is called with f.mu held, by a pump.
func (f *flow) mayCalmDown() bool {
	return len(f.o.WhenTalking) > 0 && !f.noCalm && f.pumps == 1 && f.end == "" &&
		f.down.state == parked && f.up.state == parked
}

// park leaves src, whose pump is about to return, to watches, if it can. It is called with f.mu held.
func (f *flow) park(src *side) bool {
	if f.end != "" || !f.canPark() {
		return false
	}
	if !watchForBytes(src) {
		f.noPark = true // no descriptor for the epoll, or no memory
		return false
	}
	src.state = parked
	return true
}

// unpark goes on with src if it was parked, since there is something to read.
func (f *flow) unpark(src *side) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if src.state != parked {
		return false
	}
	f.startPump(src)
	f.parking = false
	f.lookAgain(0)
	return true
}
