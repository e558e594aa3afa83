// Package report keeps what was measured, says what of it is a difference, and shows it: as a table, as JSON,
// as text for benchstat, and as a chart.
package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

// Names of systems that others are compared with.
const (
	direct  = "direct"
	again   = "direct again"
	haproxy = "haproxy"
	caddy   = "caddy"
)

// Run is one run of the benchmark; its JSON is build/bench.json.
type Run struct {
	Mode     string            `json:"mode"` // "quick" or "full"
	Rounds   int               `json:"rounds"`
	Started  time.Time         `json:"started"`
	Seconds  float64           `json:"seconds"`
	Machine  Machine           `json:"machine"`
	Versions map[string]string `json:"versions"` // by system
	Notes    []string          `json:"notes,omitempty"`
	Warnings []string          `json:"warnings,omitempty"`
	LeftOut  []string          `json:"left_out,omitempty"`
	Failures []string          `json:"failures,omitempty"` // lost bytes and dropped flows: the run has failed
	Results  []Result          `json:"results"`

	samples map[key][]float64 // by round; NaN = none
	remarks map[key]string    // of a measure, whatever the system
	order   []key             // as they came
}

// Result is one measure of one system in one topology.
type Result struct {
	System   string  `json:"system"`
	Topology string  `json:"topology"`
	Measure  string  `json:"measure"`
	Median   float64 `json:"median"`
	Spread   float64 `json:"spread"` // half the distance between the quartiles of the rounds, in Unit
	Unit     string  `json:"unit"`
	Better   string  `json:"better"` // "higher" or "lower"

	// Medians of the ratios of each round; null where there is nothing to compare with.
	RatioToHAProxy *float64 `json:"ratio_to_haproxy"`
	RatioToDirect  *float64 `json:"ratio_to_direct"`

	// Noise is how far a ratio to HAProxy may be from 1 with no difference behind it.
	Noise *float64 `json:"noise"`
	// VersusHAProxy is "better", "worse", or "same": not told from noise.
	VersusHAProxy string `json:"versus_haproxy,omitempty"`
	// RatioToCaddy is there where Caddy was measured: on what terminates TLS.
	RatioToCaddy *float64 `json:"ratio_to_caddy,omitempty"`
	// Remark is what has to be known of how the measure was taken.
	Remark  string    `json:"remark,omitempty"`
	Samples []float64 `json:"samples"`
}

type key struct{ topology, system, measure string }

// New begins a run.
func New(quick bool, rounds int) *Run {
	mode := "full"
	if quick {
		mode = "quick"
	}
	return &Run{
		Mode: mode, Rounds: rounds, Started: time.Now().UTC().Truncate(time.Second), Machine: machine(),
		Versions: map[string]string{}, samples: map[key][]float64{}, remarks: map[key]string{},
	}
}

// Add adds the value of one round.
func (r *Run) Add(topology, system, measure string, round int, value float64) {
	k := key{topology, system, measure}
	s := r.samples[k]
	if s == nil {
		s = slices.Repeat([]float64{math.NaN()}, r.Rounds)
		r.samples[k] = s
		r.order = append(r.order, k)
	}
	s[round] = value
}

// Remark says of a measure what has to be known of how it was taken.
func (r *Run) Remark(topology, measure, text string) {
	r.remarks[key{topology, "", measure}] = text
}

// Warn and Fail note what the reader has to know.
func (r *Run) Warn(format string, args ...any) {
	r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...))
}
func (r *Run) Fail(format string, args ...any) {
	r.Failures = append(r.Failures, fmt.Sprintf(format, args...))
}

// Finish computes Results from what was added.
func (r *Run) Finish() {
	r.Results = nil
	for _, k := range r.order {
		if k.system == again {
			continue
		}
		s := r.samples[k]
		values := present(s)
		base := func(system string) []float64 { return r.samples[key{k.topology, system, k.measure}] }
		res := Result{
			System: k.system, Topology: k.topology, Measure: k.measure, Unit: Unit(k.measure), Better: better(k.measure),
			Median: round(median(values)), Spread: round(spread(values)),
			RatioToHAProxy: ratio(s, base(haproxy)), RatioToDirect: ratio(s, base(direct)),
			RatioToCaddy: ratio(s, base(caddy)), Remark: r.remarks[key{k.topology, "", k.measure}],
		}
		for _, v := range values {
			res.Samples = append(res.Samples, round(v))
		}
		if n := noise(base(direct), base(again), base(haproxy)); !math.IsNaN(n) {
			n = round(n)
			res.Noise = &n
		}
		if k.system != haproxy && res.RatioToHAProxy != nil && res.Noise != nil {
			res.VersusHAProxy = verdict(s, base(haproxy), *res.RatioToHAProxy, *res.Noise, res.Better)
		}
		r.Results = append(r.Results, res)
	}
	rank := map[string]int{}
	for i, k := range r.order {
		for _, name := range []string{k.topology, k.topology + k.measure, k.system} {
			if _, ok := rank[name]; !ok {
				rank[name] = i
			}
		}
	}
	// Measures of one test come in the order of a map: sort them by name within the test's first.
	slices.SortStableFunc(r.Results, func(a, b Result) int {
		return cmp.Or(cmp.Compare(rank[a.Topology], rank[b.Topology]), cmp.Compare(rank[a.Topology+a.Measure], rank[b.Topology+b.Measure]),
			cmp.Compare(rank[a.System], rank[b.System]))
	})
}

