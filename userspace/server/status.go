package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// Status is what `tailsplice status --json` prints.
type Status struct {
	Format   int       `json:"format_version"` // flow.FormatVersion
	Version  string    `json:"version"`
	Node     string    `json:"node"`
	Config   string    `json:"config"`
	Started  time.Time `json:"started"`
	Loaded   time.Time `json:"loaded"` // when the present config came into force
	Flows    int       `json:"flows"`
	Requests int       `json:"requests"` // of HTTP, under way
	// connections and requests that wait for a target, by hold
	Held      int              `json:"held"`
	Datapaths []DatapathStatus `json:"datapaths"`
	Listeners []ListenerStatus `json:"listeners"`
	// what of the configuration does not work now
	Problems []Problem `json:"problems,omitempty"`
	// labels of containers that make no route, and why
	Labels   []plan.LabelProblem `json:"label_problems,omitempty"`
	Control  []string            `json:"control,omitempty"`  // addresses of metrics and health
	Disabled []DisabledTarget    `json:"disabled,omitempty"` // targets that get no new connections
	// lines that the daemon's log could not write
	LogLost int64 `json:"log_lost,omitempty"`
	// nil: it is not measured here
	Memory *memory.Status `json:"memory_use,omitempty"`
	// processes that this one has taken over from, while they have flows
	Older []handover.Remains `json:"older,omitempty"`

	Accepted   map[string]int64 `json:"accepted"`    // connections by listener
	Refused    map[string]int64 `json:"refused"`     // connections and requests by reason
	Ended      map[string]int64 `json:"ended"`       // flows by how they ended
	DialErrors map[string]int64 `json:"dial_errors"` // by reason
	// how often a datapath refused a flow or gave one back, by reason
	Demoted map[string]int64 `json:"demoted"`
	Bytes   map[string]int64 `json:"bytes"` // that flows have moved until now: up, down
	// connections that could not carry the client's address, by reason
	NotTransparent map[string]int64 `json:"not_transparent"`
}

// DatapathStatus says whether a datapath can be used here.
type DatapathStatus struct {
	Name      string `json:"name"`
	Available bool   `json:"available"`
	// not available because it failed too often, until the daemon is started again
	SwitchedOff bool   `json:"switched_off,omitempty"`
	Reason      string `json:"reason,omitempty"` // why not
	Wanted      bool   `json:"wanted"`           // by the configuration, by its name or by auto
	Flows       int    `json:"flows"`            // that it has now
	// that it cut the payload off, to bound what a flow holds in the kernel
	Clamped uint64 `json:"clamped_segments"`
	// times a flow had come to rest with bytes to move, until it was found; should be 0
	Stalls uint64 `json:"stalls"`
}

// ListenerStatus is one listener.
type ListenerStatus struct {
	Name      string   `json:"name"`
	Mode      string   `json:"mode"`
	Listen    []string `json:"listen"` // as configured
	Bound     []string `json:"bound"`  // as bound now
	WhileDown string   `json:"while_down,omitempty"`
	Closed    string   `json:"closed,omitempty"` // why it is, by while_down
	// since when it is closed by `tailsplice drain`
	Drained time.Time `json:"drained,omitzero"`
	// up or down: whether others are told that it should get connections
	Announced    string         `json:"announced,omitempty"`
	NotAnnounced string         `json:"not_announced,omitempty"` // why it is down
	AcceptProxy  []string       `json:"accept_proxy,omitempty"`
	Allow        []string       `json:"allow,omitempty"`
	Deny         []string       `json:"deny,omitempty"` // ranges and files
	Certificates []tlsterm.Info `json:"certificates,omitempty"`
	ACME         []acme.Status  `json:"acme,omitempty"` // the names of certificates that come by ACME
	Routes       []RouteStatus  `json:"routes"`
}

