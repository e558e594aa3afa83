// Package balance chooses among the targets of a route, and goes on to another one where one fails.
//
//	balance.go  which one is tried: by weight, and by what is known of each
//	race.go     one after the other, and beside those that are slow
package balance

import (
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// AvoidFor is how long a target that could not be reached is tried only if there is no other.
const AvoidFor = 10 * time.Second

// mostSlow is how many times in a row a target may be slower than another one before it counts as one that
// can't be reached. One lost packet is enough for being slow.
const mostSlow = 3

// Health is what is known of a target from the last attempts to connect to it. The zero Health is that of one
// to which nobody has connected. It is safe for concurrent use, and must not be copied.
type Health struct {
	failed atomic.Int64 // when it could last not be reached, Unix ns; 0 if it was reached since
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
func (h *Health) Failed() { h.failed.Store(time.Now().UnixNano()) }

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
func (h *Health) IsAvoided() bool { return h.isAvoided(time.Now()) }

func (h *Health) isAvoided(now time.Time) bool {
	return now.UnixNano()-h.failed.Load() <= int64(AvoidFor)
}

// isProbed has one attempt find out whether a target that was avoided is back, while others avoid it on.
func (h *Health) isProbed(now time.Time) {
	if failed := h.failed.Load(); failed != 0 {
		h.failed.CompareAndSwap(failed, now.UnixNano())
	}
}

// Option is one of the targets that [Pick] chooses from.
type Option struct {
	Weight int  // its share; with 0 it is a spare, as with Backup
	Backup bool // it is chosen only where no other can be reached
	Tried  bool // it is not chosen
	Off    bool // it is chosen only where all others can't be reached: an operator's word
	*Health
}

func (o *Option) isSpare() bool { return o.Backup || o.Weight == 0 }

// Pick chooses one of n options that was not tried, and returns its index, or -1 if there is none: by weight
// among those that could be reached lately, spare ones after the others, else among those that could not, in
// the same order.
func Pick(n int, option func(i int) Option) int {
	now := time.Now()
	const avoided, off = 2, 4 // classes: 0 and 1 (spare), then the same of those that are avoided, then the rest
	var fit [off + 1][]int
	var total [len(fit)]int // weights
	for i := range n {
		o := option(i)
		if o.Tried {
			continue
		}
		class := 0
		if o.isSpare() {
			class = 1
		}
		if o.isAvoided(now) {
			class += avoided
		}
		if o.Off {
			class = off
		}
		fit[class], total[class] = append(fit[class], i), total[class]+max(o.Weight, 1)
	}
	for class, all := range fit {
		if len(all) == 0 {
			continue
		}
		left := rand.IntN(total[class])
		for _, i := range all {
			o := option(i)
			if left -= max(o.Weight, 1); left < 0 {
				if class < avoided {
					o.isProbed(now)
				}
				return i
			}
		}
	}
	return -1
}
