package plan

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// Question is what a trace is asked about.
type Question struct {
	Host     string
	Path     string      // "" is /
	Method   string      // "" is GET
	Header   http.Header // what routes with headers match
	ALPN     []string    // what a TLS client offers
	Listener string      // "" is all
	Dial     bool        // connect to the targets, and close again
}

// Values is the question as a query, ParseQuestion reads it.
func (q Question) Values() url.Values {
	v := url.Values{"host": {q.Host}, "path": {q.Path}, "method": {q.Method}, "listener": {q.Listener}, "alpn": q.ALPN}
	for name, values := range q.Header {
		for _, value := range values {
			v.Add("header", name+": "+value)
		}
	}
	if q.Dial {
		v.Set("dial", "true")
	}
	return v
}

// ParseQuestion reads a query that Values made.
func ParseQuestion(v url.Values) (Question, error) {
	q := Question{Host: v.Get("host"), Path: v.Get("path"), Method: v.Get("method"), Listener: v.Get("listener"), ALPN: v["alpn"],
		Header: http.Header{}, Dial: v.Get("dial") == "true"}
	if q.Host == "" {
		return q, errors.New("host is missing")
	}
	for _, h := range v["header"] {
		name, value, ok := strings.Cut(h, ":")
		if !ok || strings.TrimSpace(name) == "" {
			return q, fmt.Errorf("header %q: write NAME: VALUE", h)
		}
		q.Header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	return q, nil
}

// Trace says what this hop would do with a connection or a request.
type Trace struct {
	Format    int             `json:"format_version"` // flow.FormatVersion
	Node      string          `json:"node"`
	Host      string          `json:"host"`
	Path      string          `json:"path"`
	Method    string          `json:"method"`
	Listeners []ListenerTrace `json:"listeners"`
}

// The outcomes of a ListenerTrace.
const (
	TraceForward  = "forward"
	TraceRedirect = "redirect"
	TraceReject   = "reject"
	TraceNone     = "none" // nothing takes it
)

// ListenerTrace is what one listener would do.
type ListenerTrace struct {
	Listener    string        `json:"listener"`
	Mode        string        `json:"mode"`
	Listen      []string      `json:"listen"`
	Outcome     string        `json:"outcome"`
	Reason      string        `json:"reason,omitempty"` // of "none"
	Route       string        `json:"route,omitempty"`  // that takes it
	Source      string        `json:"source,omitempty"` // of the route: config, or a container's labels
	Redirect    string        `json:"redirect,omitempty"`
	Asks        []string      `json:"asks,omitempty"` // what a client must satisfy, besides
	SendProxy   bool          `json:"send_proxy,omitempty"`
	Transparent bool          `json:"transparent,omitempty"`
	Targets     []TargetTrace `json:"targets,omitempty"`
}

// TargetTrace is one target of a route.
type TargetTrace struct {
	Target  string  `json:"target"`
	Weight  int     `json:"weight"`
	Backup  bool    `json:"backup,omitempty"`
	Health  string  `json:"health,omitempty"`  // up or down, as health checks of the daemon have found
	Kind    string  `json:"kind"`              // node, container, socket, local (this host) or host
	Name    string  `json:"name"`              // of the node, the container, the host
	Tried   bool    `json:"tried"`             // whether it was dialled
	Address string  `json:"address,omitempty"` // where it answered; "" for a socket
	Took    float64 `json:"took,omitempty"`    // seconds
	Error   string  `json:"error,omitempty"`   // why it can't be reached
	// What a hop behind it would be asked for: it differs from what came where the route changes it.
	NextHost string `json:"next_host"`
	NextPath string `json:"next_path"`
}

// OK says whether some listener leads somewhere, and none to where nobody answers.
func (t Trace) OK() bool {
	leads := false
	for _, l := range t.Listeners {
		switch l.Outcome {
		case TraceForward:
			if !slices.ContainsFunc(l.Targets, func(t TargetTrace) bool { return t.Error == "" }) {
				return false
			}
			leads = true
		case TraceRedirect:
			leads = true
		}
	}
	return leads
}

// traceTimeout bounds a trace: all targets are tried at once.
const traceTimeout = 8 * time.Second

// TraceConfig answers q by a configuration that is not in force. It binds nothing.
func TraceConfig(ctx context.Context, cfg *config.Config, q Question) (Trace, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	deps := NewDeps(slog.New(slog.DiscardHandler))
	deps.Containers.FollowLabels(config.IsLabel, func() {})
	p, err := Compile(cfg, deps)
	if err != nil {
		return Trace{}, err
	}
	return p.WithLabels(nil, p.ListLabelled(ctx)).Trace(ctx, q)
}

// Trace answers q.
func (p *Plan) Trace(ctx context.Context, q Question) (Trace, error) {
	ctx, cancel := context.WithTimeout(ctx, traceTimeout)
	defer cancel()
	req := &http.Request{Method: cmp.Or(q.Method, http.MethodGet), Header: q.Header}
	t := Trace{Format: flow.FormatVersion, Node: p.Config.Node, Host: q.Host, Path: vhost.RoutePath(q.Path), Method: req.Method}
	var tries sync.WaitGroup
	for _, l := range p.Config.Listeners {
		s := p.Services[l.Name]
		if s == nil || q.Listener != "" && q.Listener != l.Name {
			continue
		}
		lt := ListenerTrace{Listener: l.Name, Mode: l.Mode, Listen: l.Listen}
		r, why := s.find(req, t.Path, q)
		switch {
		case r == nil:
			lt.Outcome, lt.Reason = TraceNone, why
		case r.Reject:
			lt.Outcome, lt.Route, lt.Source = TraceReject, r.Name, r.Source()
		default:
			lt.Outcome, lt.Route, lt.Source, lt.SendProxy, lt.Transparent = TraceForward, r.Name, r.Source(), r.SendProxy, r.Transparent
			if len(l.Allow) > 0 {
				lt.Asks = append(lt.Asks, "allow "+strings.Join(l.Allow, ", "))
			}
			lt.Asks = append(lt.Asks, r.Asks...)
			if r.HTTP != nil && r.HTTP.Route.Redirect != nil {
				lt.Outcome, lt.Redirect = TraceRedirect, r.HTTP.Route.Redirect.To
			}
			lt.Targets = make([]TargetTrace, len(r.All))
			for j, to := range r.All {
				lt.Targets[j] = r.describe(to, q.Host, t.Path)
				lt.Targets[j].Health = r.healthOf(j)
				if q.Dial {
					tries.Go(func() { r.try(ctx, dial.Target(to.To), &lt.Targets[j]) })
				}
			}
		}
		t.Listeners = append(t.Listeners, lt)
	}
	tries.Wait()
	if len(t.Listeners) == 0 {
		return t, fmt.Errorf("there is no listener %q: `tailsplice status` lists them", q.Listener)
	}
	return t, nil
}

// find looks the route of a request up as its listener would; nil if there is none, and why.
func (s *Service) find(req *http.Request, path string, q Question) (*Rule, string) {
	switch s.Mode {
	case "tcp":
		return s.Fallback, ""
	case "sni":
		r := s.byHello(&sni.Hello{ServerName: q.Host, ALPN: q.ALPN})
		if r == nil {
			return nil, "no route and no default matches this name: clients get the TLS alert unrecognized_name"
		}
		return r, ""
	}
	r, _, err := s.ByRequest(req, q.Host, path)
	switch _, isMethod := errors.AsType[*vhost.MethodError](err); {
	case err == nil:
		return r, ""
	case isMethod:
		return nil, fmt.Sprintf("%v: clients get 405", err)
	case errors.Is(err, vhost.ErrNoHost) && s.Mode == "https":
		return nil, fmt.Sprintf("%v: clients get 421", err)
	}
	return nil, fmt.Sprintf("%v: clients get 404", err)
}

// healthOf says what the daemon's checks have found of r's target i; "" where there are none, or were none
// yet.
func (r *Rule) healthOf(i int) string {
	one := r
	if r.Several != nil {
		one = r.Several[i]
	}
	switch {
	case one.Check == nil, one.Check.Status().Since.IsZero():
		return ""
	case one.Check.IsDown():
		return "down"
	}
	return "up"
}

// describe says what a target is.
func (r *Rule) describe(to *config.Forward, host, path string) TargetTrace {
	t := TargetTrace{Target: to.To.String(), Weight: to.Weight, Backup: to.Backup, Name: to.To.Host, NextHost: host, NextPath: path}
	if r.HTTP != nil {
		t.NextHost, t.NextPath = r.HTTP.Route.Rewritten(host, path)
	}
	switch to.To.Scheme {
	case dial.Tailnet:
		t.Kind = "node"
	case dial.Docker:
		t.Kind = "container"
		if r.Label != nil { // by labels: its ids say nothing to people
			t.Name, t.Target = r.Label.Container, r.Written
		}
	case dial.Unix:
		t.Kind, t.Name = "socket", to.To.Path
	default:
		t.Kind = "host"
		if a, err := netip.ParseAddr(to.To.Host); err == nil && a.IsLoopback() || to.To.Host == "localhost" {
			t.Kind = "local"
		}
	}
	return t
}

// try connects to a target, and closes the connection.
func (r *Rule) try(ctx context.Context, to dial.Target, t *TargetTrace) {
	began := time.Now()
	t.Tried = true
	c, err := r.Dialer.Dial(ctx, to, netip.Addr{})
	if err != nil {
		t.Error = err.Error()
		return
	}
	defer c.Close()
	t.Took = float64(time.Since(began).Round(time.Microsecond)) / float64(time.Second)
	if a := tcpsock.AddrPortOf(c.RemoteAddr()); a.IsValid() {
		t.Address = a.String()
	}
}
