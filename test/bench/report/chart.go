package report

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
)

// panels are what the chart shows, where measured.
var panels = []struct{ topology, measure, title string }{
	{"veth", "bulk_down", "Bulk download, 4 flows"},
	{"veth", "cpu_per_gib_down", "CPU of the whole machine for it"},
	{"veth", "rr_rate_c32", "Requests of 200 B, 32 flows"},
	{"veth", "rr_p99_c32", "Their p99 latency"},
	{"veth", "new_flows", "New flows with a full ClientHello"},
	{"veth", "idle_bytes", "Memory of an idle flow"},
	{"veth", "https_rate_c32", "Requests of 1 KiB, TLS terminated"},
	{"tailnet", "bulk_down", "Bulk download over a real tailnet"},
	{"tailnet", "rr_rate_c32", "Requests over a real tailnet"},
}

// headlines are the measures of the short chart and of the table for the docs, and how a sentence names the
// main ones.
var headlines = []struct{ topology, measure, title, short string }{
	{"veth", "bulk_down", "Bulk download, 4 flows", "throughput"},
	{"veth", "bulk_up", "Bulk upload, 4 flows", ""},
	{"veth", "cpu_per_gib_down", "CPU of the machine per GiB down", "CPU"},
	{"veth", "cpu_per_gib_up", "CPU of the machine per GiB up", ""},
	{"veth", "rr_rate_c32", "Requests a second, 32 connections", "requests"},
	{"veth", "rr_p99_c32", "Their p99 latency", ""},
	{"veth", "rr_rate_c4", "Requests a second, 4 connections", ""},
	{"veth", "rr_p50_c1", "Round trip of one connection, p50", ""},
	{"tailnet", "rr_p50_c1", "The same over a real tailnet", ""},
	{"veth", "new_flows", "New flows a second", "new flows"},
	{"veth", "first_byte_p50", "First byte of a new flow, p50", ""},
	{"veth", "idle_bytes", "Memory of an idle flow", ""},
	{"veth", "stopped_bytes", "Memory of a flow whose client reads nothing", ""},
	{"veth", "stopped_target_bytes", "Memory of a flow whose target reads nothing", ""},
	{"veth", "https_rate_c32", "TLS terminated, requests a second", ""},
}

// ours is the system of the short chart and its sentence: what runs by default. TLS is terminated in
// userspace only.
func (r *Run) ours(topology, measure string) *Result {
	if res := r.find(topology, "tailsplice/auto", measure); res != nil {
		return res
	}
	return r.find(topology, "tailsplice/userspace", measure)
}

// style is for charts on light and on dark pages.
const style = `<style>
text{font:12px system-ui,sans-serif;fill:#24292f}.h{font-size:16px;font-weight:600}.t{font-weight:600}.n{text-anchor:end}.v,.s{fill:#57606a}
.o{fill:#8c959f}.l{fill:#d0d7de}.u,.better{fill:#1f883d}.worse{fill:#cf222e}.same{fill:#8c959f}.w,.one{stroke:#24292f;fill:none}.w{stroke-opacity:.55}.one{stroke-dasharray:2 2;stroke-opacity:.4}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.v,.s{fill:#9198a1}.o,.same{fill:#6e7681}.l{fill:#3d444d}.u,.better{fill:#2ea043}.worse{fill:#f85149}.w,.one{stroke:#e6edf3}}
</style>
`

// about is where and how the run was made.
func (r *Run) about() string {
	return fmt.Sprintf("%d CPUs, %s, Linux %s, %s run of %s, medians of %d rounds", r.Machine.CPUs, r.Machine.Model, r.Machine.Kernel,
		r.Mode, r.Started.Format("2006-01-02"), r.Rounds)
}

