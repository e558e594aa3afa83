package front

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// noRoute is the metrics' word for requests that no route takes.
const noRoute = "none"

// account is what requests of a route are counted in while they are under way.
func (f *Front) account(l *listener) func(*vhost.Route) vhost.Traffic {
	return func(r *vhost.Route) vhost.Traffic {
		a := f.flows.Account(l.name, r.Name)
		return vhost.Traffic{Requests: &a.Requests, Up: &a.Up, Down: &a.Down}
	}
}

// countRoutes has those routes counted by name that are in force now, and forgets the targets of others.
//
// f.mu is held.
func (f *Front) countRoutes() {
	var routes []flow.Route
	var labelled []flow.Route
	targets := map[string]bool{}
	for i := range f.plan.Config.Listeners {
		name := f.plan.Config.Listeners[i].Name
		for _, r := range f.listeners[name].service.Load().Rules {
			if r.Label == nil {
				routes = append(routes, flow.Route{Listener: name, Route: r.Name})
			} else {
				labelled = append(labelled, flow.Route{Listener: name, Route: r.Name})
			}
			targets[r.Written] = true
			for _, to := range r.All {
				targets[to.To.String()] = true
			}
		}
	}
	for _, gone := range f.flows.Configured(append(routes, labelled...)) {
		f.metrics.DropRoute(gone.Listener, gone.Route)
	}
	f.targets.keep(targets)
}

// countRequest counts a request that has ended.
func (f *Front) countRequest(l *listener, r *vhost.Request) {
	route := noRoute
	if r.Route != nil {
		route = r.Route.Name
	}
	route = f.flows.Account(l.name, route).Route
	f.metrics.RouteRequests.WithLabelValues(l.name, route, metrics.Code(r.Status)).Inc()
	f.metrics.RouteRequestTime.WithLabelValues(l.name, route).Observe(r.Duration.Seconds())
}

// targets remembers how the last try to connect to each target went.
type targets struct {
	mu   sync.Mutex
	last map[string]error
}

// tried notes how a try to connect to target went.
func (t *targets) tried(target string, err error) {
	var de *dial.Error
	if errors.As(err, &de) && (de.Reason == dial.Canceled || de.Reason == dial.Exhausted) {
		return // which says nothing about the target
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.last[target]; !known && len(t.last) >= metrics.MostNames {
		return
	}
	if t.last == nil {
		t.last = map[string]error{}
	}
	t.last[target] = err
}

func (t *targets) keep(named map[string]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.last, func(target string, _ error) bool { return !named[target] })
}

// states are how the targets were at the last try, by name.
func (t *targets) states() (out []metrics.Target) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for target, err := range t.last {
		out = append(out, metrics.Target{Name: target, Up: err == nil})
	}
	slices.SortFunc(out, func(a, b metrics.Target) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// down are the targets of r that the last try could not connect to, and why.
func (t *targets) down(r *plan.Rule) (out []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.last[r.Written]; err != nil {
		out = append(out, err.Error())
	}
	for _, to := range r.All {
		if name := to.To.String(); name != r.Written && t.last[name] != nil {
			out = append(out, t.last[name].Error())
		}
	}
	return out
}

// state is what the metrics show of f as it is now.
func (f *Front) state() metrics.State {
	s := metrics.State{Flows: f.flows.Len(), Requests: f.requests.Total(), Targets: f.targets.states(),
		Problems: map[string]int{}}
	traffic, flows := f.flows.Traffic()
	for _, t := range traffic {
		s.Traffic = append(s.Traffic, metrics.Traffic(t))
	}
	for _, part := range parts {
		s.Problems[part] = 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.plan == nil { // it begins
		return s
	}
	for _, p := range f.problems() {
		s.Problems[p.Part]++
	}
	for _, d := range f.datapathStates() {
		s.Datapaths = append(s.Datapaths, metrics.Datapath{Name: d.Name, On: d.Available, Wanted: d.Wanted,
			Flows: flows[d.Name], Stalls: d.Stalls, Clamped: d.Clamped})
	}
	for i := range f.plan.Config.Listeners {
		name := f.plan.Config.Listeners[i].Name
		l := f.listeners[name]
		if l.certs != nil {
			ends := map[string]time.Time{} // of several with one name, the first that ends
			for _, c := range l.certs.Certificates() {
				if end, ok := ends[c.Source]; !c.NotAfter.IsZero() && (!ok || c.NotAfter.Before(end)) {
					ends[c.Source] = c.NotAfter
				}
			}
			for _, source := range slices.Sorted(maps.Keys(ends)) {
				s.Certificates = append(s.Certificates, metrics.Certificate{Listener: name, Name: source, NotAfter: ends[source]})
			}
		}
		seen := map[string]bool{}
		for _, src := range l.managed {
			for _, a := range src.Status() {
				if !seen[a.Name] {
					seen[a.Name] = true
					addACME(&s, name, a)
				}
			}
		}
	}
	return s
}

// madeUp reports whether a stranger may have made up the name: whoever asks for one below a wildcard that is on demand
// can, and only a certificate says that the DNS has it.
func madeUp(a acme.Status) bool { return a.OnDemand && a.NotAfter.IsZero() }

// addACME adds what is known of a name.
func addACME(s *metrics.State, listener string, a acme.Status) {
	has := !a.NotAfter.IsZero()
	if has {
		s.Certificates = append(s.Certificates, metrics.Certificate{Listener: listener, Name: a.Name, NotAfter: a.NotAfter})
	}
	if has || a.Problem != "" && !madeUp(a) {
		s.ACME = append(s.ACME, metrics.ACME{Listener: listener, Name: a.Name, OK: a.Problem == ""})
	}
}

// Clamper is a datapath that bounds what a flow holds in the kernel by cutting the payload off segments, whose senders
// send it again.
type Clamper interface {
	// ClampedSegments is how many it has cut off since its start.
	ClampedSegments() uint64
}

// datapathStates are the datapaths that a configuration may name, by name.
//
// f.mu is held.
func (f *Front) datapathStates() []DatapathStatus {
	words := f.plan.Needs.Datapaths
	wanted := func(name string) bool { return words[name] || name == autoKernel && words[plan.Auto] }
	all := []DatapathStatus{{Name: userspace, Available: true, Wanted: true}}
	there := map[string]bool{}
	for _, d := range f.datapaths() {
		there[d.Name()] = true
		s := DatapathStatus{Name: d.Name(), Available: true, Wanted: wanted(d.Name())}
		if h, ok := d.(datapath.Health); ok {
			s.Reason, s.Stalls = h.Health()
			s.Available = s.Reason == ""
			s.SwitchedOff = !s.Available && !waits(d)
		}
		if c, ok := d.(Clamper); ok {
			s.Clamped = c.ClampedSegments()
		}
		all = append(all, s)
	}
	for name, why := range f.missing {
		if !there[name] {
			all = append(all, DatapathStatus{Name: name, Reason: why, Wanted: wanted(name)})
		}
	}
	slices.SortFunc(all, func(a, b DatapathStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// autoKernel is the datapath of the kernel that plan.Auto may choose.
const autoKernel = "sockmap"
