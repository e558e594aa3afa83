package report

import (
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// panels are what the chart shows, where measured.
var panels = []struct{ topology, measure, title string }{
	{"veth", "bulk_down", "Bulk, 4 flows (MiB/s, more is better)"},
	{"veth", "cpu_per_gib_down", "CPU of the whole machine (s/GiB, less is better)"},
	{"veth", "rr_rate_c32", "Requests of 200 B on 32 flows (1/s, more is better)"},
	{"veth", "rr_p99_c32", "… their p99 (µs, less is better)"},
	{"veth", "new_flows", "New flows with a full ClientHello (1/s, more is better)"},
	{"veth", "idle_bytes", "Memory of an idle flow (bytes, less is better)"},
	{"veth", "https_rate_c32", "Terminating TLS, 1 KiB requests on 32 connections (1/s, more is better)"},
	{"tailnet", "bulk_down", "Bulk over a real tailnet (MiB/s, more is better)"},
	{"tailnet", "rr_rate_c32", "Requests over a real tailnet (1/s, more is better)"},
}

// Chart draws the run as an SVG picture: a panel for each of the main measures, a bar for each system, a whisker for the
// spread. It reads well on light and on dark pages.
func (r *Run) Chart(w io.Writer) {
	const (
		width, column, gap = 880, 425, 30
		head, bar, label   = 26, 19, 132
	)
	var body strings.Builder
	x, y, row := 0, 46, 0
	for _, p := range panels {
		var results []*Result
		most := 0.0
		for _, s := range r.columns(p.topology) {
			if res := r.find(p.topology, s, p.measure); res != nil && (s != direct || res.Median != 0) {
				results = append(results, res)
				most = math.Max(most, res.Median+res.Spread)
			}
		}
		if len(results) == 0 || most <= 0 {
			continue
		}
		fmt.Fprintf(&body, `<text class="t" x="%d" y="%d">%s</text>`+"\n", x, y+14, html.EscapeString(p.title))
		for i, res := range results {
			top := y + head + i*bar
			scale := func(v float64) float64 { return math.Max(0, v) / most * (column - label - 62) }
			class := "o"
			if strings.HasPrefix(res.System, "tailsplice/") {
				class = "u"
			} else if res.System == direct || res.System == "dnat" {
				class = "l"
			}
			end := label + scale(res.Median)
			fmt.Fprintf(&body, `<text class="n" x="%d" y="%d">%s</text><rect class="%s" x="%d" y="%d" width="%.1f" height="13" rx="2"/>`,
				x+label-6, top+11, html.EscapeString(res.System), class, x+label, top, math.Max(1, end-label))
			fmt.Fprintf(&body, `<path class="w" d="M%.1f %dH%.1f"/><text class="v" x="%.1f" y="%d">%s</text>`+"\n",
				float64(x+label)+scale(res.Median-res.Spread), top+6, float64(x+label)+scale(res.Median+res.Spread),
				float64(x+label)+scale(res.Median+res.Spread)+5, top+11, number(res.Median))
		}
		row = max(row, head+len(results)*bar+20)
		if x == 0 {
			x = column + gap
		} else {
			x, y, row = 0, y+row, 0
		}
	}
	height := y + row
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">
<title>tailsplice compared, by make bench</title>
<style>
text{font:12px system-ui,sans-serif;fill:#24292f}.t{font-weight:600}.n{text-anchor:end}.v,.s{fill:#57606a}
.o{fill:#8c959f}.l{fill:#d0d7de}.u{fill:#1f883d}.w{stroke:#24292f;stroke-opacity:.55;fill:none}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.v,.s{fill:#9198a1}.o{fill:#6e7681}.l{fill:#3d444d}.u{fill:#2ea043}.w{stroke:#e6edf3}}
</style>
<text class="s" x="0" y="16">%d CPUs, %s, Linux %s, %s; medians of %d rounds, whiskers: half of the rounds</text>
%s</svg>
`, width, height, width, height, r.Machine.CPUs, html.EscapeString(r.Machine.Model), html.EscapeString(r.Machine.Kernel),
		r.Started.Format("2006-01-02"), r.Rounds, body.String())
}
