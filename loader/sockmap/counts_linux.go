package sockmap

import (
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// A burst of failures that a healthy kernel does not show switches the datapath off.
const (
	burstFailures = 16
	burstWithin   = 10 * time.Second
)

// Counts is what is counted of a datapath, and its switch.
type Counts struct {
	Name   string
	Off    atomic.Pointer[string] // why it is switched off; nil: it is on
	stalls atomic.Uint64

	mu sync.Mutex
	// +checklocks:mu
	recent []time.Time // failures
}

// IsOff reports whether the datapath takes no flows any more.
func (c *Counts) IsOff() bool { return c.Off.Load() != nil }

// CountRefusal counts a failure if err says that the kernel refused a flow. err may be nil.
func (c *Counts) CountRefusal(log *slog.Logger, err error) {
	if errors.Is(err, RefusedMaps) || errors.Is(err, refusedInsert) {
		c.countFailure(log, err.Error())
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
		log.Warn("the "+c.Name+" datapath is switched off; new flows go another way", "failures", burstFailures, "within", burstWithin, "last", why)
	}
}

// ClampedSegments is how many segments lost their payload to the filter that bounds memory; their senders
// sent it again.
func (l *Engine) ClampedSegments() (n uint64) {
	_ = l.objects.Clamped.Get(&n)
	return n
}

// Health says why no flow is taken any more, "" if flows are taken, and how often a stalled flow had to be
// woken for lack of an event, which should be never.
func (l *Engine) Health() (off string, stalls uint64) { return l.counts.Health() }

// Health is as [Engine.Health].
func (c *Counts) Health() (off string, stalls uint64) {
	if why := c.Off.Load(); why != nil {
		off = *why
	}
	return off, c.stalls.Load()
}