// RouteStatus is one route, or the default.
type RouteStatus struct {
	Match       string   `json:"match"` // names and path, or "default"
	ALPN        []string `json:"alpn,omitempty"`
	Forward     string   `json:"forward,omitempty"`
	Reject      bool     `json:"reject,omitempty"`
	SendProxy   bool     `json:"send_proxy,omitempty"`
	Transparent bool     `json:"transparent,omitempty"`
	Allow       []string `json:"allow,omitempty"`
	// what a client must satisfy, besides what its listener asks
	Asks     []string `json:"asks,omitempty"`
	Datapath string   `json:"datapath,omitempty"`        // that a flow begins with now
	Wanted   string   `json:"datapath_wanted,omitempty"` // that the configuration asks for
	Why      string   `json:"datapath_reason,omitempty"` // why it is the one and not another
	// targets that the last try could not connect to, and why
	Down []string `json:"down,omitempty"`
	// "config", or "container NAME" where its labels made the route
	Source    string `json:"source"`
	Container string `json:"container_state,omitempty"` // of that container: running, stopped or removed
	// containers that get connections only while no healthy one runs, as "NAME is unhealthy"
	Ailing []string `json:"ailing,omitempty"`

	Targets []RouteTarget `json:"targets,omitempty"` // where it has several, or health checks
}

// RouteTarget is one of the targets of a route.
type RouteTarget struct {
	Target string `json:"target"`
	Weight int    `json:"weight"`
	Backup bool   `json:"backup"`
	// it could not be reached lately, so that others are tried before it
	Avoided     bool  `json:"avoided"`
	Offline     bool  `json:"offline,omitempty"` // the tailnet says so: others are tried before it
	Connections int64 `json:"connections"`       // that were made to it, by any route

	Health *TargetHealth `json:"health,omitempty"` // what checks have found of it
}

// Status describes the daemon as it is now.
func (srv *Server) Status() Status {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	s := Status{Format: flow.FormatVersion, Version: srv.opts.Version, Node: srv.plan.Config.Node, Config: srv.plan.Config.File, Started: srv.started, Loaded: srv.loaded,
		Flows: srv.flows.Len(), Requests: srv.requests.Total(), Held: srv.heldBy.Total(),
		Accepted: metrics.Totals(srv.metrics.Accepted, "listener"), Refused: metrics.Totals(srv.metrics.Refused, "reason"),
		Ended: metrics.Totals(srv.metrics.Ended, "end"), DialErrors: metrics.Totals(srv.metrics.DialError, "reason"),
		Demoted: metrics.Totals(srv.metrics.Demoted, "reason"), NotTransparent: metrics.Totals(srv.metrics.NotTransparent, "reason")}
	s.Labels = srv.plan.Labels.Problems
	if srv.opts.LogLost != nil {
		s.LogLost = srv.opts.LogLost()
	}
	s.Memory = srv.memory.Status()
	s.Problems, s.Disabled = srv.problems(), srv.disabledTargets()
	for _, addr := range srv.opts.Control {
		if addr != "" {
			s.Control = append(s.Control, addr)
		}
	}
	traffic, flows := srv.flows.Traffic()
	s.Bytes = map[string]int64{}
	for _, t := range traffic {
		if t.Route == "" {
			s.Bytes["up"] += t.Up
			s.Bytes["down"] += t.Down
		}
	}
	s.Datapaths = srv.datapathStates()
	tried, made := srv.targets.Last(), srv.targets.Counts()
	for i := range s.Datapaths {
		s.Datapaths[i].Flows = flows[s.Datapaths[i].Name]
	}
	for _, c := range srv.plan.Config.Listeners {
		ls := srv.listenerStatus(c)
		for _, r := range srv.listeners[c.Name].service.Load().Rules {
			rs := srv.routeStatus(r, s.Datapaths)
			rs.Down, rs.Targets = down(r, tried), routeTargets(r, made)
			ls.Routes = append(ls.Routes, rs)
		}
		s.Listeners = append(s.Listeners, ls)
	}
	return s
}

