package front

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

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
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
	Kind    string  `json:"kind"`              // node, container, socket, local (this host) or host
	Name    string  `json:"name"`              // of the node, the container, the host
	Tried   bool    `json:"tried"`             // whether it was dialled
	Address string  `json:"address,omitempty"` // where it answered; "" for a socket
	Took    float64 `json:"took,omitempty"`    // seconds
	Error   string  `json:"error,omitempty"`   // why it can't be reached
	// What a hop behind it would be asked for: it differs from what came where
	// the route changes it.
	NextHost string `json:"next_host"`
	NextPath string `json:"next_path"`
}

// OK says whether some listener leads somewhere, and none to where nobody
// answers.
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

// Trace answers q by what is in force.
func (f *Front) Trace(ctx context.Context, q Question) (Trace, error) {
	f.mu.Lock()
	cfg := f.cfg
	services := map[string]*service{}
	for name, l := range f.listeners {
		services[name] = l.service.Load()
	}
	f.mu.Unlock()
	return f.trace(ctx, cfg, services, q)
}

// TraceConfig answers q by a configuration that is not in force, and uses it up.
// It binds nothing.
func TraceConfig(ctx context.Context, cfg *config.Config, q Question) (Trace, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f, services, err := compileAside(ctx, cfg)
	if err != nil {
		return Trace{}, err
	}
	f.prepareLabels(cfg, services)
	return f.trace(ctx, cfg, services, q)
}

// compileAside compiles a configuration that is not in force, and uses it up: of
// the Front only what looks and dials is there, until ctx ends. err is all that is
// wrong; a listener that can't be compiled has no service.
func compileAside(ctx context.Context, cfg *config.Config) (f *Front, services map[string]*service, err error) {
	log := slog.New(slog.DiscardHandler)
	f = &Front{log: log, opts: Options{Log: log}, labels: newLabelRoutes(nil), tailnet: tailnet.New("", log), containers: container.New("", log)}
	f.ctx, f.cancel = context.WithCancel(ctx)
	f.containers.FollowLabels(config.IsLabel, func() {})
	f.dialer = &dial.Dialer{Tailnet: f.tailnet, Container: f.containers}
	f.labelDialer = &dial.Dialer{Container: f.containers.Now()}
	services = map[string]*service{}
	var errs []error
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		// Which datapath moves the bytes is not the question, nor whether it is there.
		cfg.Datapath = userspace
		for j := range l.Routes {
			l.Routes[j].Datapath = userspace
		}
		if l.Default != nil {
			l.Default.Datapath = userspace
		}
		s, err := f.compile(cfg, l)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		services[l.Name] = s
	}
	return f, services, errors.Join(errs...)
}

func (f *Front) trace(ctx context.Context, cfg *config.Config, services map[string]*service, q Question) (Trace, error) {
	ctx, cancel := context.WithTimeout(ctx, traceTimeout)
	defer cancel()
	req := &http.Request{Method: cmp.Or(q.Method, http.MethodGet), Header: q.Header}
	t := Trace{Format: flow.FormatVersion, Node: cfg.Node, Host: q.Host, Path: vhost.RoutePath(q.Path), Method: req.Method}
	var tries sync.WaitGroup
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		s := services[l.Name]
		if s == nil || q.Listener != "" && q.Listener != l.Name {
			continue
		}
		lt := ListenerTrace{Listener: l.Name, Mode: l.Mode, Listen: l.Listen}
		r, why := s.find(req, t.Path, q)
		switch {
		case r == nil:
			lt.Outcome, lt.Reason = TraceNone, why
		case r.reject:
			lt.Outcome, lt.Route, lt.Source = TraceReject, r.name, r.source()
		default:
			lt.Outcome, lt.Route, lt.Source, lt.SendProxy, lt.Transparent = TraceForward, r.name, r.source(), r.sendProxy, r.transparent
			if len(l.Allow) > 0 {
				lt.Asks = append(lt.Asks, "allow "+strings.Join(l.Allow, ", "))
			}
			lt.Asks = append(lt.Asks, r.asks...)
			if r.http != nil && r.http.Redirect != nil {
				lt.Outcome, lt.Redirect = TraceRedirect, r.http.Redirect.To
			}
			lt.Targets = make([]TargetTrace, len(r.targets))
			for j, to := range r.targets {
				lt.Targets[j] = r.describe(to, q.Host, t.Path)
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

// find looks the route of a request up as its listener would; nil if there is
// none, and why.
func (s *service) find(req *http.Request, path string, q Question) (*rule, string) {
	switch s.mode {
	case "tcp":
		return s.fallback, ""
	case "sni":
		r, ok := s.names.Lookup(q.Host, func(r *rule) bool { return r.accepts(q.ALPN) })
		if !ok {
			return nil, "no route and no default matches this name: clients get the TLS alert unrecognized_name"
		}
		return r, ""
	}
	r, err := s.findRequest(req, q.Host, path, nil)
	var method *vhost.MethodError
	switch {
	case err == nil:
		return r, ""
	case errors.As(err, &method):
		return nil, fmt.Sprintf("%v: clients get 405", err)
	case errors.Is(err, vhost.ErrNoHost) && s.mode == "https":
		return nil, fmt.Sprintf("%v: clients get 421", err)
	}
	return nil, fmt.Sprintf("%v: clients get 404", err)
}

// describe says what a target is.
func (r *rule) describe(to config.Forward, host, path string) TargetTrace {
	t := TargetTrace{Target: to.To.String(), Weight: to.Weight, Name: to.To.Host, NextHost: host, NextPath: path}
	if r.http != nil {
		t.NextHost, t.NextPath = r.http.Rewritten(host, path)
	}
	switch to.To.Scheme {
	case dial.Tailnet:
		t.Kind = "node"
	case dial.Docker:
		t.Kind = "container"
		if r.container != "" { // by labels: its ids say nothing to people
			t.Name, t.Target = r.container, r.written
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
func (r *rule) try(ctx context.Context, to dial.Target, t *TargetTrace) {
	began := time.Now()
	t.Tried = true
	c, err := r.dialer.Dial(ctx, to, netip.Addr{})
	if err != nil {
		t.Error = err.Error()
		return
	}
	defer c.Close()
	t.Took = seconds(time.Since(began))
	if a := addrPort(c.RemoteAddr()); a.IsValid() {
		t.Address = a.String()
	}
}

// asks lists what a may ask of a client, for people.
func asks(a *config.Action) (all []string) {
	if len(a.Allow) > 0 {
		all = append(all, "allow "+strings.Join(a.Allow, ", "))
	}
	if a.BasicAuth != nil {
		all = append(all, "basic_auth")
	}
	if a.ForwardAuth != nil {
		all = append(all, "forward_auth "+a.ForwardAuth.Address)
	}
	if a.ClientCertificates != nil {
		all = append(all, "client_certificates")
	}
	return all
}
