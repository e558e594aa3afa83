package relay

import (
	"context"
	"errors"
)

// EndKilled is the end of a flow that [Counters.Kill] has ended.
const EndKilled End = "killed"

// errKilled cancels what a datapath was given: the reason is in Counters.
var errKilled = errors.New("killed")

// Kill ends the flow that is counted, resetting both sides at once, or as soon as it begins. why is its
// Result.Err; the first of several counts. A flow that has ended is left alone. It may be called from any
// goroutine that holds no lock of a loop.
//
// Kill needs no lock that the flow's owner holds. Each new owner is recorded first, and then looks whether
// the flow is killed. Kill marks the flow first, and then looks who owns it. So one of the two sees the
// other.
func (c *Counters) Kill(why error) {
	c.killed.CompareAndSwap(nil, &why)
	if f := c.flow.Load(); f != nil {
		f.kill()
	}
}

// Killed is why, or nil.
func (c *Counters) Killed() error {
	if why := c.killed.Load(); why != nil {
		return *why
	}
	return nil
}

// kill ends f by whoever has it. In transit that is seen to by who gets it.
func (f *flow) kill() {
	f.mu.Lock()
	state, cancel, socket := f.state, f.cancel, f.down.socket
	f.mu.Unlock()
	switch state {
	case onLoop:
		f.killOn(socket)
	case handedOff:
		cancel(errKilled)
	case pumping, parking, parked, leaving, ending:
		f.abort(EndKilled, f.counters.Killed())
	}
}

// takeKill makes f, which pumps get, one that was killed, if it was.
//
// +checklocks:f.mu
func (f *flow) takeKill() {
	why := f.counters.Killed()
	if why == nil {
		return
	}
	if f.end == "" {
		f.end, f.err = EndKilled, why
	}
	f.isCut = true
}

// cancelable is the context of a datapath that is asked to take f. It ends with f's own, and by kill.
// f.cancel must be called when the datapath has the flow no more, or refuses it.
//
// +checklocks:f.mu
func (f *flow) cancelable() (ctx context.Context) {
	ctx, f.cancel = context.WithCancelCause(f.ctx)
	return ctx
}

// endOf translates how a datapath says that it has ended f.
func (f *flow) endOf(end End, err error) (End, error) {
	if why := f.counters.Killed(); why != nil && end == EndCanceled {
		return EndKilled, why
	}
	return end, err
}