// Unit is a measure's unit.
func Unit(measure string) string {
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(measure, p) })
	}
	switch {
	case has("cpu_per_gib"):
		return "s/GiB"
	case has("cpu_per_flow"):
		return "us"
	case has("_cpu"):
		return "CPUs"
	case has("_bytes"):
		return "B"
	case has("_p50", "_p99"):
		return "us"
	case has("_ratio"):
		return "ratio"
	case has("_rate_") || measure == "new_flows" || measure == "proxied_flows":
		return "1/s"
	}
	return "MiB/s"
}

func better(measure string) string {
	if u := Unit(measure); u == "MiB/s" || u == "1/s" || u == "ratio" {
		return "higher"
	}
	return "lower"
}

// present drops rounds without a value.
func present(s []float64) []float64 {
	return slices.DeleteFunc(slices.Clone(s), math.IsNaN)
}

func median(s []float64) float64 { return quantile(s, 0.5) }

// quantile interpolates; NaN of nothing.
func quantile(s []float64, q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	s = slices.Sorted(slices.Values(s))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

func spread(s []float64) float64 { return (quantile(s, 0.75) - quantile(s, 0.25)) / 2 }

// ratio is the median of the rounds' ratios; nil if there is none.
func ratio(s, base []float64) *float64 {
	all := ratios(s, base)
	if len(all) == 0 {
		return nil
	}
	m := round(median(all))
	return &m
}

func ratios(s, base []float64) (all []float64) {
	for i := range min(len(s), len(base)) {
		if q := s[i] / base[i]; base[i] > 0 && !math.IsNaN(q) {
			all = append(all, q)
		}
	}
	return all
}

// noise is how far a ratio may be from 1 with no difference behind it: three quarters of the rounds have
// direct and direct again that close together. Where a measure is what a system takes beyond direct, direct
// again should have taken nothing, and what it did is taken as a part of HAProxy's. Where direct has no such
// measure, it is HAProxy's own spread.
func noise(direct, again, haproxy []float64) float64 {
	var off []float64
	for _, q := range ratios(again, direct) {
		off = append(off, math.Abs(q-1))
	}
	if len(off) == 0 {
		for _, q := range ratios(again, haproxy) {
			off = append(off, math.Abs(q))
		}
	}
	if len(off) > 0 {
		return quantile(off, 0.75)
	}
	if h := present(haproxy); len(h) > 1 {
		return math.Abs(spread(h) / median(h))
	}
	return math.NaN()
}

// verdict calls a difference only what is more than noise, and on the same side in all rounds but one of
// five.
func verdict(s, base []float64, ratio, noise float64, better string) string {
	all := ratios(s, base)
	above := 0
	for _, q := range all {
		if q > 1 {
			above++
		}
	}
	most := max(above, len(all)-above)
	if math.Abs(ratio-1) <= noise || most < len(all)-len(all)/5 {
		return "same"
	}
	if (ratio > 1) == (better == "higher") {
		return "better"
	}
	return "worse"
}

// round keeps four significant digits.
func round(v float64) float64 {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return v
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

// Write writes the run as JSON.
func (r *Run) Write(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// Read reads what Write wrote.
func Read(file string) (*Run, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &Run{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// columns are the systems of a topology, in their order.
func (r *Run) columns(topology string) []string {
	var names []string
	for _, res := range r.Results {
		if res.Topology == topology && !slices.Contains(names, res.System) {
			names = append(names, res.System)
		}
	}
	rank := func(n string) int {
		switch {
		case n == direct:
			return 0
		case n == "dnat":
			return 1
		case n == haproxy:
			return 2
		case strings.HasPrefix(n, "tailsplice/"), strings.HasPrefix(n, "baseline/"):
			return 4
		}
		return 3
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	return names
}

func (r *Run) topologies() []string {
	var names []string
	for _, res := range r.Results {
		if !slices.Contains(names, res.Topology) {
			names = append(names, res.Topology)
		}
	}
	return names
}

func (r *Run) find(topology, system, measure string) *Result {
	for i := range r.Results {
		if res := &r.Results[i]; res.Topology == topology && res.System == system && res.Measure == measure {
			return res
		}
	}
	return nil
}

// measures of a topology, in the order of the run.
func (r *Run) measures(topology string) []string {
	var names []string
	for _, res := range r.Results {
		if res.Topology == topology && !slices.Contains(names, res.Measure) {
			names = append(names, res.Measure)
		}
	}
	return names
}
