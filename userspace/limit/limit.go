// Package limit counts connections, or requests, in all and per source, and says when there are too many.
//
// A source is an IPv4 address, or the /64 of an IPv6 address, since that is the least that one customer gets
// (RFC 6177); an IPv4 address mapped into IPv6 is the IPv4 address. Tailscale's range fd7a:115c:a1e0::/48 is
// the exception: each of its addresses is a node of its own, and all nodes of a tailnet may share one /64.
//
// One mutex guards it all. Acquire and Release together take 0.2 µs with 65,535 sources, on one CPU as on
// two, where accepting a connection takes tens of µs; sharding would buy nothing, and make the total inexact
// or a second shared word. See the benchmarks.
//
// Its files:
//
//	limit.go   the limits, and a lease for each that is let in
//	source.go  whose an address is
//	rate.go    new connections in a time
//	wait.go    leases that wait until their source has room
//	yield.go   leases that give way when all places are taken
package limit

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
)

var (
	// ErrTotal is what an [*OverError] is when the limit on all connections is reached.
	ErrTotal = errors.New("too many")

	// ErrSource is what an [*OverError] is when the limit on one source's connections is reached.
	ErrSource = errors.New("too many from one source")
)

// OverError says which limit refused a connection. It matches [ErrTotal] or [ErrSource].
type OverError struct {
	Source netip.Prefix // where the refused connection came from, the zero Prefix when that is not known
	Count  int          // connections that there are: in all, or from Source
	Limit  int
	kind   error
	noun   string
}

func (e *OverError) Error() string {
	if e.kind == ErrSource {
		return fmt.Sprintf("too many %s from one source: %v has %d, the limit is %d (limits.%s_per_source)", e.noun, name(e.Source), e.Count, e.Limit, e.noun)
	}
	return fmt.Sprintf("too many %s: %d, the limit is %d (limits.%s)", e.noun, e.Count, e.Limit, e.noun)
}

func (e *OverError) Unwrap() error { return e.kind }

// Limiter counts connections. Its memory is bounded by the limit on all connections: a source is remembered
// for as long as it has one. It is safe for concurrent use.
type Limiter struct {
	noun string // what is counted, as the configuration calls it

	mu        sync.Mutex
	total     int               // +checklocks:mu
	perSource int               // +checklocks:mu
	sources   map[source]charge // +checklocks:mu
	queue     queue             // +checklocks:mu
	// +checklocks:mu
	held int // leases held, those without a source included
	// +checklocks:mu
	peak int // most sources since the map was made
	// +checklocks:mu
	waiting int // leases that wait for a place of their source
	// +checklocks:mu
	yielding int // leases that may be taken back
}

// charge is what a source has.
type charge struct {
	count   int // leases held; 0 only while others wait
	queue   queue
	waiting []*waiter // for one of them, the first comer first
}

// New returns a limiter of total connections, and perSource of them from any one source. 0 or less means no
// limit.
func New(total, perSource int) *Limiter { return newLimiter("connections", total, perSource) }

// NewRequests is New for requests: a lease is then the right to one of them.
func NewRequests(total, perSource int) *Limiter { return newLimiter("requests", total, perSource) }

func newLimiter(noun string, total, perSource int) *Limiter {
	l := &Limiter{noun: noun, sources: make(map[source]charge)}
	l.SetLimits(total, perSource)
	return l
}

// SetLimits replaces the limits. Leases that are held stay so, even when there are now too many; new ones are
// refused until there is room.
func (l *Limiter) SetLimits(total, perSource int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total, l.perSource = total, perSource
}

// Acquire counts one more connection from src. The error is an [*OverError]; there is then nothing to
// release. Where there is no room the oldest lease that yields gives its place: of src, or of all.
//
// The zero Addr is a source that is not known (yet): it counts in all, and is bounded by nothing else. That
// is for connections of a trusted proxy, which all have its address until [Lease.Move] says whose they are.
func (l *Limiter) Acquire(src netip.Addr) (*Lease, error) {
	s := sourceOf(src)
	for {
		lease, give, err := l.acquire(s)
		if give == nil {
			return lease, err
		}
		give() // once for each that yields at most
	}
}

// Adopt counts one more connection from src, which another process has let in, however many there are. It is
// as [Limiter.SetLimits] leaves one behind: new ones are refused until there is room.
func (l *Limiter) Adopt(src netip.Addr) *Lease {
	s := sourceOf(src)
	l.mu.Lock()
	defer l.mu.Unlock()
	if s != (source{}) {
		l.count(s)
	}
	l.held++
	return &Lease{limiter: l, source: s}
}

