package balance

import (
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// fullShare is the share of its weight that a target has which needs no slow start: all of the steps.
const fullShare = 10

// Checked is what health checks have found of a target, which is up until they say else. They write it, and
// connections read it, in any goroutine. Nil is a target that is not checked. It must not be copied.
type Checked struct {
	down atomic.Bool
	back moment.Var   // when it came back; never: it has its whole share
	over atomic.Int64 // ns from then until it has its whole share
}

// SetDown has other targets tried before this one.
func (c *Checked) SetDown() { c.down.Store(true) }

// SetUp lets connections go there again: a tenth of its share at first, and a tenth more with each tenth of
// slowStart.
func (c *Checked) SetUp(now time.Time, slowStart time.Duration) {
	c.over.Store(int64(slowStart))
	c.back.Store(moment.Of(now))
	c.down.Store(false)
}

// IsDown reports whether health checks have found that it is down.
func (c *Checked) IsDown() bool { return c != nil && c.down.Load() }

// Share is how much of its weight a target has now, in percent.
func (c *Checked) Share(now time.Time) int { return c.share(moment.Of(now)) * 100 / fullShare }

// share is the same in steps, from 1 to fullShare.
func (c *Checked) share(now moment.Moment) int {
	if c == nil {
		return fullShare
	}
	back := c.back.Load()
	over := c.over.Load()
	if back == 0 || over <= 0 {
		return fullShare
	}
	since := int64(max(back.Age(now), 0)) // it may have come back after now
	return int(min(1+since/max(over/fullShare, 1), fullShare))
}
