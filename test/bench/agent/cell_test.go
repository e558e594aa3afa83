package agent

import (
	"testing"
	"time"
)

// What counts as throughput is what came between warming up and the end, pauses included.
func TestRate(t *testing.T) {
	type receipt struct {
		ms    int64
		bytes int
	}
	every := func(from, to int64) (all []receipt) {
		for ms := from; ms <= to; ms++ {
			all = append(all, receipt{ms, 1000})
		}
		return all
	}
	for _, c := range []struct {
		name     string
		receipts []receipt
		want     float64 // bytes a second
		pause    time.Duration
	}{
		{"steady", every(1, 200), 1e6, time.Millisecond},
		{"a pause from warming up to beyond the end", append(every(1, 10), every(150, 200)...), 10e3 / 0.149, 140 * time.Millisecond},
		{"a pause to beyond the end", append(every(1, 50), every(160, 200)...), (50 + 1 - 21) * 1000 / 0.139, 110 * time.Millisecond},
		{"once more", append(every(1, 10), receipt{150, 1000}), 11e3 / 0.149, 140 * time.Millisecond},
		{"never again", every(1, 10), 0, time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			cell := &cell{warm: 20 * int64(time.Millisecond), duration: 100 * int64(time.Millisecond)}
			for _, r := range c.receipts {
				cell.receivedAt(r.bytes, r.ms*int64(time.Millisecond))
			}
			if got := cell.rate(); got < 0.9*c.want || got > 1.1*c.want || cell.Pause != c.pause {
				t.Errorf("%.0f B/s after a pause of %v, want %.0f after %v", got, cell.Pause, c.want, c.pause)
			}
		})
	}
}
