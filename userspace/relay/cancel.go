package relay

import (
	"context"
	"sync"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// cancellations end flows whose contexts are done. As a rule many flows have one context, and a
// [context.AfterFunc] for each would be 200 bytes.
type cancellations struct {
	mu sync.Mutex
	// +checklocks:mu
	of map[context.Context]*cancellation
}

// A cancellation is a context that is not done, and its flows.
type cancellation struct {
	first *flow // the others follow it
	stop  func() bool
}

// cancelEntry is the place of a flow in its cancellation. It is guarded by cancellations.mu.
type cancelEntry struct {
	next     *flow      // the flow itself: its context ends it, or has
	previous *flow      // the first flow's is itself; nil: the flow is in no cancellation
	loop     *loop.Loop // that the flow is on; nil: it is on none
}

// add has f end when its context is done; l is the loop that f is on, or nil.
func (c *cancellations) add(f *flow, l *loop.Loop) {
	ctx := f.ctx
	if ctx.Done() == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.of[ctx]
	if all == nil {
		if c.of == nil {
			c.of = map[context.Context]*cancellation{}
		}
		all = &cancellation{stop: context.AfterFunc(ctx, func() { c.done(ctx) })}
		c.of[ctx] = all
	}
	f.canceling = cancelEntry{next: all.first, previous: f, loop: l}
	if all.first != nil {
		all.first.canceling.previous = f
	}
	all.first = f
}

// remove undoes add. It is false when the context is ending f already.
func (c *cancellations) remove(f *flow) (ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := f.canceling
	f.canceling = cancelEntry{}
	if e.previous == nil {
		return e.next != f
	}
	if e.next != nil {
		e.next.canceling.previous = e.previous
	}
	if e.previous != f {
		e.previous.canceling.next = e.next
		return true
	}
	all := c.of[f.ctx]
	if all.first = e.next; all.first != nil {
		all.first.canceling.previous = all.first
		return true
	}
	all.stop()
	delete(c.of, f.ctx)
	return true
}

// done ends the flows of ctx, which is.
func (c *cancellations) done(ctx context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.of[ctx]
	if all == nil { // the last one has gone
		return
	}
	delete(c.of, ctx)
	for f := all.first; f != nil; {
		e := f.canceling
		f.canceling = cancelEntry{next: f}
		go f.cancelOn(e.loop)
		f = e.next
	}
}
