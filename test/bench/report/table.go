package report

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// Table prints the run for people: for each measure the medians, and below them the ratios to HAProxy. ~
// marks what can't be told from noise.
func (r *Run) Table(w io.Writer) {
	m := r.Machine
	fmt.Fprintf(w, "\n%s run, %d rounds, %.0f s on %d CPUs (%s), Linux %s\n", r.Mode, r.Rounds, r.Seconds, m.CPUs, m.Model, m.Kernel)
	for _, t := range r.topologies() {
		systems := r.columns(t)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintf(tw, "\n%s\tunit\tnoise\t%s\t\n", strings.ToUpper(t), strings.Join(short(systems), "\t"))
		for _, measure := range r.measures(t) {
			if strings.HasPrefix(measure, "all_") {
				continue // only there to be subtracted from
			}
			cells := []string{measure, Unit(measure), ""}
			ratios := []string{"", "x haproxy", ""}
			toCaddy := []string{"", "x caddy", ""}
			for _, s := range systems {
				cell, quotient, third := "", "", ""
				if res := r.find(t, s, measure); res != nil {
					cell = number(res.Median)
					if res.RatioToHAProxy != nil {
						quotient = fmt.Sprintf("%.2f", *res.RatioToHAProxy)
						if res.VersusHAProxy == "same" {
							quotient = "~" + quotient
						}
					}
					if res.RatioToCaddy != nil {
						third = fmt.Sprintf("%.2f", *res.RatioToCaddy)
					}
					if res.Noise != nil {
						cells[2] = fmt.Sprintf("%.0f%%", math.Ceil(*res.Noise*100))
					}
				}
				cells, ratios, toCaddy = append(cells, cell), append(ratios, quotient), append(toCaddy, third)
			}
			fmt.Fprintf(tw, "%s\t\n%s\t\n", strings.Join(cells, "\t"), strings.Join(ratios, "\t"))
			if r.find(t, caddy, measure) != nil {
				fmt.Fprintf(tw, "%s\t\n", strings.Join(toCaddy, "\t"))
			}
		}
		tw.Flush()
	}
	fmt.Fprintf(w, "\nMedians of the rounds; below each its ratio to HAProxy, round by round. ~ is not told from noise, which is how much\n"+
		"direct differs from itself. More is better for MiB/s, 1/s and ratio, less for us, s/GiB, B and CPUs.\n")
	for _, list := range []struct {
		head  string
		lines []string
	}{{"note", r.Notes}, {"warning", r.Warnings}, {"left out", r.LeftOut}, {"FAILED", r.Failures}} {
		for _, l := range list.lines {
			fmt.Fprintf(w, "%s: %s\n", list.head, l)
		}
	}
}

func short(systems []string) []string {
	var s []string
	for _, n := range systems {
		s = append(s, strings.Replace(n, "tailsplice/", "ts/", 1))
	}
	return s
}

// number is v with three digits that matter, and thousands apart.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return ""
	case a >= 10000:
		s := fmt.Sprintf("%.0f", v)
		for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case a >= 100 || v == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}
