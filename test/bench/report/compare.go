package report

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"

	"golang.org/x/perf/benchmath"
)

// Compare prints what changed from old to r: differences that are more than both runs' noise, and that the
// rounds' values bear out (Mann-Whitney U test, p < 0.05). It returns how many got worse. Values are compared
// as their ratio to HAProxy where there is one, so that a faster or busier machine is no difference.
func (r *Run) Compare(w io.Writer, old *Run) (worse int) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "topology\tsystem\tmeasure\told\tnew\tchange\tp\t\n")
	same, compared := 0, 0
	for _, t := range r.topologies() {
		for _, m := range r.measures(t) {
			for _, s := range r.columns(t) {
				now, was := r.find(t, s, m), old.find(t, s, m)
				if now == nil || was == nil || s == haproxy {
					continue
				}
				a, b := relative(old, was), relative(r, now)
				if len(a) == 0 || len(b) == 0 {
					continue
				}
				compared++
				change := median(b)/median(a) - 1
				p := benchmath.AssumeNothing.Compare(benchmath.NewSample(a, &benchmath.DefaultThresholds),
					benchmath.NewSample(b, &benchmath.DefaultThresholds)).P
				floor := max(value0(now.Noise), value0(was.Noise))
				if math.IsNaN(change) || math.Abs(change) <= floor || p >= 0.05 {
					same++
					continue
				}
				word := "better"
				if (change > 0) != (now.Better == "higher") {
					word = "worse"
					worse++
				}
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s %s\t%s %s\t%+.1f%% %s\t%.3f\t\n", t, s, m,
					number(was.Median), was.Unit, number(now.Median), now.Unit, change*100, word, p)
			}
		}
	}
	tw.Flush()
	fmt.Fprintf(w, "%d compared by their ratios to HAProxy in the same round, %d no different beyond noise, %d worse\n", compared, same, worse)
	return worse
}

// relative is a result's rounds as ratios to HAProxy's, or as they are if HAProxy has no such measure.
func relative(r *Run, res *Result) []float64 {
	if base := r.find(res.Topology, haproxy, res.Measure); base != nil && len(base.Samples) == len(res.Samples) {
		return ratios(res.Samples, base.Samples)
	}
	return res.Samples
}

func value0(v *float64) float64 {
	if v == nil {
		return 0
	}
	return *v
}

// Benchstat prints the rounds in Go's benchmark format, for benchstat: `benchstat old.txt new.txt`,
// or `benchstat -col /system bench.txt` to see systems side by side.
func (r *Run) Benchstat(w io.Writer) {
	fmt.Fprintf(w, "goos: linux\ncpu: %s\n", r.Machine.Model)
	for _, res := range r.Results {
		for _, v := range res.Samples {
			fmt.Fprintf(w, "Benchmark%s%s/measure=%s/system=%s 1 %v %s\n", strings.ToUpper(res.Topology[:1]), res.Topology[1:],
				res.Measure, strings.ReplaceAll(res.System, "/", "-"), v, res.Unit)
		}
	}
}
