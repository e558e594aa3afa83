package plan

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/route"
	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// Service is what one listener does.
type Service struct {
	Mode        string
	Limits      config.Limits
	Trust       *Peers  // nil: a PROXY header is data
	NeedsHeader bool    // there must be one
	Allow       *Peers  // nil: everybody
	Fallback    *Rule   // the default, which on a tcp listener is the only way; nil: none
	Rules       []*Rule // all, in the config's order, for status
	HSTS        string  // https only
	Timing      bool    // http(s) only

	Certificates []tlsterm.Spec // https only: what it shows
	Managed      []*acme.Source // those of Certificates that come by ACME

	names       *route.Table[*Rule] // sni and http(s): by name, then default
	clientCerts bool                // some rule wants a client's certificate
}

// HelloTimeout is how long a client may take for its hello.
func (s *Service) HelloTimeout() time.Duration {
	if s.Mode == "https" {
		return vhost.DefaultHeaderTimeout
	}
	return s.Limits.HelloTimeout
}

// service compiles one listener.
func (p *Plan) service(l *config.Listener) (*Service, error) {
	s := &Service{Mode: l.Mode, Limits: p.Config.Limits, Timing: l.ServerTiming}
	if l.HSTS != nil {
		s.HSTS = l.HSTS.Value()
	}
	if l.AcceptProxy != nil {
		s.Trust = NewPeers(l.AcceptProxy.From)
		s.NeedsHeader = l.AcceptProxy.Required || l.Mode == "tcp"
	}
	s.Allow = peersOrAll(l.Allow)
	for _, c := range l.Certificates {
		s.certificate(c, p.deps)
	}
	var errs []error
	add := func(r *Rule, a *config.Action) *Rule {
		if err := p.fill(r, l, a); err != nil {
			errs = append(errs, err)
			return nil
		}
		s.Rules = append(s.Rules, r)
		return r
	}
	for _, c := range l.Routes {
		m := Match{Patterns: slices.Concat(c.SNI, c.Host), ALPN: c.ALPN}
		r := &Rule{Name: strings.Join(m.Patterns, ",") + c.Path, Match: m}
		if l.IsHTTP() {
			r.HTTP = &HTTP{Match: vhost.Match{Path: c.Path, Methods: c.Methods, Headers: c.Headers}}
		}
		add(r, &c.Action)
	}
	if l.Default != nil {
		r := &Rule{Name: "default"}
		if l.IsHTTP() {
			r.HTTP = new(HTTP)
		}
		s.Fallback = add(r, l.Default)
	}
	if err := s.index(); err != nil {
		errs = append(errs, fmt.Errorf("listener %q: %w", l.Name, err))
	}
	return s, errors.Join(errs...)
}

// certificate adds a certificate that s shows.
func (s *Service) certificate(c *config.Certificate, deps Deps) {
	switch {
	case c.Files != nil:
		s.Certificates = append(s.Certificates, tlsterm.Spec{Cert: c.Files.Cert, Key: c.Files.Key})
	case c.Tailscale:
		s.Certificates = append(s.Certificates, tlsterm.Spec{Name: "tailscale", GetCertificate: deps.Tailnet.GetCertificate,
			Covers: func(name string) bool { return strings.HasSuffix(name, ".ts.net") }})
	case c.ACME != nil && deps.ACME != nil:
		src := deps.ACME.Source(acmeSection(c.ACME))
		s.Managed = append(s.Managed, src)
		s.Certificates = append(s.Certificates, tlsterm.Spec{Name: src.String(), GetCertificate: src.GetCertificate, Covers: src.Covers})
	}
}

// index makes the table that the rules are looked up in.
func (s *Service) index() error {
	var table route.Builder[*Rule]
	var errs []error
	// Within one name the longest path is tried first.
	byPath := slices.Clone(s.Rules)
	slices.SortStableFunc(byPath, func(a, b *Rule) int { return cmp.Compare(len(b.path()), len(a.path())) })
	for _, r := range byPath {
		for _, pattern := range r.Patterns {
			errs = append(errs, table.Add(pattern, r))
		}
	}
	if s.Fallback != nil {
		table.Default(s.Fallback)
	}
	s.names = table.Build()
	s.clientCerts = slices.ContainsFunc(s.Rules, (*Rule).asksCertificate)
	return errors.Join(errs...)
}

// withRules returns a service that has these rules too, behind its own.
func (s *Service) withRules(more []*Rule) *Service {
	with := *s
	at := len(s.Rules)
	if s.Fallback != nil {
		at-- // the default is shown last
	}
	with.Rules = slices.Insert(slices.Clone(s.Rules), at, more...)
	_ = with.index() // leaves out what is no name: config.ParseLabels lets none through
	return &with
}

// byHello finds the rule of a name and protocols in a hello, nil if there is none.
func (s *Service) byHello(hello *sni.Hello) *Rule {
	r, _ := s.names.Lookup(hello.ServerName, func(r *Rule) bool { return r.accepts(hello.ALPN) })
	return r
}

// ByName finds the rule of a name in a hello, whatever protocols it is for, nil if there is none. A rule that
// is for acme-tls/1 alone, the protocol of authorities, is none.
func (s *Service) ByName(name string) *Rule {
	r, _ := s.names.Lookup(name, func(r *Rule) bool { return !slices.Equal(r.ALPN, []string{acmeTLS}) })
	return r
}

// ByRequest finds the rule of a request. A host's rules are tried by path, longest first, then in the
// config's order; then shorter wildcards, then the default. exactly says that some rule is for the very host.
// The error is a *[vhost.MethodError], [vhost.ErrNoPath] or [vhost.ErrNoHost].
func (s *Service) ByRequest(req *http.Request, host, path string) (r *Rule, exactly bool, err error) {
	known := false
	var allow []string
	r, ok := s.names.Lookup(host, func(r *Rule) bool {
		known = true
		exactly = exactly || slices.Contains(r.Patterns, host)
		ok, otherMethod := r.HTTP.Match.Takes(req, path)
		if otherMethod {
			for _, m := range r.HTTP.Match.Methods {
				if !slices.Contains(allow, m) {
					allow = append(allow, m)
				}
			}
		}
		return ok
	})
	switch {
	case ok:
		return r, exactly, nil
	case allow != nil:
		return nil, exactly, &vhost.MethodError{Allow: allow}
	case known:
		return nil, exactly, vhost.ErrNoPath
	}
	return nil, exactly, vhost.ErrNoHost
}

// RoutesByPath says whether any rule for host is for a part of its paths.
func (s *Service) RoutesByPath(host string) (some bool) {
	s.names.Lookup(host, func(r *Rule) bool {
		some = some || !r.HTTP.Match.TakesPath("/")
		return some
	})
	return some
}

// AsksClients says whether some rule of a host wants a client's certificate.
func (s *Service) AsksClients(host string) (some bool) {
	if s.clientCerts {
		s.names.Lookup(host, func(r *Rule) bool {
			some = some || r.asksCertificate()
			return some
		})
	}
	return some
}
