package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"io"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// sampleRun has direct twice as fast as HAProxy, give or take noise, and ours at factor times HAProxy.
func sampleRun(factor, noise float64) *Run {
	r := New(true, 5)
	r.Versions[haproxy] = "HAProxy 1"
	for round, wobble := range []float64{1, 1 + noise, 1 - noise, 1 + noise/2, 1 - noise/2} {
		machine := 1 + 0.1*float64(round) // which gets faster, and that must not matter
		add := func(system, measure string, v float64) { r.Add("veth", system, measure, round, v) }
		add(direct, "bulk_down", 2000*machine)
		add(again, "bulk_down", 2000*machine*wobble)
		add(haproxy, "bulk_down", 1000*machine)
		add("tailsplice/userspace", "bulk_down", 1000*machine*factor)
		add(direct, "idle_bytes", 0)
		add(again, "idle_bytes", 100*(wobble-1))
		add(haproxy, "idle_bytes", 10000)
		add("tailsplice/userspace", "idle_bytes", 10000*factor)
		add(haproxy, "https_rate_c32", 2000*machine)
		add(caddy, "https_rate_c32", 1000*machine)
		add("tailsplice/userspace", "https_rate_c32", 1000*machine*factor)
		add(haproxy, "proxy_cpu_per_gib_up", wobble)
		add("tailsplice/userspace", "proxy_cpu_per_gib_up", factor)
	}
	r.Finish()
	return r
}

func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		name                   string
		factor, noise          float64
		bulk, idle, proportion string
	}{
		{"clearly more", 1.5, 0.02, "better", "worse", "worse"},
		{"clearly less", 0.7, 0.02, "worse", "better", "better"},
		{"less than noise", 1.05, 0.10, "same", "worse", "same"},
		{"equal", 1, 0.02, "same", "same", "same"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := sampleRun(c.factor, c.noise)
			for measure, want := range map[string]string{"bulk_down": c.bulk, "idle_bytes": c.idle, "proxy_cpu_per_gib_up": c.proportion} {
				res := r.find("veth", "tailsplice/userspace", measure)
				if res.VersusHAProxy != want {
					t.Errorf("%s: %q, want %q: ratio %v, noise %v", measure, res.VersusHAProxy, want, *res.RatioToHAProxy, *res.Noise)
				}
			}
			res := r.find("veth", "tailsplice/userspace", "bulk_down")
			if math.Abs(*res.RatioToHAProxy-c.factor) > 1e-9 || math.Abs(*res.RatioToDirect-c.factor/2) > 1e-9 {
				t.Errorf("ratios %v and %v: they have to be taken within a round", *res.RatioToHAProxy, *res.RatioToDirect)
			}
			if res.Median != round(1200*c.factor) || res.Unit != "MiB/s" || res.Spread != round(100*c.factor) {
				t.Errorf("median %v spread %v %s", res.Median, res.Spread, res.Unit)
			}
			if r.find("veth", again, "bulk_down") != nil {
				t.Error("direct again is among the results")
			}
			if r.find("veth", "tailsplice/userspace", "idle_bytes").RatioToDirect != nil {
				t.Error("a ratio to zero")
			}
		})
	}
}

// Rounds that disagree about the direction are no difference, whatever their median.
func TestRoundsMustAgree(t *testing.T) {
	base := []float64{1, 1, 1, 1, 1}
	if v := verdict([]float64{1.5, 1.5, 1.5, 0.5, 0.5}, base, 1.5, 0.1, "higher"); v != "same" {
		t.Error(v)
	}
	if v := verdict([]float64{1.5, 1.5, 1.5, 1.5, 0.5}, base, 1.5, 0.1, "higher"); v != "better" {
		t.Error(v)
	}
}

func TestUnits(t *testing.T) {
	for measure, want := range map[string]string{
		"bulk_up": "MiB/s higher", "loss1_down": "MiB/s higher", "cpu_per_gib_up": "s/GiB lower", "proxy_cpu_per_gib_down": "s/GiB lower",
		"https_rate_c32": "1/s higher", "https_p999_c256": "us lower", "idle_bytes_50k": "B lower", "proxy_idle_bytes_50k": "B lower",
		"rr_rate_c1": "1/s higher", "rr16k_p99_c256": "us lower", "new_flows": "1/s higher", "new_flows_p99": "us lower",
		"proxied_flows": "1/s higher", "proxied_flows_ratio": "ratio higher", "proxied_cpu_per_flow": "us lower",
		"first_byte_p50": "us lower", "idle_bytes": "B lower", "stopped_bytes": "B lower", "stopped_cpu": "CPUs lower",
		"stopped_target_bytes": "B lower", "stopped_target_cpu": "CPUs lower",
	} {
		if got := Unit(measure) + " " + better(measure); got != want {
			t.Errorf("%s: %s, want %s", measure, got, want)
		}
	}
}

func TestFile(t *testing.T) {
	r := sampleRun(1.5, 0.02)
	r.Add("veth", "nginx", "bulk_down", 2, 900) // all other rounds failed
	r.Fail("a flow was lost")
	r.Finish()
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := r.Write(file); err != nil {
		t.Fatal(err)
	}
	got, err := Read(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Results) != len(r.Results) || len(got.Failures) != 1 || got.Versions[haproxy] == "" || got.Machine.CPUs == 0 {
		t.Errorf("read %+v", got)
	}
	b, _ := json.Marshal(got.Results[0])
	for _, k := range []string{"system", "topology", "measure", "median", "spread", "unit", "ratio_to_haproxy", "ratio_to_direct"} {
		if !strings.Contains(string(b), `"`+k+`"`) {
			t.Errorf("no %s in %s", k, b)
		}
	}
	if n := len(got.find("veth", "nginx", "bulk_down").Samples); n != 1 {
		t.Errorf("%d samples of one round", n)
	}
}

