package sockmap

import (
	"errors"
	"log/slog"
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

// Counts is what is counted, and the switch.
type Counts struct {
	name       string // of the datapath
	generation atomic.Uint32
	live       atomic.Int64
	Spliced    atomic.Uint64
	switched   atomic.Uint64
	stalls     atomic.Uint64
	detached   atomic.Uint64
	inserted   atomic.Uint64
	Off        atomic.Pointer[string]

	mu sync.Mutex
	// +checklocks:mu
	refused map[string]int
	// +checklocks:mu
	faults map[string]int
	// +checklocks:mu
	recent []time.Time
}

// Init is called once, with the name of the datapath.
// +checklocksignore: nobody else has it yet.
func (c *Counts) Init(name string) {
	c.name, c.refused, c.faults = name, make(map[string]int), make(map[string]int)
}

func (c *Counts) IsOff() bool { return c.Off.Load() != nil }

// countBegun counts a flow that was taken over.
func (c *Counts) countBegun() {
	c.Spliced.Add(1)
	c.live.Add(1)
}

// CountRefusal counts why a flow was not, if err is not nil.
func (c *Counts) CountRefusal(log *slog.Logger, err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	c.refused[err.Error()]++
	c.mu.Unlock()
	if errors.Is(err, RefusedMaps) || errors.Is(err, refusedInsert) {
		c.countFailure(log, err.Error())
	}
}

// countFault counts a flow that the verdict gave up.
func (c *Counts) countFault(log *slog.Logger, name string) {
	c.mu.Lock()
	c.faults[name]++
	c.mu.Unlock()
	if name != faultName(sockmapFaultFAULT_PEER) { // a peer may die at any time
		c.countFailure(log, name)
	}
}

// countStall counts a flow that had come to rest with bytes to move, until the sweep found it. The first few
// are logged.
func (c *Counts) countStall(log *slog.Logger, cookie uint64, why string) {
	if n := c.stalls.Add(1); n <= 10 {
		log.Warn("a spliced flow had stalled, and goes on", "flow", cookie, "why", why, "stalls", n)
	}
}

// countFailure switches the datapath off if there have been too many lately. Flows that live go on.
func (c *Counts) countFailure(log *slog.Logger, why string) {
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
	if c.Off.CompareAndSwap(nil, &why) {
		log.Warn("the "+c.name+" datapath is switched off; new flows go another way", "failures", burstFailures, "within", burstWithin, "last", why)
	}
}

// Stats counts since New. Those of skmsg are counted apart.
func (l *Engine) Stats() Stats {
	s := l.counts.Stats()
	_ = l.objects.Clamped.Get(&s.Clamped)
	return s
}

func (c *Counts) Stats() Stats {
	s := Stats{Flows: int(c.live.Load()), Spliced: c.Spliced.Load(), Switched: c.switched.Load(), Inserted: c.inserted.Load(), Bulk: c.detached.Load()}
	s.Off, s.Stalls = c.Health()
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Refused, s.Faults = maps.Clone(c.refused), maps.Clone(c.faults)
	return s
}

// ClampedSegments is Stats.Clamped; see userspace/server.
func (l *Engine) ClampedSegments() (n uint64) {
	_ = l.objects.Clamped.Get(&n)
	return n
}

// Health is the part of Stats that an operator has to know; see userspace/relay.
func (l *Engine) Health() (off string, stalls uint64) { return l.counts.Health() }

func (c *Counts) Health() (off string, stalls uint64) {
	if why := c.Off.Load(); why != nil {
		off = *why
	}
	return off, c.stalls.Load()
}

// isNotEstablished: sock_map_sk_state_allowed said no.
func isNotEstablished(err error) bool { return errors.Is(err, unix.EOPNOTSUPP) }
