package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What people load into Grafana and Prometheus.
const (
	dashboardFile = "../../deploy/grafana/tailsplice.json"
	rulesFile     = "../../deploy/prometheus/tailsplice.rules.yaml"
	rulesTestFile = "../../deploy/prometheus/tailsplice.test.yaml"
)

// labelsOf are the labels of each metric that the daemon may show.
func labelsOf(t *testing.T) map[string][]string {
	t.Helper()
	s := New("v1", func() State { return State{} })
	s.WatchLog(func() int64 { return 0 })
	out := map[string][]string{}
	for _, d := range describe(s.registry) {
		// Scraping and histograms add three.
		out[d.name] = append([]string{"instance", "job", "le"}, d.labels...)
	}
	if len(out) < 30 {
		t.Fatalf("only %d metrics: %v", len(out), out)
	}
	return out
}

var (
	metricIn   = regexp.MustCompile(`\b((?:tailsplice|process|go)_[a-z0-9_]+)(?:\{([^}]*)\})?`)
	matcherIn  = regexp.MustCompile(`(\w+)\s*(?:=~|!~|!=|=)\s*"`)
	groupingIn = regexp.MustCompile(`\b(?:by|on|without|ignoring) \(([^)]*)\)`)
	legendIn   = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?(\w+)`)
)

// checkExpression says of an expression, and of the text that shows its labels, what no metric has.
func checkExpression(metrics map[string][]string, expr, text string) (wrong []string) {
	var any []string
	for _, m := range metricIn.FindAllStringSubmatch(expr, -1) {
		name := m[1]
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			if metrics[name] == nil {
				name = strings.TrimSuffix(m[1], suffix)
			}
		}
		labels := metrics[name]
		if labels == nil {
			wrong = append(wrong, "there is no metric "+m[1])
			continue
		}
		any = append(any, labels...)
		for _, l := range matcherIn.FindAllStringSubmatch(m[2], -1) {
			if !slices.Contains(labels, l[1]) {
				wrong = append(wrong, fmt.Sprintf("%s has no label %s", m[1], l[1]))
			}
		}
	}
	for _, g := range groupingIn.FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); !slices.Contains(any, l) {
				wrong = append(wrong, "no metric of it has a label "+l)
			}
		}
	}
	by := regexp.MustCompile(`^\s*(?:topk\(\d+, )?(?:-|histogram_quantile\([\d.]+, )?(?:sum|min|max|count) by \(([^)]*)\)`).FindStringSubmatch(expr)
	for _, l := range legendIn.FindAllStringSubmatch(text, -1) {
		if by != nil && !strings.Contains(by[1], l[1]) || !slices.Contains(any, l[1]) && l[1] != "value" && strings.Contains(expr, "_") && any != nil {
			wrong = append(wrong, "what is shown has no label "+l[1])
		}
	}
	return wrong
}

func TestCheckExpression(t *testing.T) {
	metrics := map[string][]string{"tailsplice_a_total": {"instance", "listener"}, "tailsplice_b_seconds": {"instance", "le"}}
	for _, c := range []struct {
		expr, text string
		wrong      bool
	}{
		{`sum by (listener) (rate(tailsplice_a_total{instance=~"x"}[5m]))`, "{{listener}}", false},
		{`histogram_quantile(0.5, sum by (le) (rate(tailsplice_b_seconds_bucket[5m])))`, "p50", false},
		{`rate(tailsplice_c_total[5m])`, "", true},
		{`tailsplice_a_total{route="x"}`, "", true},
		{`sum by (route) (tailsplice_a_total)`, "", true},
		{`sum by (instance) (tailsplice_a_total)`, "{{listener}}", true},
		{`tailsplice_a_total`, "{{ $labels.route }}", true},
	} {
		if wrong := checkExpression(metrics, c.expr, c.text); (wrong != nil) != c.wrong {
			t.Errorf("%s, %s: %q", c.expr, c.text, wrong)
		}
	}
}

// dashboard is what is checked of a dashboard of Grafana.
type dashboard struct {
	Title, UID    string
	SchemaVersion int
	Templating    struct {
		List []struct{ Name, Type, Definition string }
	}
	Panels []struct {
		ID      int
		Type    string
		Title   string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ RefID, Expr, LegendFormat string }
	}
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDashboard checks each metric and label that the dashboard names, and that its panels are where they can be seen.
func TestDashboard(t *testing.T) {
	metrics := labelsOf(t)
	d := readDashboard(t)
	variables := []string{"$__rate_interval"}
	for _, v := range d.Templating.List {
		variables = append(variables, "$"+v.Name)
		for _, wrong := range checkExpression(metrics, v.Definition, "") {
			t.Errorf("variable %s: %s", v.Name, wrong)
		}
	}
	shown := map[string]bool{}
	ids, cells := map[int]string{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if other, taken := ids[p.ID]; taken {
			t.Errorf("%s and %s have one id", p.Title, other)
		}
		ids[p.ID] = p.Title
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken || x > 23 {
					t.Fatalf("%s lies on %s, or beside the screen", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			for _, wrong := range checkExpression(metrics, target.Expr, target.LegendFormat) {
				t.Errorf("%s: %s: %s", p.Title, wrong, target.Expr)
			}
			for _, v := range regexp.MustCompile(`\$\w+`).FindAllString(target.Expr, -1) {
				if !slices.Contains(variables, v) {
					t.Errorf("%s: there is no variable %s", p.Title, v)
				}
			}
			for _, m := range metricIn.FindAllStringSubmatch(target.Expr, -1) {
				shown[m[1]], shown[strings.TrimSuffix(m[1], "_bucket")] = true, true
			}
		}
	}
	if d.Title != "tailsplice" || d.UID == "" || d.SchemaVersion < 36 || len(shown) < 25 {
		t.Errorf("title %q, uid %q, version %d, %d metrics", d.Title, d.UID, d.SchemaVersion, len(shown))
	}
	leftOut := []string{"tailsplice_build_info", "tailsplice_not_transparent_total", "tailsplice_health_checks_total"} // which are for tables of one's own
	for name := range metrics {
		if strings.HasPrefix(name, "tailsplice_") && !shown[name] && !slices.Contains(leftOut, name) {
			t.Errorf("no panel shows %s: add one to %s, or leave it out here", name, filepath.Base(dashboardFile))
		}
	}
}

// promtool runs Prometheus' own tool. Debian's package prometheus has it, which scripts/provision installs.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("needs promtool: install Debian's package prometheus")
	}
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestRules runs the alerts' unit tests, and checks that each alert has one and that its metrics are ours.
func TestRules(t *testing.T) {
	metrics := labelsOf(t)
	rules, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(rulesTestFile)
	if err != nil {
		t.Fatal(err)
	}
	alerts := strings.Split(string(rules), "- alert: ")[1:]
	for _, a := range alerts {
		name, body, _ := strings.Cut(a, "\n")
		if !strings.Contains(string(tests), "alertname: "+name+"\n") || !strings.Contains(string(tests), "alertname: "+name+",") {
			t.Errorf("%s: no test sees it fire, or be silent", name)
		}
		_, expr, _ := strings.Cut(body, "expr: ")
		expr, text, _ := strings.Cut(expr, "labels: ")
		if strings.HasPrefix(expr, "up{") {
			continue
		}
		for _, wrong := range checkExpression(metrics, strings.TrimPrefix(expr, "|\n"), text) {
			t.Errorf("%s: %s", name, wrong)
		}
	}
	if len(alerts) < 10 {
		t.Errorf("%d alerts", len(alerts))
	}
	promtool(t, "check", "rules", rulesFile)
	promtool(t, "test", "rules", rulesTestFile)
}

// TestDashboardExpressions has Prometheus read what the dashboard asks it.
func TestDashboardExpressions(t *testing.T) {
	var rules strings.Builder
	rules.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	fill := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$listener", ".*", "$route", ".*", "$job", ".*")
	for _, p := range readDashboard(t).Panels {
		for _, target := range p.Targets {
			expr, _ := json.Marshal(fill.Replace(target.Expr))
			fmt.Fprintf(&rules, "      - { record: \"panel:%d:%s\", expr: %s }\n", p.ID, strings.ToLower(target.RefID), expr)
		}
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
