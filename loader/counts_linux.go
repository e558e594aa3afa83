package loader

import (
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A burst of failures that a healthy kernel does not show switches the datapath off.
const (
	burstFailures = 16
	burstWithin   = 10 * time.Second
)

// counts is what is counted, and the switch.
type counts struct {
	name       string // of the datapath
	generation atomic.Uint32
	live       atomic.Int64
	spliced    atomic.Uint64
	switched   atomic.Uint64
	stalls     atomic.Uint64
	detached   atomic.Uint64
	inserted   atomic.Uint64
	off        atomic.Pointer[string]

	mu      sync.Mutex
	refused map[string]int
	faults  map[string]int
	recent  []time.Time
}

func (c *counts) init(name string) {
	c.name, c.refused, c.faults = name, make(map[string]int), make(map[string]int)
}

func (c *counts) isOff() bool { return c.off.Load() != nil }

// countBegun counts a flow that was taken over.
func (c *counts) countBegun() {
	c.spliced.Add(1)
	c.live.Add(1)
}

// countRefusal counts why a flow was not, if err is not nil.
func (c *counts) countRefusal(l *Loader, err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	c.refused[err.Error()]++
	c.mu.Unlock()
	if errors.Is(err, refusedMaps) || errors.Is(err, refusedInsert) {
		c.countFailure(l, err.Error())
	}
}

// countFault counts a flow that the verdict gave up.
func (c *counts) countFault(l *Loader, name string) {
	c.mu.Lock()
	c.faults[name]++
	c.mu.Unlock()
	if name != faultName(sockmapFaultFAULT_PEER) { // a peer may die at any time
		c.countFailure(l, name)
	}
}

// countStall counts a flow that had come to rest with bytes to move, until the sweep found it. The first few are logged.
func (c *counts) countStall(l *Loader, cookie uint64, why string) {
	if n := c.stalls.Add(1); n <= 10 {
		l.log.Warn("a spliced flow had stalled, and goes on", "flow", cookie, "why", why, "stalls", n)
	}
}

// countFailure switches the datapath off if there have been too many lately. Flows that live go on.
func (c *counts) countFailure(l *Loader, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.recent = append(c.recent, now)
	if len(c.recent) > burstFailures {
		c.recent = c.recent[1:]
	}
	if len(c.recent) < burstFailures || now.Sub(c.recent[0]) > burstWithin {
		return
	}
	if c.off.CompareAndSwap(nil, &why) {
		l.log.Warn("the "+c.name+" datapath is switched off; new flows go another way", "failures", burstFailures, "within", burstWithin, "last", why)
	}
}

// Stats counts since New. Those of [Loader.Local] count by themselves.
func (l *Loader) Stats() Stats {
	s := l.counts.stats()
	_ = l.objects.Clamped.Get(&s.Clamped)
	return s
}

func (c *counts) stats() Stats {
	s := Stats{Flows: int(c.live.Load()), Spliced: c.spliced.Load(), Switched: c.switched.Load(), Inserted: c.inserted.Load(), Bulk: c.detached.Load()}
	s.Off, s.Stalls = c.health()
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Refused, s.Faults = maps.Clone(c.refused), maps.Clone(c.faults)
	return s
}

// ClampedSegments is Stats.Clamped; see userspace/front.
func (l *Loader) ClampedSegments() (n uint64) {
	_ = l.objects.Clamped.Get(&n)
	return n
}

// Health is the part of Stats that an operator has to know; see userspace/relay.
func (l *Loader) Health() (off string, stalls uint64) { return l.counts.health() }

func (c *counts) health() (off string, stalls uint64) {
	if why := c.off.Load(); why != nil {
		off = *why
	}
	return off, c.stalls.Load()
}

// isNotEstablished: sock_map_sk_state_allowed said no.
func isNotEstablished(err error) bool { return errors.Is(err, unix.EOPNOTSUPP) }
