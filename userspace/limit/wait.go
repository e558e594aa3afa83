package limit

import (
	"context"
	"net/netip"
	"time"
)

// A waiter is a lease of no known source that waits to be one of a source's.
type waiter struct {
	lease   *Lease
	granted chan struct{} // closed when it is
}

// MoveSoon is [Lease.Move] for a lease whose source is not known yet. Where src has too many it waits for its
// turn, for so long, or until ctx ends, and does not count meanwhile. It does not wait behind more others
// than times the limit of a source, nor than the limit on all.
func (a *Lease) MoveSoon(ctx context.Context, src netip.Addr, times int, long time.Duration) error {
	s, l := sourceOf(src), a.limiter
	l.mu.Lock()
	if a.released || s == a.source {
		l.mu.Unlock()
		return nil
	}
	err := l.enter(s)
	if err == nil {
		l.leave(a.source)
		a.source = s
		l.mu.Unlock()
		return nil
	}
	c := l.sources[s]
	if len(c.waiting) >= times*l.perSource || l.total > 0 && l.waiting >= l.total || a.source != (source{}) {
		l.mu.Unlock()
		return err
	}
	w := &waiter{a, make(chan struct{})}
	c.waiting = append(c.waiting, w)
	l.sources[s] = c
	l.waiting++
	l.held--
	l.mu.Unlock()
	timeout := time.NewTimer(long)
	defer timeout.Stop()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	case <-timeout.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c = l.sources[s]
	for i := range c.waiting {
		if c.waiting[i] == w {
			c.waiting = append(c.waiting[:i], c.waiting[i+1:]...)
			l.keepSource(s, c)
			l.waiting--
			a.released = true // it counts no more
			return err
		}
	}
	return nil // granted just now
}

// grant gives the place of a lease of s that ends to the first that waits for it.
//
// +checklocks:l.mu
func (l *Limiter) grant(s source, c charge) {
	w := c.waiting[0]
	c.waiting = c.waiting[1:]
	l.sources[s] = c
	l.waiting--
	l.held++
	w.lease.source = s // +checklocksignore: w.lease.limiter is l
	close(w.granted)
}
