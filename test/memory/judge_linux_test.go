package main

import (
	"strings"
	"testing"
	"time"
)

// TestJudge has an outcome that is good in all, and then one that is bad in one thing each.
func TestJudge(t *testing.T) {
	good := func() *outcome {
		p := phase{probe: result{p99: 200 * time.Millisecond, tried: 100, paced: 10, bulk: 20}, got: 1, spare: 1}
		o := &outcome{
			wanted: load{idle: 20000, stopped: 1000, hellos: 5000}, mostIdle: 8000,
			seen:  sourceCount{Stopped: 50, StoppedReset: 400, StoppedRefuse: 900, Idle: 8000, IdleRefused: 12000, IdleAlive: 8000},
			scale: 10, line: 1e7, able: 400, rate: 200, reached: 199, flood: 4900, flooded: hellosFor,
			budget: 100, before: sample{Taken: 20, Slab: 5}, most: sample{Taken: 110, RSS: 60, TCP: 20, Slab: 15},
		}
		for _, name := range []string{"unloaded", "idle", "+ stopped", "+ hellos", flood, "afterwards"} {
			p.name = name
			o.phases = append(o.phases, p)
		}
		o.phases[1].used, o.phases[1].most.Taken = 85, 100
		o.phases[3].spare, o.phases[3].probe.bulk = 0.5, 9
		o.phases[4].probe = result{p99: time.Minute, tried: 1, failed: 1}
		return o
	}
	for name, c := range map[string]struct {
		change func(*outcome)
		fails  string // how the lines begin that fail, with commas
	}{
		"good":                  {func(*outcome) {}, ""},
		"died":                  {func(o *outcome) { o.trouble = []string{"died"} }, "alive"},
		"taken":                 {func(o *outcome) { o.most.Taken = 121 }, "within the budget"},
		"parts":                 {func(o *outcome) { o.most.RSS = 71 }, "within the budget"},
		"refused idle":          {func(o *outcome) { o.seen.Idle, o.seen.IdleRefused, o.seen.IdleAlive = 39, 19961, 39 }, "idle"},
		"idle not tried":        {func(o *outcome) { o.seen.IdleRefused = 11000 }, "idle"},
		"not in the account":    {func(o *outcome) { o.phases[1].used = 79 }, "idle"},
		"idle ended":            {func(o *outcome) { o.seen.IdleAlive-- }, "idle"},
		"stopped refused":       {func(o *outcome) { o.seen.Stopped, o.seen.StoppedReset = 9, 90 }, "stopped"},
		"stopped not tried":     {func(o *outcome) { o.seen.StoppedRefuse = 100 }, "stopped"},
		"few hellos":            {func(o *outcome) { o.reached = 150 }, "hellos"},
		"hellos not tried":      {func(o *outcome) { o.flood = 3900 }, "flood"},
		"short flood":           {func(o *outcome) { o.flooded = hellosFor / 2 }, "flood"},
		"late":                  {func(o *outcome) { o.phases[1].probe.p99 = 1001 * time.Millisecond }, "idle"},
		"failed":                {func(o *outcome) { o.phases[5].probe.failed = 1 }, "afterwards"},
		"slow line":             {func(o *outcome) { o.phases[2].probe.paced = 7.9 }, "+ stopped"},
		"transfer failed":       {func(o *outcome) { o.phases[2].probe.bulkFailed = 1 }, "+ stopped"},
		"slow without a line":   {func(o *outcome) { o.phases[1].probe.bulk = 15.9 }, "idle"},
		"slow beside hellos":    {func(o *outcome) { o.phases[3].probe.bulk = 7.9 }, "+ hellos"},
		"slow, never recovered": {func(o *outcome) { o.phases[5].probe.bulk = 15.9 }, "afterwards"},
	} {
		t.Run(name, func(t *testing.T) {
			o, text := good(), new(strings.Builder)
			c.change(o)
			err := o.judge(text)
			var fails []string
			for line := range strings.Lines(text.String()) {
				if rest, bad := strings.CutPrefix(line, "FAIL "); bad {
					what, _, _ := strings.Cut(rest, ":")
					fails = append(fails, what)
				}
			}
			if got := strings.Join(fails, ","); got != c.fails || (err != nil) != (c.fails != "") {
				t.Errorf("%q failed, want %q (%v):\n%s", got, c.fails, err, text)
			}
		})
	}
}
