package limit

// A queue holds leases that yield, the oldest first. Each is in two of them: that of all, and its source's.
type queue struct{ oldest, newest *Lease }

const (
	ofAll    = iota
	ofSource // while the lease has one
)

type neighbours struct{ older, newer *Lease }

// place belongs to a lease that yields. push, remove and takeOldest are called with the limiter's mutex held:
// the analyzer can't follow it to the neighbours in a queue.
type place struct {
	give  func()        // how to have it
	links [2]neighbours // by queue
}

// +checklocksignore
func (q *queue) push(which int, a *Lease) {
	a.yields.links[which] = neighbours{older: q.newest}
	if q.newest != nil {
		q.newest.yields.links[which].newer = a
	} else {
		q.oldest = a
	}
	q.newest = a
}

// +checklocksignore
func (q *queue) remove(which int, a *Lease) {
	n := a.yields.links[which]
	if n.older != nil {
		n.older.yields.links[which].newer = n.newer
	} else {
		q.oldest = n.newer
	}
	if n.newer != nil {
		n.newer.yields.links[which].older = n.older
	} else {
		q.newest = n.older
	}
	a.yields.links[which] = neighbours{}
}

// takeOldest is how to have the oldest place of q, nil where none yields.
//
// +checklocksignore
func (q *queue) takeOldest() (give func()) {
	a := q.oldest
	if a == nil {
		return nil
	}
	give = a.yields.give
	a.keep()
	return give
}

// Yield says that until [Lease.Keep] the lease's place may be given to a newcomer, the oldest lease's first.
// give is then called once, without a lock and by whoever wants the place, and releases the lease; if it does
// not, the next has to.
func (a *Lease) Yield(give func()) {
	l := a.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if a.released || a.yields != nil {
		return
	}
	a.yields = &place{give: give}
	l.yielding++
	l.queue.push(ofAll, a)
	if a.source != (source{}) {
		c := l.sources[a.source]
		c.queue.push(ofSource, a)
		l.sources[a.source] = c
	}
}

// Keep undoes Yield.
func (a *Lease) Keep() {
	a.limiter.mu.Lock()
	defer a.limiter.mu.Unlock()
	a.keep()
}

// +checklocks:a.limiter.mu
func (a *Lease) keep() {
	if a.yields == nil {
		return
	}
	l := a.limiter
	l.yielding--
	l.queue.remove(ofAll, a)
	if c, ok := l.sources[a.source]; ok {
		c.queue.remove(ofSource, a)
		l.sources[a.source] = c
	}
	a.yields = nil
}

// Yielding returns how many leases yield.
func (l *Limiter) Yielding() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.yielding
}

// TakeOldest takes the place of the lease that has yielded for longest. It is false when none does.
func (l *Limiter) TakeOldest() bool {
	l.mu.Lock()
	give := l.queue.takeOldest()
	l.mu.Unlock()
	if give == nil {
		return false
	}
	give()
	return true
}
