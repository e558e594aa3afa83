package front

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// Status is what `tailsplice status --json` prints.
type Status struct {
	Format    int                 `json:"format_version"` // flow.FormatVersion
	Version   string              `json:"version"`
	Node      string              `json:"node"`
	Config    string              `json:"config"`
	Started   time.Time           `json:"started"`
	Loaded    time.Time           `json:"loaded"` // when the present config came into force
	Flows     int                 `json:"flows"`
	Requests  int                 `json:"requests"` // of HTTP, under way
	Datapaths []DatapathStatus    `json:"datapaths"`
	Listeners []ListenerStatus    `json:"listeners"`
	Problems  []Problem           `json:"problems,omitempty"`       // what of the configuration does not work now
	Labels    []plan.LabelProblem `json:"label_problems,omitempty"` // labels of containers that make no route, and why
	Control   []string            `json:"control,omitempty"`        // addresses of metrics and health
	LogLost   int64               `json:"log_lost,omitempty"`       // lines that the daemon's log could not write

	Accepted       map[string]int64 `json:"accepted"`        // connections by listener
	Refused        map[string]int64 `json:"refused"`         // connections and requests by reason
	Ended          map[string]int64 `json:"ended"`           // flows by how they ended
	DialErrors     map[string]int64 `json:"dial_errors"`     // by reason
	Demoted        map[string]int64 `json:"demoted"`         // how often a datapath refused a flow or gave one back, by reason
	Bytes          map[string]int64 `json:"bytes"`           // that flows have moved until now: up, down
	NotTransparent map[string]int64 `json:"not_transparent"` // connections that could not carry the client's address, by reason
}

// DatapathStatus says whether a datapath can be used here.
type DatapathStatus struct {
	Name        string `json:"name"`
	Available   bool   `json:"available"`
	SwitchedOff bool   `json:"switched_off,omitempty"` // not available because it failed too often, until the daemon is started again
	Reason      string `json:"reason,omitempty"`       // why not
	Wanted      bool   `json:"wanted"`                 // by the configuration, by its name or by auto
	Flows       int    `json:"flows"`                  // that it has now
	Clamped     uint64 `json:"clamped_segments"`       // that it cut the payload off, to bound what a flow holds in the kernel
	Stalls      uint64 `json:"stalls"`                 // times a flow had come to rest with bytes to move, until it was found; should be 0
}

// ListenerStatus is one listener.
type ListenerStatus struct {
	Name         string         `json:"name"`
	Mode         string         `json:"mode"`
	Listen       []string       `json:"listen"` // as configured
	Bound        []string       `json:"bound"`  // as bound now
	WhileDown    string         `json:"while_down,omitempty"`
	Closed       string         `json:"closed,omitempty"` // why it is, by while_down
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
	Asks        []string `json:"asks,omitempty"`            // what a client must satisfy, besides what its listener asks
	Datapath    string   `json:"datapath,omitempty"`        // that a flow begins with now
	Wanted      string   `json:"datapath_wanted,omitempty"` // that the configuration asks for
	Why         string   `json:"datapath_reason,omitempty"` // why it is the one and not another
	Down        []string `json:"down,omitempty"`            // targets that the last try could not connect to, and why
	Source      string   `json:"source"`                    // "config", or "container NAME" where its labels made the route
	Container   string   `json:"container_state,omitempty"` // of that container: running, stopped or removed
	Ailing      []string `json:"ailing,omitempty"`          // containers that get connections only while no healthy one runs, as "NAME is unhealthy"
}

// Status describes the daemon as it is now.
func (f *Front) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := Status{Format: flow.FormatVersion, Version: f.opts.Version, Node: f.plan.Config.Node, Config: f.plan.Config.File, Started: f.started, Loaded: f.loaded,
		Flows: f.flows.Len(), Requests: f.requests.Total(),
		Accepted: metrics.Totals(f.metrics.Accepted, "listener"), Refused: metrics.Totals(f.metrics.Refused, "reason"),
		Ended: metrics.Totals(f.metrics.Ended, "end"), DialErrors: metrics.Totals(f.metrics.DialError, "reason"),
		Demoted: metrics.Totals(f.metrics.Demoted, "reason"), NotTransparent: metrics.Totals(f.metrics.NotTransparent, "reason")}
	s.Labels = f.plan.Labels.Problems
	if f.opts.LogLost != nil {
		s.LogLost = f.opts.LogLost()
	}
	s.Problems = f.problems()
	for _, addr := range f.opts.Control {
		if addr != "" {
			s.Control = append(s.Control, addr)
		}
	}
	traffic, flows := f.flows.Traffic()
	s.Bytes = map[string]int64{}
	for _, t := range traffic {
		if t.Route == "" {
			s.Bytes["up"] += t.Up
			s.Bytes["down"] += t.Down
		}
	}
	s.Datapaths = f.datapathStates()
	for i := range s.Datapaths {
		s.Datapaths[i].Flows = flows[s.Datapaths[i].Name]
	}
	for i := range f.plan.Config.Listeners {
		c := &f.plan.Config.Listeners[i]
		l := f.listeners[c.Name]
		svc := l.service.Load()
		ls := ListenerStatus{Name: c.Name, Mode: c.Mode, Listen: c.Listen, Bound: []string{}, Allow: c.Allow, WhileDown: c.WhileDown}
		for _, d := range c.Deny {
			ls.Deny = append(ls.Deny, cmp.Or(d.From, d.File))
		}
		if err := l.gate.closed(); err != nil {
			ls.Closed = err.Error()
		}
		if c.AcceptProxy != nil {
			ls.AcceptProxy = c.AcceptProxy.From
		}
		if l.certs != nil {
			ls.Certificates = l.certs.Certificates()
		}
		for _, src := range l.managed {
			ls.ACME = append(ls.ACME, src.Status()...)
		}
		for _, sock := range f.sockets {
			if sock.owner.Load() == l {
				ls.Bound = append(ls.Bound, sock.bound())
			}
		}
		slices.Sort(ls.Bound)
		for _, r := range svc.Rules {
			rs := RouteStatus{Match: r.Name, ALPN: r.ALPN, Reject: r.Reject, Forward: r.Written, SendProxy: r.SendProxy, Transparent: r.Transparent, Source: r.Source(), Allow: r.Allow.Strings(), Asks: restrictions(r), Wanted: r.Datapath}
			if r.Label != nil {
				rs.Container = r.Label.State
			}
			if !r.Reject {
				rs.Datapath, rs.Why = via(r, f.named(r.Datapath), s.Datapaths)
			}
			rs.Down = f.targets.down(r)
			for _, to := range r.All {
				if to.To.Scheme == dial.Docker {
					rs.Ailing = append(rs.Ailing, f.containers.Ailing(to.To.Host)...)
				}
			}
			ls.Routes = append(ls.Routes, rs)
		}
		s.Listeners = append(s.Listeners, ls)
	}
	return s
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
func (f *Front) Trace(ctx context.Context, q plan.Question) (plan.Trace, error) {
	f.mu.Lock()
	p := f.plan
	f.mu.Unlock()
	return p.Trace(ctx, q)
}
