package server

import (
	"maps"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// account is what requests of a route are counted in while they are under way.
func (srv *Server) account(l *listener) func(*vhost.Route) vhost.Traffic {
	return func(r *vhost.Route) vhost.Traffic {
		a := srv.flows.Account(l.name, r.Name)
		return vhost.Traffic{Requests: &a.Requests, Up: &a.Up, Down: &a.Down}
	}
}

// countRoutes has those routes counted by name that are in force now, and forgets the targets of others.
//
// +checklocks:srv.mu
func (srv *Server) countRoutes() {
	var routes []flow.Route
	var labelled []flow.Route
	targets := map[string]bool{}
	for _, c := range srv.plan.Config.Listeners {
		name := c.Name
		for _, r := range srv.listeners[name].service.Load().Rules {
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
	for _, gone := range srv.flows.Configured(append(routes, labelled...)) {
		srv.metrics.DropRoute(gone.Listener, gone.Route)
	}
	srv.targets.Keep(targets)
}

// countRequest counts a request that has ended.
func (srv *Server) countRequest(l *listener, r *vhost.Request) {
	route := noRoute
	if r.Route != nil {
		route = r.Route.Name
	}
	route = srv.flows.Account(l.name, route).Route
	srv.metrics.RouteRequests.WithLabelValues(l.name, route, metrics.Code(r.Status)).Inc()
	srv.metrics.RouteRequestTime.WithLabelValues(l.name, route).Observe(r.Duration.Seconds())
}

// state is what the metrics show of the server as it is now.
func (srv *Server) state() metrics.State {
	s := metrics.State{Flows: srv.flows.Len(), Requests: srv.requests.Total(), Held: srv.heldBy.Total(),
		Problems: map[string]int{}}
	traffic, flows := srv.flows.Traffic()
	for _, t := range traffic {
		s.Traffic = append(s.Traffic, metrics.Traffic(t))
	}
	s.Targets = srv.targetStates()
	if m := srv.memory.Status(); m != nil {
		s.Memory = []metrics.Memory{
			{Budget: memory.OfBudget, Used: m.Used, Total: m.Budget, Saving: m.Saving},
			{Budget: memory.OfTCP, Used: m.TCPUsed, Total: m.TCPBudget, Saving: m.TCPSaving}}
	}
	for target := range srv.disabled.Since() {
		s.Disabled = append(s.Disabled, target)
	}
	for _, part := range parts {
		s.Problems[part] = 0
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.plan == nil { // it begins
		return s
	}
	for _, p := range srv.problems() {
		s.Problems[p.Part]++
	}
	for _, d := range srv.datapathStates() {
		s.Datapaths = append(s.Datapaths, metrics.Datapath{Name: d.Name, On: d.Available, Wanted: d.Wanted,
			Flows: flows[d.Name], Stalls: d.Stalls, Clamped: d.Clamped})
	}
	for _, c := range srv.plan.Config.Listeners {
		l := srv.listeners[c.Name]
		s.Listeners = append(s.Listeners, metrics.Listener{Name: l.name, Drained: !l.drained.IsZero()})
		addCertificates(&s, l)
	}
	return s
}

// addCertificates adds what l shows.
func addCertificates(s *metrics.State, l *listener) {
	if l.certs != nil {
		ends := map[string]time.Time{} // of several with one name, the first that ends
		for _, c := range l.certs.Certificates() {
			if end, ok := ends[c.Source]; !c.NotAfter.IsZero() && (!ok || c.NotAfter.Before(end)) {
				ends[c.Source] = c.NotAfter
			}
		}
		for _, source := range slices.Sorted(maps.Keys(ends)) {
			s.Certificates = append(s.Certificates, metrics.Certificate{Listener: l.name, Name: source, NotAfter: ends[source]})
		}
	}
	seen := map[string]bool{}
	for _, src := range l.service.Load().Managed {
		for _, a := range src.Status() {
			if !seen[a.Name] {
				seen[a.Name] = true
				addACME(s, l.name, a)
			}
		}
	}
}

// madeUp reports whether a stranger may have made up the name: whoever asks for one below a wildcard that is
// on demand can, and only a certificate says that the DNS has it.
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
