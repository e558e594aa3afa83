package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/route"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// listener is a configured listener while the daemon lives. What it does is
// its service, which a reload swaps; what it is (name and mode) stays.
type listener struct {
	name, mode string
	service    atomic.Pointer[service]
	http       *httpServer    // http and https only
	certs      *tlsterm.Store // https only
	managed    []*acme.Source // likewise: those of certs that come by ACME

	gate *gate // with while_down: close only; guarded by Front.mu, and so is shut
	shut bool  // its sockets are to be closed; without while_down: close it says nothing
}

// retire ends what l does beside its flows, which go on; requests do until ctx ends.
//
// Front.mu is held.
func (l *listener) retire(ctx context.Context) {
	if l.http != nil {
		go l.http.shutdown(ctx)
	}
	l.gate.stop()
}

// service is one listener's configuration, ready to be used. It is immutable:
// a flow that has begun with one keeps it.
type service struct {
	mode     string
	limits   config.Limits
	trust    *plan.Peers         // nil: a PROXY header is data
	header   bool                // there must be one
	allow    *plan.Peers         // nil: everybody
	deny     *denials            // nil: nobody
	names    *route.Table[*rule] // sni and http(s): by name, then default
	fallback *rule               // tcp: the only way
	rules    []*rule             // in the config's order, for status
	base     *service            // with docker enabled: the same without the labels' routes
	edges    []*listener         // https only: this daemon's sni listeners, by which connections may have come

	hsts        string         // https only
	timing      bool           // http(s) only
	clientCerts bool           // some route wants a client's certificate
	accessLog   *accesslog.Log // http(s) only; nil: none
}

// rule is one route, or the default.
type rule struct {
	name        string // how people find it in the config: "*.vsq.cz", "notes.vsq.cz/api/", "default"
	patterns    []string
	alpn        []string
	match       vhost.Match // http(s) only
	reject      bool
	target      dial.Target
	literal     netip.AddrPort   // the target where it needs no lookup
	written     string           // the target as the config has it
	targets     []config.Forward // all of them, with their weights
	sendProxy   bool
	transparent bool             // see transparent.go
	allow       *plan.Peers      // nil: everybody
	asks        []string         // what else a request must satisfy, for people
	hold        time.Duration    // how long a request waits for a node
	datapaths   []relay.Datapath // to be tried before userspace, best first
	auto        bool             // flows that talk are offered: see Front.Offer
	wanted      string           // the config's word for all that; "" where requests are served

	http *vhost.Route // http(s) only

	dialer           *dial.Dialer
	container, state string          // by labels only: of which container, and whether it is running, stopped or removed
	current          context.Context // likewise: ends when the containers have changed
}

// source says where the rule comes from.
func (r *rule) source() string {
	if r.container != "" {
		return "container " + r.container
	}
	return "config"
}

// via names the datapath that a flow of this rule begins with now, and says why it is not another one.
func (r *rule) via(all []DatapathStatus) (name, why string) {
	kernel := DatapathStatus{}
	for _, d := range all {
		if d.Name == autoKernel {
			kernel = d
		}
	}
	switch {
	case r.http != nil:
		return userspace, "HTTP is served by this process, which has to see the bytes"
	case r.auto && kernel.Available:
		return userspace, "auto: flows that send small messages back and forth go on by " + autoKernel
	case r.auto && kernel.Reason != "":
		return userspace, "auto: " + autoKernel + " is not there: " + kernel.Reason
	case r.auto:
		return userspace, "auto: " + autoKernel + " is not there"
	case len(r.datapaths) == 0:
		return userspace, "the configuration says so"
	}
	for _, d := range r.datapaths {
		i := slices.IndexFunc(all, func(s DatapathStatus) bool { return s.Name == d.Name() })
		if i < 0 || all[i].Available {
			return d.Name(), why
		}
		why = cmp.Or(why, d.Name()+" takes no flows: "+all[i].Reason)
	}
	return userspace, why
}

// userspace is the datapath that is always there.
const userspace = "userspace"

// accepts says whether a hello with these protocols may take the rule.
func (r *rule) accepts(alpn []string) bool {
	return len(r.alpn) == 0 || slices.ContainsFunc(alpn, func(p string) bool {
		// An authority that validates a name offers nothing else (RFC 8737 section 3). Who does may choose
		// what is for everybody, and would have gone round what guards that.
		return slices.Contains(r.alpn, p) && (p != acmeTLS || len(alpn) == 1)
	})
}

// acmeTLS is the protocol of authorities that validate a name.
const acmeTLS = "acme-tls/1"