// acquire is Acquire, or says how to have a place first.
func (l *Limiter) acquire(s source) (lease *Lease, give func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err = l.full(s); err != nil { // first: who can't have another's place must not take it
		c := l.sources[s]
		give = c.queue.takeOldest()
	} else if l.total > 0 && l.held >= l.total {
		give = l.queue.takeOldest()
	}
	switch {
	case give != nil:
		return nil, give, nil
	case l.total > 0 && l.held >= l.total:
		return nil, nil, &OverError{Source: s.prefix(), Count: l.held, Limit: l.total, kind: ErrTotal, noun: l.noun}
	}
	if err == nil {
		err = l.enter(s)
	}
	if err != nil {
		return nil, nil, err
	}
	l.held++
	return &Lease{limiter: l, source: s}, nil, nil
}

// full says why s can have no more.
//
// +checklocks:l.mu
func (l *Limiter) full(s source) error {
	if n := l.sources[s].count; l.perSource > 0 && n >= l.perSource {
		return &OverError{Source: s.prefix(), Count: n, Limit: l.perSource, kind: ErrSource, noun: l.noun}
	}
	return nil
}

// enter counts one more for s.
//
// +checklocks:l.mu
func (l *Limiter) enter(s source) error {
	if s == (source{}) {
		return nil
	}
	if err := l.full(s); err != nil {
		return err
	}
	l.count(s)
	return nil
}

// count counts one more for s, which is known.
//
// +checklocks:l.mu
func (l *Limiter) count(s source) {
	c := l.sources[s]
	c.count++
	l.sources[s] = c
	l.peak = max(l.peak, len(l.sources))
}

// leave counts one less for s.
//
// +checklocks:l.mu
func (l *Limiter) leave(s source) {
	if s == (source{}) {
		return
	}
	c := l.sources[s]
	if len(c.waiting) > 0 && c.count <= l.perSource && (l.total <= 0 || l.held < l.total) {
		l.grant(s, c)
		return
	}
	c.count--
	l.keepSource(s, c)
}

// keepSource makes c what s has.
//
// +checklocks:l.mu
func (l *Limiter) keepSource(s source, c charge) {
	if c.count > 0 || len(c.waiting) > 0 {
		l.sources[s] = c
		return
	}
	delete(l.sources, s)
	// A Go map keeps the memory of what was deleted. After a flood from many sources that is worth giving
	// back.
	if len(l.sources) == 0 && l.peak > 1024 {
		l.sources, l.peak = make(map[source]charge), 0
	}
}

// Lease is the right to one connection.
type Lease struct {
	limiter  *Limiter
	source   source // +checklocks:limiter.mu
	released bool   // +checklocks:limiter.mu
	// +checklocks:limiter.mu
	yields *place // nil while its place is kept
}

// Move counts the lease for src from now on, because a PROXY header said where the connection really comes
// from. The total stays the same, and it yields no more. When src has too many already the error is an
// [*OverError] and the lease stays where it was: the caller releases it as ever. Moving a released lease does
// nothing.
func (l *Lease) Move(src netip.Addr) error {
	s := sourceOf(src)
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	if l.released || s == l.source {
		return nil
	}
	if err := l.limiter.enter(s); err != nil {
		return err
	}
	l.keep()
	l.limiter.leave(l.source)
	l.source = s
	return nil
}

// Source is whose it is, the zero Prefix where that is not known.
func (l *Lease) Source() netip.Prefix {
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	return l.source.prefix()
}

// Count returns how many leases its source holds, 0 where the source is not known.
func (l *Lease) Count() int {
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	return l.limiter.sources[l.source].count
}

// Release gives the lease back. Only the first call counts.
func (l *Lease) Release() {
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	if l.released {
		return
	}
	l.keep()
	l.released = true
	l.limiter.held--
	l.limiter.leave(l.source)
}

// Total returns how many leases are held.
func (l *Limiter) Total() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// Sources says how many leases each source holds: by its address (/32, /128) or its IPv6 /64.
func (l *Limiter) Sources() map[netip.Prefix]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := map[netip.Prefix]int{}
	for s, c := range l.sources {
		if c.count > 0 {
			all[s.prefix()] = c.count
		}
	}
	return all
}
