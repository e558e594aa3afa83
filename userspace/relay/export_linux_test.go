package relay

import "fmt"

// Pause is what an Acceptor does that could not accept.
func (a *Acceptor) Pause() { a.pause() }

// Watches counts what the loops know of acceptors.
func Watches() (n int) {
	for _, l := range allLoops() {
		l.mu.Lock()
		n += len(l.acceptors)
		l.mu.Unlock()
	}
	return n
}

// DropPipes closes the pipes that are kept.
func DropPipes() {
	pipes.Lock()
	free := pipes.free
	pipes.free = nil
	pipes.Unlock()
	for _, p := range free {
		p.close()
	}
}

// find gives the flow with these counters, and its loop if it is on one. f is nil while its pumps run and
// nobody watches it.
func find(c *Counters) (f *flow, on *loop) {
	for _, l := range allLoops() {
		l.mu.Lock()
		for _, s := range l.sockets {
			if s.side != nil && s.side.flow.counters == c {
				f = s.side.flow
			}
		}
		l.mu.Unlock()
		if f != nil {
			return f, l
		}
	}
	watches.mu.Lock()
	defer watches.mu.Unlock()
	for _, s := range watches.sides {
		if s.flow.counters == c {
			f = s.flow
		}
	}
	return f, nil
}

var stateNames = []string{flowing: "flowing", parked: "parked", ended: "ended"}

// States says where the flow with these counters is: "loop", or how far the stream of each side is while
// pumps have it.
func States(c *Counters) (down, up string) {
	f, on := find(c)
	switch {
	case on != nil:
		return "loop", "loop"
	case f == nil:
		return stateNames[flowing], stateNames[flowing]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return stateNames[f.down.state], stateNames[f.up.state]
}

// Describe says all that the relay knows of the flow with these counters.
func Describe(c *Counters) string {
	f, on := find(c)
	if f == nil {
		return "its pumps run, and nobody watches it"
	}
	if on != nil {
		on.mu.Lock()
		defer on.mu.Unlock()
		return fmt.Sprintf("flow %p, on a loop: %s, %s", f, stateNames[f.down.state], stateNames[f.up.state])
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	b := fmt.Sprintf("flow %p: %d pumps, end %q, guessed %v, cut %v, over %v, noPark %v",
		f, f.pumps, f.end, f.guessed, f.cut, f.over, f.noPark)
	watches.mu.Lock()
	defer watches.mu.Unlock()
	for _, s := range f.sides() {
		b += fmt.Sprintf("\n%s %p: %s, shut %v, fault %v, watched for %#x",
			s.name(), s, stateNames[s.state], s.shut.Load(), s.fault, s.watched)
	}
	return b
}

// Ticks reports whether a timer waits to look at the flow with these counters, which pumps have. It lets the
// timer run at once, and so a flow that needs none comes to rest.
func Ticks(c *Counters) bool {
	f, on := find(c)
	if f == nil || on != nil {
		return true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tick == nil || !f.tick.Stop() {
		return false
	}
	f.tick.Reset(0)
	return true
}
