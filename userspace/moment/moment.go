// Package moment has times that an age is told by, each in one word, which may be atomic: what is made of
// them by [time.Time.UnixNano] follows the clock of the machine wherever that is set.
package moment

import (
	"math"
	"sync/atomic"
	"time"
)

// A Moment is a time of the monotonic clock; the zero Moment is never.
type Moment int64

var base = time.Now()

// Now is this moment.
func Now() Moment { return of(time.Since(base)) }

// Of gives the moment of t, which [time.Now] has made, or else what the clock of the machine says to it now.
func Of(t time.Time) Moment { return of(t.Sub(base)) }

func of(d time.Duration) Moment {
	if d == 0 {
		d++
	}
	return Moment(d)
}

// Age is how long before now m was: for ever, if never.
func (m Moment) Age(now Moment) time.Duration {
	if m == 0 {
		return math.MaxInt64
	}
	return time.Duration(now - m)
}

// Since is how long before now m was, as Age.
func (m Moment) Since() time.Duration { return m.Age(Now()) }

// Time gives m as a [time.Time], by the clock of the machine as that is set now; never is the zero Time.
func (m Moment) Time() time.Time {
	if m == 0 {
		return time.Time{}
	}
	now := time.Now()
	return now.Add(time.Duration(m) - now.Sub(base))
}

// Var is a Moment that may be read and written at any time.
type Var struct{ v atomic.Int64 }

func (v *Var) Load() Moment { return Moment(v.v.Load()) }

func (v *Var) Store(m Moment) { v.v.Store(int64(m)) }

func (v *Var) CompareAndSwap(old, new Moment) bool { return v.v.CompareAndSwap(int64(old), int64(new)) }
