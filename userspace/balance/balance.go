// Package balance chooses among the targets of a route, and goes on to another one where one fails.
//
//	balance.go  which one is tried: by weight, and by what is known of each
//	checked.go  what health checks have found, and the slow start of what came back
//	source.go   the same target for a client each time
//	race.go     one after the other, and beside those that are slow
package balance

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// AvoidFor is how long a target that could not be reached is tried only if there is no other.
const AvoidFor = 10 * time.Second

// mostSlow is how many times in a row a target may be slower than another one before it counts as one that
// can't be reached. One lost packet is enough for being slow.
const mostSlow = 3

// Health is what is known of a target from the last attempts to connect to it. The zero Health is that of one
// to which nobody has connected. It is safe for concurrent use, and must not be copied.
type Health struct {
	failed moment.Var   // when it could last not be reached; never, if it was reached since
	slow   atomic.Int64 // times in a row that another one was faster
}

// Worked notes that a connection was made.
func (h *Health) Worked() {
	if h.failed.Load() != 0 || h.slow.Load() != 0 { // else requests would have a line of memory to fight for
		h.failed.Store(0)
		h.slow.Store(0)
	}
}

// Failed notes that no connection could be made.
func (h *Health) Failed() { h.failed.Store(moment.Now()) }

// Slow notes that another target was connected to before this one, which had begun earlier. It reports
// whether the target counts as one that can't be reached.
func (h *Health) Slow() bool {
	if h.slow.Add(1) < mostSlow {
		return false
	}
	h.Failed()
	return true
}

// IsAvoided reports whether a target is tried only if there is no other.
func (h *Health) IsAvoided() bool { return h.isAvoided(moment.Now()) }

func (h *Health) isAvoided(now moment.Moment) bool {
	return h.failed.Load().Age(now) <= AvoidFor
}

// isProbed has one attempt find out whether a target that was avoided is back, while others avoid it on.
func (h *Health) isProbed(now moment.Moment) {
	if failed := h.failed.Load(); failed != 0 {
		h.failed.CompareAndSwap(failed, now)
	}
}

// Option is one of the targets that [Pick] chooses from.
type Option struct {
	Weight  int  // its share; with 0 it is a spare, as with Backup
	Backup  bool // it is chosen only where no other can be reached
	Tried   bool // it is not chosen
	Offline bool // its machine is said to be: it is chosen as one that could not be reached lately
	Off     bool // it is chosen only where all others can't be reached: an operator's word

	Key uint64 // see Key; 0: the choice is random
	*Health
	*Checked // nil: it is not checked
}

func (o *Option) isSpare() bool { return o.Backup || o.Weight == 0 }

// The classes of options: one is chosen only where there is none of those before it. Each but the last has
// spare ones behind it.
const (
	fit     = 0
	avoided = 2 // could not be reached lately, or is offline
	down    = 4 // by its health checks
	off     = 6
	classes = 7
)

// class is the one of o, or -1 where it is not chosen.
func (o *Option) class(now moment.Moment) int {
	class := fit
	switch {
	case o.Tried:
		return -1
	case o.Off:
		return off
	case o.IsDown():
		class = down
	case o.isAvoided(now), o.Offline:
		class = avoided
	}
	if o.isSpare() {
		class++
	}
	return class
}

// Pick chooses one of n options that was not tried, and returns its index, or -1 if there is none. Those that
// could be reached lately come before those that could not, those before what health checks have found down,
// and of each the spare ones last. Of equals one is chosen by weight: at random, or by their Keys.
func Pick(n int, option func(i int) Option) int {
	now := moment.Now()
	var of [classes][]int
	var total [classes]int
	share := func(o *Option) int { return max(o.Weight, 1) * o.share(now) }
	for i := range n {
		o := option(i)
		if class := o.class(now); class >= 0 {
			of[class], total[class] = append(of[class], i), total[class]+share(&o)
		}
	}
	for class, all := range of {
		if len(all) == 0 {
			continue
		}
		left, best, greatest := rand.IntN(total[class]), all[0], -1.0
		for _, i := range all {
			o := option(i)
			if o.Key != 0 {
				if s := score(o.Key, share(&o)); s > greatest {
					best, greatest = i, s
				}
			} else if left -= share(&o); left < 0 {
				best = i
				break
			}
		}
		if o := option(best); class < avoided {
			o.isProbed(now)
		}
		return best
	}
	return -1
}