// listenerStatus describes a listener, without its routes.
//
// +checklocks:srv.mu
func (srv *Server) listenerStatus(c *config.Listener) ListenerStatus {
	l := srv.listeners[c.Name]
	s := ListenerStatus{Name: c.Name, Mode: c.Mode, Listen: c.Listen, Bound: srv.boundOf(l), Allow: c.Allow, WhileDown: c.WhileDown,
		Drained: l.drained}
	for _, d := range c.Deny {
		s.Deny = append(s.Deny, cmp.Or(d.From, d.File))
	}
	if err := l.gate.closed(); err != nil {
		s.Closed = err.Error()
	}
	if l.announcer != nil {
		s.Announced, s.NotAnnounced = l.announcer.Status()
	}
	if c.AcceptProxy != nil {
		s.AcceptProxy = c.AcceptProxy.From
	}
	if l.certs != nil {
		s.Certificates = l.certs.Certificates()
	}
	for _, src := range l.service.Load().Managed {
		s.ACME = append(s.ACME, src.Status()...)
	}
	return s
}

// routeStatus describes a route by its rule.
func (srv *Server) routeStatus(r *plan.Rule, datapaths []DatapathStatus) RouteStatus {
	s := RouteStatus{Match: r.Name, ALPN: r.ALPN, Reject: r.Reject, Forward: r.Written, SendProxy: r.SendProxy, Transparent: r.Transparent,
		Source: r.Source(), Allow: r.Allow.Strings(), Asks: restrictions(r), Wanted: r.Datapath}
	if r.Label != nil {
		s.Container = r.Label.State
	}
	if !r.Reject {
		s.Datapath, s.Why = via(r, srv.named(r.Datapath), datapaths)
	}
	for _, to := range r.All {
		if to.To.Scheme == dial.Docker {
			s.Ailing = append(s.Ailing, srv.containers.Ailing(to.To.Host)...)
		}
	}
	return s
}

// routeTargets describes the targets of r if there are several, or they are checked. made is how many
// connections were made to each.
func routeTargets(r *plan.Rule, made map[string]int64) (all []RouteTarget) {
	if r.Several == nil && r.Check == nil {
		return nil
	}
	for _, one := range targetRules(r) {
		all = append(all, RouteTarget{Target: one.Written, Weight: one.All[0].Weight, Backup: one.All[0].Backup,
			Avoided: one.Health != nil && one.Health.IsAvoided(), Offline: one.IsOffline(), Connections: made[one.Written],
			Health: healthOf(one)})
	}
	return all
}

// restrictions are what a client must satisfy for r, for people: who it is, and what it asks for.
func restrictions(r *plan.Rule) []string {
	all := slices.Clone(r.Asks)
	if r.HTTP == nil {
		return all
	}
	if len(r.HTTP.Match.Methods) > 0 {
		all = append(all, "methods "+strings.Join(r.HTTP.Match.Methods, ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(r.HTTP.Match.Headers)) {
		all = append(all, "header "+name)
	}
	if r.HTTP.Route != nil && r.HTTP.Route.MaxBody > 0 {
		all = append(all, fmt.Sprintf("max_body %d", r.HTTP.Route.MaxBody))
	}
	return all
}

// bound is the address, with the port that the kernel chose where the config says 0.
func (s *listenerSocket) bound() string {
	if strings.HasSuffix(s.written, ":0") {
		return s.addr.String()
	}
	return s.written
}

// Trace answers q by what is in force.
func (srv *Server) Trace(ctx context.Context, q plan.Question) (plan.Trace, error) {
	srv.mu.Lock()
	p := srv.plan
	srv.mu.Unlock()
	return p.Trace(ctx, q)
}

// down are the targets of r that the last try could not connect to, and why. tried is how the last tries
// went.
func down(r *plan.Rule, tried map[string]error) (out []string) {
	if err := tried[r.Written]; err != nil {
		out = append(out, err.Error())
	}
	for _, to := range r.All {
		if name := to.To.String(); name != r.Written && tried[name] != nil {
			out = append(out, tried[name].Error())
		}
	}
	return out
}
