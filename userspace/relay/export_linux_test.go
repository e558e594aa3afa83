package relay

// Pause is what an Acceptor does that could not accept.
func (a *Acceptor) Pause() { a.pause() }

// Watches counts what the loops know of acceptors.
func Watches() (n int) {
	for _, l := range loops.all {
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

// States says where the flow with these counters is: "loop", or how far the stream of each side is while pumps have it.
func States(c *Counters) (down, up string) {
	for _, l := range loops.all {
		l.mu.Lock()
		for _, s := range l.sockets {
			if s.side != nil && s.side.flow.counters == c {
				l.mu.Unlock()
				return "loop", "loop"
			}
		}
		l.mu.Unlock()
	}
	var f *flow
	watches.mu.Lock()
	for _, s := range watches.sides {
		if s.flow.counters == c {
			f = s.flow
		}
	}
	watches.mu.Unlock()
	words := []string{flowing: "flowing", parked: "parked", ended: "ended"}
	if f == nil { // nobody watches it, and so its pumps run
		return words[flowing], words[flowing]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return words[f.down.state], words[f.up.state]
}
