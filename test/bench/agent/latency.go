package agent

import (
	"math"
	"slices"
	"time"
)

// latency records a time in ns; more than 4.2 s counts as that.
func (c *cell) latency(ns int64) {
	c.latencies = append(c.latencies, uint32(min(ns, math.MaxUint32)))
}

// quantiles fills in the nearest-rank quantiles. It sorts what it is given.
func quantiles(r *Report, ns []uint32) {
	if len(ns) == 0 {
		return
	}
	slices.Sort(ns)
	at := func(q float64) time.Duration {
		return time.Duration(ns[min(len(ns)-1, int(math.Ceil(q*float64(len(ns))))-1)])
	}
	r.Min, r.P50, r.P99, r.P999, r.Max = time.Duration(ns[0]), at(0.50), at(0.99), at(0.999), time.Duration(ns[len(ns)-1])
}
