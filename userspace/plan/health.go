package plan

import (
	"cmp"
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// check returns what checks r's target, which is the only one of r, as a says, or nil. up is where r's
// requests go, nil where r has none. Routes that want the same share a check, and it goes on over reloads.
func (p *Plan) check(l *config.Listener, r *Rule, a *config.Action, up *vhost.Upstream) *health.Check {
	if a.Health == nil {
		return nil
	}
	spec := specOf(l, r, a, up)
	if c := p.checks[spec]; c != nil {
		return c
	}
	d, to := *r.Dialer, r.To
	d.Timeout, d.Once, d.Disabled = spec.Timeout, true, nil // who disables a target learns whether it works
	dialTarget := func(ctx context.Context) (net.Conn, error) { return d.Dial(ctx, to, netip.Addr{}) }
	var roots func() *x509.CertPool
	if up != nil && up.Roots != nil {
		roots = func() *x509.CertPool { pool, _ := up.Roots(); return pool }
	}
	c := p.deps.Health.Of(spec, health.Probe(spec, dialTarget, roots))
	p.checks[spec] = c
	return c
}

// specOf is how r's target is to be checked. What a kind of check does not need is left out, so that more
// routes agree.
func specOf(l *config.Listener, r *Rule, a *config.Action, up *vhost.Upstream) health.Spec {
	h := a.Health
	s := health.Spec{Target: r.Written, Kind: h.Check, Every: h.Every, Timeout: h.Timeout, Rise: h.Rise, Fall: h.Fall,
		SlowStart: h.SlowStart}
	if h.Check == health.Connect {
		return s
	}
	if r.SendProxy {
		s.Preface = string(proxyheader.Header{Local: true}.Append(nil))
	}
	name := cmp.Or(h.ServerName, config.ExactName(r.Patterns))
	switch {
	case up == nil:
		s.TLS, s.ServerName, s.Verify = h.Check == health.TLS || l.Mode == "sni", name, h.Verify
	case up.TLS != nil:
		s.TLS, s.ServerName, s.Verify, s.CA = true, up.TLS.ServerName, !up.TLS.InsecureSkipVerify, a.Upstream.CA
	}
	if h.Check == health.HTTP {
		s.H2C = up != nil && up.Protocol == vhost.H2C
		s.Host, s.Path, s.Expect = cmp.Or(name, hostOf(r.To)), h.Path, strings.Join(h.Expect, " ")
		if a.RequestHeaders != nil {
			s.Host = cmp.Or(a.RequestHeaders.Set["Host"], s.Host)
		}
		s.Expect = cmp.Or(s.Expect, goodStatus)
	}
	return s
}

// goodStatus is what is expected of an answer where the config says nothing.
const goodStatus = "2xx 3xx"

// hostOf is the host of a request to t for which there is no name.
func hostOf(t dial.Target) string {
	switch {
	case t.Scheme == dial.Unix, t.Scheme == dial.Docker: // which has no name of DNS
		return "localhost"
	case strings.Contains(t.Host, ":"):
		return "[" + t.Host + "]"
	}
	return t.Host
}

// Checks are the health checks that the plan needs, each once.
func (p *Plan) Checks() (all []*health.Check) {
	for _, c := range p.checks {
		all = append(all, c)
	}
	return all
}

// checked is what health checks have found of r's target, nil without any.
func (r *Rule) checked() *balance.Checked {
	if r.Check == nil {
		return nil
	}
	return &r.Check.Checked
}

// downSince is since when health checks have found r's target down; zero: they have not.
func (r *Rule) downSince() (since time.Time) {
	if !r.checked().IsDown() {
		return since
	}
	if s := r.Check.Status(); s.Down {
		since = s.Since
	}
	return since
}

// IsOffline reports whether the tailnet says that the node of r's target is not connected. It is a hint,
// which health checks know better.
func (r *Rule) IsOffline() bool { return r.Check == nil && r.Dialer.IsOffline(r.To) }