// compile makes the service of one listener. Errors carry the config's file
// and line.
func (f *Front) compile(cfg *config.Config, l *config.Listener) (*service, error) {
	s := &service{mode: l.Mode, limits: cfg.Limits, timing: l.ServerTiming}
	if l.HSTS != nil {
		s.hsts = l.HSTS.Value()
	}
	if l.AcceptProxy != nil {
		s.trust = plan.NewPeers(l.AcceptProxy.From)
		s.header = l.AcceptProxy.Required || l.Mode == "tcp"
	}
	if len(l.Allow) > 0 {
		s.allow = plan.NewPeers(l.Allow)
	}
	var errs []error
	for i := range l.Routes {
		c := &l.Routes[i]
		patterns := slices.Concat(c.SNI, c.Host)
		r, err := f.compileRule(cfg, l, strings.Join(patterns, ",")+c.Path, vhost.Match{Path: c.Path, Methods: c.Methods, Headers: c.Headers}, &c.Action)
		if err != nil {
			errs = append(errs, placed(cfg, c.At("datapath"), err))
			continue
		}
		r.patterns, r.alpn = patterns, c.ALPN
		s.rules = append(s.rules, r)
	}
	if l.Default != nil {
		r, err := f.compileRule(cfg, l, "default", vhost.Match{}, l.Default)
		if err != nil {
			errs = append(errs, placed(cfg, l.Default.At("datapath"), err))
		} else {
			s.rules = append(s.rules, r)
			s.fallback = r
		}
	}
	if err := s.index(); err != nil {
		errs = append(errs, fmt.Errorf("listener %q: %w", l.Name, err))
	}
	return s, errors.Join(errs...)
}

// index makes the table that the rules are looked up in.
func (s *service) index() error {
	var table route.Builder[*rule]
	var errs []error
	// Within one name the longest path is tried first.
	byPath := slices.Clone(s.rules)
	slices.SortStableFunc(byPath, func(a, b *rule) int { return cmp.Compare(len(b.match.Path), len(a.match.Path)) })
	for _, r := range byPath {
		for _, p := range r.patterns {
			errs = append(errs, table.Add(p, r))
		}
	}
	if s.fallback != nil {
		table.Default(s.fallback)
	}
	s.names = table.Build()
	s.clientCerts = slices.ContainsFunc(s.rules, func(r *rule) bool { return r.http != nil && r.http.ClientCAs != nil })
	return errors.Join(errs...)
}

// withRules returns a service that has these rules too, behind its own.
func (s *service) withRules(more []*rule) *service {
	with := *s
	with.base = s
	at := len(s.rules)
	if s.fallback != nil {
		at-- // the default is shown last
	}
	with.rules = slices.Insert(slices.Clone(s.rules), at, more...)
	_ = with.index() // leaves out what is no name: config.ParseLabels lets none through
	return &with
}

// placed gives err a place in the file, if it has none yet.
func placed(cfg *config.Config, at config.Pos, err error) error {
	var known *config.Error
	if errors.As(err, &known) {
		return err
	}
	return fmt.Errorf("%s:%s: %w", cfg.File, at, err)
}

// compileRule makes a rule of what a route, or the default, says to do.
func (f *Front) compileRule(cfg *config.Config, l *config.Listener, name string, match vhost.Match, a *config.Action) (*rule, error) {
	r := &rule{name: name, match: match, reject: a.Reject, dialer: f.dialer}
	r.match.AnyCase = a.Reject || len(asks(a)) > 0
	if a.Reject {
		return r, nil
	}
	r.target = dial.Target(a.Target())
	r.literal, _ = r.target.Literal()
	r.written = written(a)
	r.targets, r.asks = a.Forward, asks(a)
	r.sendProxy, r.transparent = a.SendProxy != "", a.Transparent
	r.hold = a.Hold
	if len(a.Allow) > 0 {
		r.allow = plan.NewPeers(a.Allow)
	}
	wanted := cmp.Or(a.Datapath, cfg.Datapath, plan.Auto)
	if l.Mode == "http" || l.Mode == "https" {
		// What is terminated here can't be moved without this process.
		var err error
		if r.http, err = f.compileHTTP(cfg, l, r, a); err != nil {
			return nil, err
		}
		r.http.Guard, err = f.compileAccess(cfg, l.Name, r, a)
		return r, err
	}
	r.wanted = wanted
	if wanted == plan.Auto {
		r.auto = true
		return r, nil
	}
	var err error
	if r.datapaths, err = f.chooseDatapaths(wanted); err != nil {
		return nil, &config.Error{File: cfg.File, Pos: a.At("datapath"), Message: err.Error()}
	}
	return r, nil
}

// written is where a rule leads, as the config has it.
func written(a *config.Action) string {
	if a.Redirect != nil {
		return "redirect " + a.Redirect.To
	}
	var all []string
	for i := range a.Forward {
		all = append(all, a.Forward[i].To.String())
	}
	return strings.Join(all, ", ")
}

// chooseDatapaths turns the config's word into what to try before userspace.
// Naming a datapath that this machine can't offer is an error: whoever names
// one wants to know. A flow that it refuses is offered to those behind it.
func (f *Front) chooseDatapaths(word string) ([]relay.Datapath, error) {
	if word == userspace {
		return nil, nil
	}
	for i, d := range f.opts.Datapaths {
		if d.Name() == word {
			return f.opts.Datapaths[i:], nil
		}
	}
	reason := f.missing[word]
	if reason == "" {
		reason = "this version does not have it"
	}
	return nil, fmt.Errorf("datapath %s is not available: %s: use `datapath: auto` to go on without it", word, reason)
}
