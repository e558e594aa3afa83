package limit

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// rateSources is how many sources a [Rate] remembers at most. They take some 6 MB.
const rateSources = 65536

// Rate bounds how often something comes from each source: a token bucket (GCRA, ITU-T I.371) that holds burst
// tokens, and gets one more each interval. Its memory is bounded: it forgets a source that has not come for
// as long as its bucket takes to fill, and where there are too many, those that have not come for longest.
// What is refused takes no token. It is safe for concurrent use.
type Rate struct {
	most int // sources remembered

	mu    sync.Mutex
	burst int       // +checklocks:mu
	began time.Time // +checklocks:mu
	// +checklocks:mu
	every time.Duration // 0: no bound
	// +checklocks:mu
	rotated time.Duration // since began

	// now has when, since began, the bucket of each source is full again that came since rotated, before the
	// same of others that came since the rotation before it.
	now    map[source]time.Duration // +checklocks:mu
	before map[source]time.Duration // +checklocks:mu
}

// NewRate returns a Rate without a bound.
func NewRate() *Rate {
	return &Rate{most: rateSources, now: map[source]time.Duration{}}
}

// Set replaces the bound: one each interval, and burst at once after a pause. An interval of 0 is no bound.
func (r *Rate) Set(every time.Duration, burst int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.every, r.burst = every, burst
	if every == 0 {
		r.now, r.before = map[source]time.Duration{}, nil
	}
}

// Take takes a token of src's, at a time that is not before that of an earlier call by more than calls
// overlap. The error is a [*RateError]. The zero Addr, a source that is not known, is bounded by nothing.
func (r *Rate) Take(src netip.Addr, at time.Time) error {
	s := sourceOf(src)
	if s == (source{}) {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.every == 0 {
		return nil
	}
	if r.began.IsZero() {
		r.began = at
	}
	now := at.Sub(r.began)
	r.rotate(now)
	full, recent := r.now[s]
	if !recent {
		full = r.before[s]
	}
	full = max(full, now) + r.every
	if over := full - now - time.Duration(r.burst)*r.every; over > 0 {
		r.now[s] = full - r.every // who goes on coming is not forgotten
		return &RateError{Source: s.prefix(), Every: r.every, Burst: r.burst, After: over}
	}
	r.now[s] = full
	return nil
}

// rotate forgets those that have not come since the rotation before, once their buckets are full or there are
// too many.
//
// +checklocks:r.mu
func (r *Rate) rotate(now time.Duration) {
	if len(r.now) < r.most/2 && now-r.rotated < time.Duration(r.burst)*r.every {
		return
	}
	if len(r.now) > 0 || r.before != nil {
		r.now, r.before = map[source]time.Duration{}, r.now
	}
	r.rotated = now
}

// RateError says that a source comes too often.
type RateError struct {
	Source netip.Prefix
	Every  time.Duration
	Burst  int
	After  time.Duration // until it may come again
}

func (e *RateError) Error() string {
	return fmt.Sprintf("too many new connections from one source: %v may open one every %v, and %d at once "+
		"(limits.new_connections_per_source)", name(e.Source), e.Every, e.Burst)
}
