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
	defer pipes.Unlock()
	for _, p := range pipes.free {
		p.close()
	}
	pipes.free = nil
}
