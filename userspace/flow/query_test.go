package flow

import (
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestQuery(t *testing.T) {
	r := NewRegistry()
	t0 := time.Now()
	for i, f := range []*Flow{
		{ID: "1", Name: "a.example.org", Client: "192.0.2.1:5", Route: "*.example.org", Target: "home:443", Listener: "web"},
		{ID: "2", Name: "b.example.org", Client: "[2001:db8::1]:6", Route: "*.example.org", Target: "home:443", Listener: "web"},
		{ID: "3", Name: "c.test", Client: "192.0.2.77:7", Route: "default", Target: "laptop:80", Listener: "raw", Datapath: func() string { return "sockmap" }},
		{ID: "4", Client: "@", Route: "default"},
	} {
		f.Started = t0.Add(time.Duration(i) * time.Second)
		r.Add(f)
	}
	for query, want := range map[string]string{
		"":                           "1 2 3 4",
		"limit=2":                    "1 2",
		"name=EXAMPLE":               "1 2",
		"name=example&route=default": "",
		"route=default":              "3 4",
		"client=192.0.2.1":           "1",
		"client=192.0.2.0/24":        "1 3",
		"client=2001:db8::/32":       "2",
		"client=::ffff:192.0.2.1":    "1",
		"text=SOCKMAP":               "3",
		"text=laptop":                "3",
		"text=b.exam":                "2",
		"text=raw":                   "3",
		"text=nothing":               "",
	} {
		v, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		q, err := ParseQuery(v)
		if err != nil {
			t.Errorf("%s: %v", query, err)
		}
		again, err := ParseQuery(q.Values())
		if err != nil || again != q {
			t.Errorf("%s: %+v is read back as %+v, %v", query, q, again, err)
		}
		var ids []string
		for _, s := range r.Snapshot(q) {
			ids = append(ids, s.ID)
		}
		if got := strings.Join(ids, " "); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	for query, want := range map[string]string{"client=x": "write an address", "client=1.2.3.4/33": "write an address", "limit=-1": "write a number", "sort=size": "rate, bytes"} {
		v, _ := url.ParseQuery(query)
		if _, err := ParseQuery(v); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", query, err)
		}
	}
}

func TestWatcher(t *testing.T) {
	r := NewRegistry()
	t0 := time.Now()
	add := func(id string, up int64) (*Flow, *atomic.Int64) {
		moved := new(atomic.Int64)
		moved.Store(up)
		f := &Flow{ID: id, Name: id, Started: t0, Bytes: func() (int64, int64) { return moved.Load(), 0 }}
		r.Add(f)
		return f, moved
	}
	_, slow := add("slow", 100)
	_, fast := add("fast", 10)
	over, _ := add("over", 1)
	w := r.Watch(Query{})
	at := w.at
	slow.Add(10)
	fast.Add(40)
	r.Remove(over)
	add("new", 1000)
	sample := func(w *Watcher, seconds int) (Sample, string) {
		l := w.Sample(at.Add(time.Duration(seconds) * time.Second))
		var ids []string
		for _, f := range l.Flows {
			ids = append(ids, fmt.Sprintf("%s %v", f.ID, f.UpRate))
		}
		return l, strings.Join(ids, ", ")
	}
	l, got := sample(w, 2)
	if got != "new 500, fast 20, slow 5" || l.Live != 3 || l.Matching != 3 || l.UpRate != 525 {
		t.Errorf("%s: %+v", got, l)
	}
	if l, got = sample(w, 3); got != "fast 0, new 0, slow 0" || len(w.last) != 3 {
		t.Errorf("at rest: %s, %d remembered", got, len(w.last))
	}
	for _, c := range []struct {
		q    Query
		want string
	}{
		{Query{Sort: "name", Limit: 2}, "fast 0, new 0"},
		{Query{Sort: "name", Reverse: true, Limit: 1}, "slow 0"},
		{Query{Sort: "bytes", Limit: 1}, "new 0"},
		{Query{Text: "slow"}, "slow 0"},
	} {
		w := r.Watch(c.q)
		l := w.Sample(w.at.Add(time.Second))
		var ids []string
		for _, f := range l.Flows {
			ids = append(ids, fmt.Sprintf("%s %v", f.ID, f.UpRate))
		}
		if got := strings.Join(ids, ", "); got != c.want || l.Live != 3 {
			t.Errorf("%+v: %s", c.q, got)
		}
	}
}

// crowd is a registry with n flows, whose bytes count how often they are asked for.
func crowd(n int) (r *Registry, asked *atomic.Int64) {
	r, asked = NewRegistry(), new(atomic.Int64)
	a := r.Account("web", "*.example.org")
	for i := range n {
		r.Add(&Flow{ID: NewID(), Name: fmt.Sprintf("n%d.example.org", i), Client: fmt.Sprintf("10.%d.%d.%d:4711", i>>16, i>>8&255, i&255),
			Listener: "web", Route: "*.example.org", Target: "tailnet://home:443", Started: time.Now(), Account: a,
			Datapath: func() string { return "userspace" },
			Bytes:    func() (int64, int64) { asked.Add(1); return int64(i), int64(i) }})
	}
	return r, asked
}

// TestManyFlows: who watches many flows, or counts them for the metrics, asks each once and allocates for those that
// are shown.
func TestManyFlows(t *testing.T) {
	const flows, runs = 20_000, 5
	r, asked := crowd(flows)
	w := r.Watch(Query{Limit: 100, Text: "example"})
	for what, f := range map[string]func(){
		"sample":  func() { w.Sample(time.Now()) },
		"traffic": func() { r.Traffic() },
	} {
		f()
		asked.Store(0)
		if n := testing.AllocsPerRun(runs, f); n > 50 {
			t.Errorf("%s: %v allocations", what, n)
		}
		if n := asked.Load(); n != flows*(runs+1) { // and one to warm up
			t.Errorf("%s: %d times bytes were asked for, want once a flow and time", what, n)
		}
	}
}

func BenchmarkSample(b *testing.B) {
	r, _ := crowd(20_000)
	w := r.Watch(Query{Limit: 100})
	for b.Loop() {
		w.Sample(time.Now())
	}
}

func BenchmarkTraffic(b *testing.B) {
	r, _ := crowd(10_000)
	for b.Loop() {
		r.Traffic()
	}
}

func BenchmarkCopy(b *testing.B) {
	r, _ := crowd(10_000)
	for b.Loop() {
		r.Live()
	}
}
