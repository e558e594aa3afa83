package loop

// Pause is what an Acceptor does that could not accept.
func (a *Acceptor) Pause() { a.pause() }

// Fire is what the timer of the wait that is under way does when it fires.
func (s *Socket) Fire() func() {
	t := s.timer
	return func() { s.loop.Do(func() func() { return s.timeOut(t) }) }
}

// Watches counts what the loops know of acceptors.
func (r *Reactor) Watches() (n int) {
	for _, l := range r.loops {
		l.mu.Lock()
		for _, s := range l.sockets {
			if _, ok := s.handler.(acceptHandler); ok {
				n++
			}
		}
		l.mu.Unlock()
	}
	return n
}
