package metrics

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

const page = "../../docs/reference/metrics.md"

// watches call the methods of a Set that add metrics later.
var watches = map[string]func(*Set){
	"WatchLog": func(s *Set) { s.WatchLog(func() int64 { return 0 }) },
}

// one has one of each thing that a scrape shows.
var one = State{
	Traffic:   []Traffic{{Listener: "web"}, {Listener: "web", Route: "default"}},
	Listeners: []Listener{{Name: "web"}}, Disabled: []string{"127.0.0.1:80"},
	Datapaths: []Datapath{{}}, Targets: []Target{{}}, Certificates: []Certificate{{}}, ACME: []ACME{{}},
	Problems: map[string]int{"address": 0}, Memory: []Memory{{Budget: "memory"}},
}

// row is how the page writes a metric, but for the last column.
type row struct{ kind, labels string }

// TestReferenceHasEachMetric compares the registry with docs/reference/metrics.md.
func TestReferenceHasEachMetric(t *testing.T) {
	s := New("v1", func() State { return one })
	typ := reflect.TypeOf(s)
	for i := range typ.NumMethod() {
		if name := typ.Method(i).Name; strings.HasPrefix(name, "Watch") {
			if watches[name] == nil {
				t.Errorf("Set.%s adds metrics: add a call of it to watches in this test, so that they are compared with %s",
					name, filepath.Base(page))
				continue
			}
			watches[name](s)
		}
	}
	kinds := map[string]string{}
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		kinds[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	// Those with labels have no value yet, and show in no family.
	for f := range reflect.ValueOf(s).Elem().NumField() {
		field := reflect.ValueOf(s).Elem().Field(f)
		if !field.CanInterface() {
			continue
		}
		if c, ok := field.Interface().(prometheus.Collector); ok {
			for _, d := range describe(c) {
				kind := strings.TrimSuffix(strings.TrimPrefix(field.Type().String(), "*prometheus."), "Vec")
				kinds[d.name] = strings.ToLower(strings.TrimPrefix(kind, "prometheus."))
			}
		}
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]row{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(tailsplice_\\w+)` \\| (\\w+) \\| (.*?) ?\\| (.+) \\| (.+) \\|$").
		FindAllStringSubmatch(string(text), -1) {
		have[m[1]] = row{m[2], m[3]}
	}
	for _, d := range describe(s.registry) {
		name := d.name
		if !strings.HasPrefix(name, "tailsplice_") {
			continue // of Go and of the process
		}
		var labels []string
		for _, l := range d.labels {
			labels = append(labels, "`"+l+"`")
		}
		want := row{kinds[name], strings.Join(labels, ", ")}
		got, ok := have[name]
		if want.kind == "" {
			want.kind = got.kind // of a collector of another type, that has no value
		}
		switch {
		case !ok:
			t.Errorf("%s is not in %s: add a row there, with its meaning for an operator and the most series it can have:\n"+
				"| `%s` | %s | %s | %s | ? |", name, page, name, want.kind, want.labels, d.help)
		case got != want:
			t.Errorf("%s: %s says %q, and it is %q", name, page, got, want)
		}
		delete(have, name)
	}
	for name := range have {
		t.Errorf("%s has %s, and the daemon has no such metric: remove the row", page, name)
	}
}

// described is how prometheus describes a metric.
type described struct {
	name, help string
	labels     []string
}

var descText = regexp.MustCompile(`^Desc\{fqName: "([^"]+)", help: "((?:[^"\\]|\\.)*)", unit: "[^"]*", ` +
	`constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// describe lists what a collector describes, in the order of names and each once.
func describe(c prometheus.Collector) (all []described) {
	ch := make(chan *prometheus.Desc)
	go func() { c.Describe(ch); close(ch) }()
	for desc := range ch {
		m := descText.FindStringSubmatch(desc.String())
		if m == nil {
			panic(fmt.Sprintf("prometheus describes a metric in a new way: %s", desc))
		}
		d := described{name: m[1], help: m[2]}
		for l := range strings.SplitSeq(m[3]+","+m[4], ",") {
			if l, _, _ := strings.Cut(l, "="); l != "" {
				d.labels = append(d.labels, l)
			}
		}
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b described) int { return strings.Compare(a.name, b.name) })
	return slices.CompactFunc(all, func(a, b described) bool { return a.name == b.name })
}