// Chart draws the run as an SVG picture: a panel for each of the main measures, a bar for each system. Bars
// are the table's ratios to HAProxy, medians of the rounds' ratios, and whiskers are their quartiles; beside
// each stands the median of the measure itself.
func (r *Run) Chart(w io.Writer) {
	const (
		width, column, gap = 900, 435, 30
		head, bar, label   = 42, 19, 132
	)
	var body strings.Builder
	x, y, row := 0, 30, 0
	for _, p := range panels {
		var results []*Result
		most := 1.0
		for _, s := range r.columns(p.topology) {
			if res := r.find(p.topology, s, p.measure); res != nil && res.RatioToHAProxy != nil {
				results = append(results, res)
				_, high := r.quartiles(res)
				most = math.Max(most, math.Max(high, *res.RatioToHAProxy))
			}
		}
		if len(results) == 0 {
			continue
		}
		most = math.Min(most, 4) // what is far worse than all others would make them look alike
		better := "more is better"
		if results[0].Better == "lower" {
			better = "less is better"
		}
		fmt.Fprintf(&body, `<text class="t" x="%d" y="%d">%s</text><text class="s" x="%d" y="%d">as a multiple of HAProxy, %s; then in %s</text>`+"\n",
			x, y+14, html.EscapeString(p.title), x, y+30, better, results[0].Unit)
		scale := func(ratio float64) float64 {
			return float64(x+label) + math.Min(ratio, most)/most*(column-label-110)
		}
		for i, res := range results {
			top := y + head + i*bar
			class := "o"
			if strings.HasPrefix(res.System, "tailsplice/") {
				class = "u"
			} else if res.System == direct || res.System == "dnat" {
				class = "l"
			}
			low, high := r.quartiles(res)
			fmt.Fprintf(&body, `<text class="n" x="%d" y="%d">%s</text><rect class="%s" x="%d" y="%d" width="%.1f" height="13" rx="2"/>`,
				x+label-6, top+11, html.EscapeString(res.System), class, x+label, top, math.Max(1, scale(*res.RatioToHAProxy)-float64(x+label)))
			fmt.Fprintf(&body, `<path class="w" d="M%.1f %dH%.1f"/><text class="v" x="%.1f" y="%d">%s · %s</text>`+"\n",
				scale(low), top+6, scale(high), scale(math.Max(high, *res.RatioToHAProxy))+5, top+11, ratioText(res), number(res.Median))
		}
		fmt.Fprintf(&body, `<path class="one" d="M%.1f %dV%d"/>`+"\n", scale(1), y+head-3, y+head+len(results)*bar-3)
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
%s<text class="s" x="0" y="16">%s</text>
%s</svg>
`, width, height, width, height, style, html.EscapeString(r.about()), body.String())
}

// ShortChart draws how tailsplice compares with HAProxy, as an SVG picture with a sentence for a headline.
// Bars to the right are better, to the left worse, on a scale where twice and half are as long.
func (r *Run) ShortChart(w io.Writer) {
	const width, label, middle, bar, octave = 900, 250, 470, 24, 150
	var body strings.Builder
	y := 62
	for _, m := range headlines {
		res := r.ours(m.topology, m.measure)
		if res == nil || res.RatioToHAProxy == nil || *res.RatioToHAProxy <= 0 {
			continue
		}
		gain := math.Log2(*res.RatioToHAProxy) * octave
		if res.Better == "lower" {
			gain = -gain
		}
		gain = math.Max(-octave*1.4, math.Min(octave*1.4, gain))
		left, right := middle+math.Min(gain, 0), middle+math.Max(gain, 0)
		fmt.Fprintf(&body, `<text class="n" x="%d" y="%d">%s</text><rect class="%s" x="%.1f" y="%d" width="%.1f" height="16" rx="2"/>`,
			label, y+13, html.EscapeString(m.title), res.VersusHAProxy, left, y, math.Max(1, right-left))
		fmt.Fprintf(&body, `<text class="v" x="%d" y="%d">%s × HAProxy's%s</text>`+"\n", middle+octave*14/10+12, y+13, ratioText(res),
			map[bool]string{true: ", within noise"}[res.VersusHAProxy == "same"])
		y += bar
	}
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">
<title>%s</title>
%s<text class="h" x="0" y="20">%[5]s</text>
<text class="s" x="%[7]d" y="50" text-anchor="end">worse than HAProxy ◂</text><text class="s" x="%[8]d" y="50">▸ better</text>
%[9]s<path class="one" d="M%[10]d 56V%[11]d"/>
<text class="s" x="0" y="%[12]d">%[13]s</text>
</svg>
`, width, y+30, width, y+30, html.EscapeString(r.Headline()), style, middle-8, middle+8, body.String(), middle, y, y+20, html.EscapeString(r.about()))
}

// Headline says in a sentence what the short chart shows.
func (r *Run) Headline() string {
	var parts []string
	for _, m := range headlines {
		if res := r.ours(m.topology, m.measure); m.short != "" && res != nil && res.RatioToHAProxy != nil {
			whose := "its"
			if len(parts) == 0 {
				whose = "HAProxy's"
			}
			parts = append(parts, ratioText(res)+" × "+whose+" "+m.short)
		}
	}
	if len(parts) == 0 {
		return "tailsplice beside HAProxy"
	}
	return strings.Join(parts, ", ")
}

// ratioText is a ratio to HAProxy; ~ marks what is within noise.
func ratioText(res *Result) string {
	s := fmt.Sprintf("%.2f", *res.RatioToHAProxy)
	if res.VersusHAProxy == "same" {
		s = "~" + s
	}
	return s
}

// quartiles are those of the rounds' ratios to HAProxy.
func (r *Run) quartiles(res *Result) (low, high float64) {
	base := r.find(res.Topology, haproxy, res.Measure)
	if base == nil || len(base.Samples) != len(res.Samples) {
		// a round of one of them failed: which, the samples don't say
		return *res.RatioToHAProxy, *res.RatioToHAProxy
	}
	all := ratios(res.Samples, base.Samples)
	return quantile(all, 0.25), quantile(all, 0.75)
}

type column struct{ system, title string }

// Markdown writes the ratios to HAProxy of the main measures as a table for the docs.
func (r *Run) Markdown(w io.Writer) {
	all := []column{{direct, "direct"}, {"haproxy-splice", "HAProxy, forced to splice"}, {"nginx", "nginx"}, {caddy, "Caddy"},
		{"tailsplice/auto", "**tailsplice**"}, {"tailsplice/userspace", "`userspace`"}, {"tailsplice/sockmap", "`sockmap`"}}
	columns := slices.DeleteFunc(all, func(c column) bool {
		return !slices.ContainsFunc(r.Results, func(res Result) bool { return res.System == c.system })
	})
	fmt.Fprint(w, "| as a multiple of HAProxy ")
	for _, c := range columns {
		fmt.Fprint(w, "| ", c.title, " ")
	}
	fmt.Fprintln(w, "|\n|---"+strings.Repeat("|---", len(columns))+"|")
	for _, m := range headlines {
		if r.find(m.topology, haproxy, m.measure) == nil {
			continue
		}
		fmt.Fprint(w, "| ", m.title, " ")
		for _, c := range columns {
			cell := ""
			if res := r.find(m.topology, c.system, m.measure); res != nil && res.RatioToHAProxy != nil && *res.RatioToHAProxy > 0 {
				cell = ratioText(res) + " "
			}
			fmt.Fprint(w, "| ", cell)
		}
		fmt.Fprintln(w, "|")
	}
	fmt.Fprintf(w, "\n%s. ~ is within that run's noise.\n", r.about())
}
