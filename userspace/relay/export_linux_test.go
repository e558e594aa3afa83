package relay

import "fmt"

// DropPipes closes the pipes that are kept.
func (r *Relay) DropPipes() { r.pipes.drop() }

var streamNames = []string{flowing: "flowing", waiting: "waiting", ended: "ended"}

// States says where the flow with these counters is: "loop", or how far the stream of each side is while
// pumps have it.
func States(c *Counters) (down, up string) {
	f := c.flow.Load()
	if f == nil {
		return streamNames[ended], streamNames[ended]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == onLoop {
		return "loop", "loop"
	}
	return streamNames[f.down.state], streamNames[f.up.state]
}

// Describe says all that the relay knows of the flow with these counters.
func Describe(c *Counters) string {
	f := c.flow.Load()
	if f == nil {
		return "it has ended"
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	b := fmt.Sprintf("flow %p: %s, %d pumps, end %q, guess %v, cut %v, cannot park %v",
		f, stateNames[f.state], f.pumps, f.end, f.isGuess, f.isCut, f.cannotPark)
	f.relay.watches.mu.Lock()
	defer f.relay.watches.mu.Unlock()
	for _, s := range f.sides() {
		b += fmt.Sprintf("\n%s %p: %s, shut %v, fault %v, watched for %#x",
			s.name(), s, streamNames[s.state], s.isShut.Load(), s.fault, s.watched)
	}
	return b
}

// Ticks reports whether a timer waits to look at the flow with these counters, which pumps have. It lets the
// timer run at once, and so a flow that needs none comes to rest.
func Ticks(c *Counters) bool {
	f := c.flow.Load()
	if f == nil || f.isIn(onLoop) {
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
