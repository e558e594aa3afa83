package agent

import "time"

// maxFaults is how many faults of a cell are told in words.
const maxFaults = 5

// Report is what an end of the flows saw of one cell: one measure run once on one system.
type Report struct {
	Flows          int      // that began
	Done           int      // that ended as they should
	Sent, Received int64    // payload bytes of flows whose streams ended
	Faults         int      // flows that broke: a byte wrong, reset, hung
	FaultTexts     []string // the first of them
	// bytes a second that were received between warming up and the end of the time
	Rate  float64
	Pause time.Duration // the longest in which a flow's loop received nothing, in that time
	Quiet time.Duration
	Held  int64 // payload bytes sent so far by flows that live

	Count          int // requests, or flows that ended, within the time
	Seconds        float64
	P50, P99, P999 time.Duration
	Min, Max       time.Duration
}

// cell is a loop's share of a Report.
type cell struct {
	Report
	progress  int64 // when a byte was last sent or received
	heard     int64 // when a byte was last received
	latencies []uint32

	warm, duration int64 // ns; the window of Rate
	bytes          int64
	t0, t1, t2     int64 // of the first byte, and of both ends of the window
	b1, b2         int64 // bytes received until then
}

func (c *cell) fault(err error) {
	c.Faults++
	if len(c.FaultTexts) < maxFaults {
		c.FaultTexts = append(c.FaultTexts, err.Error())
	}
}

// received counts payload for the rate.
func (c *cell) received(n int) { c.receivedAt(n, now()) }

func (c *cell) receivedAt(n int, t int64) {
	c.progress = t
	if c.duration == 0 {
		return
	}
	c.bytes += int64(n)
	if c.t0 == 0 {
		c.t0 = t
	} else if c.heard <= c.t0+c.duration {
		c.Pause = max(c.Pause, time.Duration(t-c.heard))
	}
	c.heard = t
	switch {
	case t == c.t0, t < c.t0+c.warm:
	case c.t1 == 0 && t > c.t0+c.duration: // a pause took the whole window: all there was is one
		c.t1, c.t2, c.b2 = c.t0, t, c.bytes
	case c.t1 == 0:
		c.t1, c.b1 = t, c.bytes
	case c.t2 <= c.t0+c.duration:
		// The first bytes after the end close the window: a pause that lasts until then is part of it.
		c.t2, c.b2 = t, c.bytes
	}
}

// rate is in bytes a second; 0 if nothing came after the first bytes.
func (c *cell) rate() float64 {
	switch {
	case c.t1 == 0:
		return 0
	case c.t2 <= c.t1: // only once in the window, and never again
		return float64(c.b1) / (float64(c.t1-c.t0) / 1e9)
	}
	return float64(c.b2-c.b1) / (float64(c.t2-c.t1) / 1e9)
}

// merge adds up what the loops of an agent saw.
func merge(cells []*cell) Report {
	var r Report
	var latencies []uint32
	last := int64(0)
	for _, c := range cells {
		r.Flows += c.Flows
		r.Done += c.Done
		r.Sent += c.Sent
		r.Received += c.Received
		r.Faults += c.Faults
		r.FaultTexts = append(r.FaultTexts, c.FaultTexts[:min(len(c.FaultTexts), maxFaults-len(r.FaultTexts))]...)
		r.Rate += c.rate()
		r.Pause = max(r.Pause, c.Pause)
		r.Count += c.Count
		r.Seconds = max(r.Seconds, c.Seconds)
		latencies = append(latencies, c.latencies...)
		last = max(last, c.progress)
	}
	r.Quiet = time.Duration(now() - last)
	quantiles(&r, latencies)
	return r
}