// What terminates TLS is compared with Caddy too, in the JSON and in the table; other measures don't mention it.
func TestCaddy(t *testing.T) {
	r := sampleRun(1.5, 0.02)
	r.Remark("veth", "idle_bytes", "on 6 instances")
	r.Finish()
	ours := func(measure string) string {
		b, _ := json.Marshal(r.find("veth", "tailsplice/userspace", measure))
		return string(b)
	}
	if s := ours("https_rate_c32"); !strings.Contains(s, `"ratio_to_caddy":1.5`) || !strings.Contains(s, `"unit":"1/s"`) {
		t.Error(s)
	}
	if s := ours("idle_bytes"); strings.Contains(s, "caddy") || !strings.Contains(s, `"remark":"on 6 instances"`) {
		t.Error(s)
	}
	var b strings.Builder
	r.Table(&b)
	if strings.Count(b.String(), "x caddy") != 1 {
		t.Error(b.String())
	}
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name       string
		factor     float64
		worse      int
		differ, no string
	}{
		{"much slower", 1.0, 2, "-33.3% worse", "bulk_up"},
		{"as before", 1.5, 0, "7 compared", "worse "},
		{"within noise", 1.49, 0, "no different", " better"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			worse := sampleRun(c.factor, 0.02).Compare(&out, sampleRun(1.5, 0.02))
			if worse != c.worse || !strings.Contains(out.String(), c.differ) {
				t.Errorf("%d worse, want %d, and %q in:\n%s", worse, c.worse, c.differ, out.String())
			}
		})
	}
}

// texts are those of an SVG picture, with their classes and places; rects counts its bars.
func texts(t *testing.T, svg []byte) (all []svgText, rects int) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader(svg))
	var x *svgText
	for {
		tok, err := d.Token()
		if err == io.EOF {
			return all, rects
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e := tok.(type) {
		case xml.StartElement:
			x = nil
			switch e.Name.Local {
			case "rect":
				rects++
			case "text":
				x = &svgText{}
				for _, a := range e.Attr {
					switch a.Name.Local {
					case "class":
						x.class = a.Value
					case "x":
						x.x, _ = strconv.ParseFloat(a.Value, 64)
					case "y":
						x.y, _ = strconv.ParseFloat(a.Value, 64)
					}
				}
			}
		case xml.CharData:
			if x != nil {
				x.text = string(e)
				all = append(all, *x)
				x = nil
			}
		}
	}
}

type svgText struct {
	class, text string
	x, y        float64
}

// width is more than that of a text in most fonts of browsers.
func (x svgText) width() float64 {
	size := 12.0
	if x.class == "h" {
		size = 16
	}
	return 0.6 * size * float64(utf8.RuneCountInString(x.text))
}

func TestCharts(t *testing.T) {
	r := sampleRun(1.5, 0.02)
	for _, p := range panels { // so that each has a title
		for round := range r.Rounds {
			r.Add(p.topology, haproxy, p.measure, round, 10)
			r.Add(p.topology, "tailsplice/userspace", p.measure, round, 15)
		}
	}
	r.Machine.Model = `<&"`
	r.Finish()
	var chart, short bytes.Buffer
	r.Chart(&chart)
	r.ShortChart(&short)
	all, bars := texts(t, chart.Bytes())
	if bars != 3+2*len(panels) { // direct, and Caddy, once each
		t.Errorf("%d bars", bars)
	}
	for _, a := range all {
		for _, b := range all {
			if a.class == "t" && b.class == "t" && a.y == b.y && a.x < b.x && a.x+a.width() > b.x {
				t.Errorf("%q runs into %q", a.text, b.text)
			}
		}
		if a.x+a.width() > 900 && a.class != "n" {
			t.Errorf("%q leaves the picture", a.text)
		}
	}
	all, bars = texts(t, short.Bytes())
	for _, a := range all {
		if a.class == "h" && a.x+a.width() > 900 {
			t.Errorf("%q leaves the picture", a.text)
		}
	}
	if bars == 0 || all[0].text != r.Headline() && all[1].text != r.Headline() {
		t.Errorf("%d bars, %v", bars, all)
	}
}

// TestSameRatios: where the medians of two systems tell another story than the medians of their rounds' ratios, table,
// charts and docs all tell the latter.
func TestSameRatios(t *testing.T) {
	r := New(true, 5)
	for round, h := range []float64{1000, 1000, 2000, 2000, 2000} {
		r.Add("veth", haproxy, "rr_p99_c32", round, h)
		r.Add("veth", "tailsplice/auto", "rr_p99_c32", round, []float64{1140, 1140, 2280, 1000, 1000}[round])
	}
	r.Finish() // medians are 2000 and 1140, which is 0.57
	for name, show := range map[string]func(io.Writer){"table": r.Table, "chart": r.Chart, "short chart": r.ShortChart, "docs": r.Markdown} {
		var b strings.Builder
		show(&b)
		if !strings.Contains(b.String(), "1.14") || strings.Contains(b.String(), "0.57") {
			t.Errorf("%s:\n%s", name, b.String())
		}
	}
}

func TestTableMarksNoise(t *testing.T) {
	var b strings.Builder
	sampleRun(1.01, 0.05).Table(&b)
	if !strings.Contains(b.String(), "~1.01") || !strings.Contains(b.String(), "ts/userspace") {
		t.Error(b.String())
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 1.234: "1.23", 12.34: "12.3", 1234: "1234", 12345: "12,345", 1234567: "1,234,567", -1276000: "-1,276,000"} {
		if got := number(v); got != want {
			t.Errorf("%v: %s, want %s", v, got, want)
		}
	}
}
