package flow

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Query chooses flows. The zero value takes all.
type Query struct {
	Name, Route string       // parts of the server name or host, and of the route; case does not matter
	Client      netip.Prefix // the client's address is in it
	Text        string       // a part of name, client, route, target, listener, datapath or id
	Sort        string       // one of Sorts, for a Watcher; "" is the first
	Reverse     bool         // the order of Sort
	Limit       int          // of how many flows are told; 0 is all
}

// Sorts are the orders of a Watcher's flows.
var Sorts = []string{"rate", "bytes", "age", "name", "client", "route"}

// ParseClient reads what Query.Client is: an address, or a range of them.
func ParseClient(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("client %q: write an address, or a range such as 192.0.2.0/24", s)
	}
	return p.Masked(), nil
}

// Values is q as a query, ParseQuery reads it.
func (q Query) Values() url.Values {
	v := url.Values{}
	set := func(key, value string) {
		if value != "" {
			v.Set(key, value)
		}
	}
	set("name", q.Name)
	set("route", q.Route)
	set("text", q.Text)
	set("sort", q.Sort)
	if q.Client.IsValid() {
		set("client", q.Client.String())
	}
	if q.Reverse {
		set("reverse", "true")
	}
	if q.Limit > 0 {
		set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// ParseQuery reads a query that Values made.
func ParseQuery(v url.Values) (q Query, err error) {
	q = Query{Name: v.Get("name"), Route: v.Get("route"), Text: v.Get("text"), Sort: v.Get("sort"),
		Reverse: v.Get("reverse") == "true"}
	if c := v.Get("client"); c != "" {
		if q.Client, err = ParseClient(c); err != nil {
			return q, err
		}
	}
	if n := v.Get("limit"); n != "" {
		if q.Limit, err = strconv.Atoi(n); err != nil || q.Limit < 0 {
			return q, fmt.Errorf("limit %q: write a number", n)
		}
	}
	if q.Sort != "" && !slices.Contains(Sorts, q.Sort) {
		return q, fmt.Errorf("sort %q: write one of %s", q.Sort, strings.Join(Sorts, ", "))
	}
	return q, nil
}

func (q *Query) takes(f *Flow) bool {
	if q.Name != "" && !containsFold(f.Name, q.Name) || q.Route != "" && !containsFold(f.Route, q.Route) {
		return false
	}
	if q.Client.IsValid() {
		client, err := netip.ParseAddrPort(f.Client)
		if err != nil || !q.Client.Contains(client.Addr().Unmap().WithZone("")) {
			return false
		}
	}
	if q.Text == "" {
		return true
	}
	texts := [...]string{f.Name, f.Client, f.Route, f.Target, f.Listener, f.ID, f.datapath()}
	return slices.ContainsFunc(texts[:], func(s string) bool { return containsFold(s, q.Text) })
}

// containsFold says whether part is in s, whatever the case of ASCII letters. It allocates nothing.
func containsFold(s, part string) bool {
	for i := 0; i+len(part) <= len(s); i++ {
		if strings.EqualFold(s[i:i+len(part)], part) {
			return true
		}
	}
	return false
}

// Rate is a flow, and the bytes a second that it has moved since the last sample.
type Rate struct {
	Snapshot
	UpRate   float64 `json:"up_rate"`
	DownRate float64 `json:"down_rate"`
}

// Sample is what `tailsplice top --json` prints, one a line: rates are bytes a second.
type Sample struct {
	Format   int       `json:"format_version"`
	Time     time.Time `json:"time"`
	Live     int       `json:"live"`      // flows, whether the query takes them or not
	Matching int       `json:"matching"`  // flows that it takes
	UpRate   float64   `json:"up_rate"`   // of those
	DownRate float64   `json:"down_rate"` //
	Flows    []Rate    `json:"flows"`     // the first of them
}

// MinInterval is the least time between two samples of those who watch the flows of a daemon.
const MinInterval = 100 * time.Millisecond

// Watcher looks at a registry's flows again and again, and tells what has moved since the last time. It is
// for one goroutine. A sample takes no allocation for a flow that it doesn't tell of.
type Watcher struct {
	registry *Registry
	query    Query
	last     map[*Flow]counted
	samples  uint32
	at       time.Time
	order    []moving
}

type counted struct {
	up, down int64
	sample   uint32 // the last that saw the flow
}

type moving struct {
	f                *Flow
	up, down         int64
	upRate, downRate float64
}

// Watch makes a Watcher, and takes its first sample.
func (r *Registry) Watch(q Query) *Watcher {
	w := &Watcher{registry: r, query: q, last: map[*Flow]counted{}}
	w.Sample(time.Now())
	return w
}

// Sample says what has moved since the last one. What began since then counts from its beginning.
func (w *Watcher) Sample(now time.Time) Sample {
	live := w.registry.Live()
	l := Sample{Format: FormatVersion, Time: now, Live: len(live)}
	seconds := now.Sub(w.at).Seconds()
	w.at, w.samples, w.order = now, w.samples+1, w.order[:0]
	for _, f := range live {
		if !w.query.takes(f) {
			continue
		}
		up, down := f.bytes()
		before := w.last[f]
		w.last[f] = counted{up, down, w.samples}
		m := moving{f, up, down, float64(up-before.up) / seconds, float64(down-before.down) / seconds}
		l.UpRate, l.DownRate = l.UpRate+m.upRate, l.DownRate+m.downRate
		w.order = append(w.order, m)
	}
	for f, c := range w.last {
		if c.sample != w.samples {
			delete(w.last, f)
		}
	}
	l.Matching = len(w.order)
	slices.SortFunc(w.order, w.query.compare)
	shown := w.order
	if w.query.Limit > 0 {
		shown = shown[:min(len(shown), w.query.Limit)]
	}
	l.Flows = make([]Rate, 0, len(shown))
	for _, m := range shown {
		l.Flows = append(l.Flows, Rate{m.f.snapshot(m.up, m.down), m.upRate, m.downRate})
	}
	clear(w.order) // of flows that end before the next sample
	return l
}

// compare is the order of a sample: numbers from the greatest, ages from the youngest, texts from A.
func (q *Query) compare(a, b moving) int {
	var c int
	switch q.Sort {
	case "bytes":
		c = cmp.Compare(b.up+b.down, a.up+a.down)
	case "age":
		c = b.f.Started.Compare(a.f.Started)
	case "name":
		c = strings.Compare(a.f.Name, b.f.Name)
	case "client":
		c = strings.Compare(a.f.Client, b.f.Client)
	case "route":
		c = strings.Compare(a.f.Route, b.f.Route)
	default:
		c = cmp.Compare(b.upRate+b.downRate, a.upRate+a.downRate)
	}
	if q.Reverse {
		c = -c
	}
	return cmp.Or(c, a.f.Started.Compare(b.f.Started), strings.Compare(a.f.ID, b.f.ID))
}

// List lists the live flows that query takes, oldest first. It is one that [ParseQuery] reads.
func (r *Registry) List(query url.Values) ([]Snapshot, error) {
	q, err := ParseQuery(query)
	if err != nil {
		return nil, err
	}
	return r.Snapshot(q), nil
}

// firstLook is after how much time Top tells for the first time, at most: somebody has just pressed a key.
const firstLook = 250 * time.Millisecond

// Top sends what the live flows move each interval of query, which else is as for List, until
// ctx ends or send fails.
func (r *Registry) Top(ctx context.Context, query url.Values, send func(any) error) error {
	q, err := ParseQuery(query)
	if err != nil {
		return err
	}
	every, err := time.ParseDuration(query.Get("interval"))
	if err != nil || every < MinInterval {
		return fmt.Errorf("interval %q: %v at least", query.Get("interval"), MinInterval)
	}
	watcher := r.Watch(q)
	next := time.NewTimer(min(every, firstLook))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-next.C:
			if err := send(watcher.Sample(now)); err != nil {
				return err
			}
			next.Reset(every - time.Since(now))
		}
	}
}
