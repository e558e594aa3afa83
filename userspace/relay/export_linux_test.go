package relay

import "fmt"

// DropPipes closes the pipes that are kept.
func (r *Relay) DropPipes() { r.pipes.drop() }

var stateNames = []string{flowing: "flowing", parked: "parked", ended: "ended"}

// States says where the flow with these counters is: "loop", or how far the stream of each side is while
// pumps have it.
func States(c *Counters) (down, up string) {
	f := c.flow.Load()
	if f == nil {
		return stateNames[ended], stateNames[ended]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.onLoop.Load() {
		return "loop", "loop"
	}
	return stateNames[f.down.state], stateNames[f.up.state]
}

// Describe says all that the relay knows of the flow with these counters.
func Describe(c *Counters) string {
	f := c.flow.Load()
	if f == nil {
		return "it has ended"
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	b := fmt.Sprintf("flow %p: on a loop %v, %d pumps, end %q, guessed %v, cut %v, over %v, noPark %v",
		f, f.onLoop.Load(), f.pumps, f.end, f.guessed, f.cut, f.over, f.noPark)
	f.relay.watches.mu.Lock()
	defer f.relay.watches.mu.Unlock()
	for _, s := range f.sides() {
		b += fmt.Sprintf("\n%s %p: %s, shut %v, fault %v, watched for %#x",
			s.name(), s, stateNames[s.state], s.shut.Load(), s.fault, s.watched)
	}
	return b
}

// Ticks reports whether a timer waits to look at the flow with these counters, which pumps have. It lets the
// timer run at once, and so a flow that needs none comes to rest.
func Ticks(c *Counters) bool {
	f := c.flow.Load()
	if f == nil || f.onLoop.Load() {
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
