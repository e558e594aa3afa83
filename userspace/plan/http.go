package plan

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"

	"github.com/tailsplice/tailsplice/userspace/auth"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// fillHTTP gives r what a says to do with requests.
func (p *Plan) fillHTTP(r *Rule, l *config.Listener, a *config.Action) error {
	out := &vhost.Route{Name: r.Name, BySource: r.BySource, AddPrefix: a.AddPrefix, MaxBody: a.MaxBody, Compress: a.Compress,
		RequestHeader: headerChange(a.RequestHeaders), ResponseHeader: headerChange(a.ResponseHeaders)}
	r.HTTP.Route = out
	if a.StripPrefix {
		out.StripPrefix = r.HTTP.Match.Path
	}
	if a.Timeouts != nil {
		out.AnswerTimeout, out.BodyTimeout = a.Timeouts.Answer, a.Timeouts.Body
	}
	if a.Redirect != nil {
		out.Redirect = &vhost.Redirect{To: a.Redirect.To, Code: a.Redirect.Code}
	}
	if c := a.ClientCertificates; c != nil {
		cas, err := tlsterm.OpenAuthorities(c.CA, p.deps.Log)
		if err != nil {
			return p.Config.Errorf(c.At("ca"), "client_certificates: %v", err)
		}
		out.ClientCAs = func() *x509.CertPool { pool, _ := cas.Pool(); return pool }
	}
	for _, to := range a.Forward {
		one := r.withTarget(to)
		up, err := p.upstream(l, one, a)
		if err != nil {
			return err
		}
		one.Check = p.check(l, one, a, up)
		r.addTarget(one, &up.Health)
		out.Upstreams = append(out.Upstreams, vhost.Choice{Upstream: up, Weight: to.Weight, Backup: to.Backup,
			Written: one.Written, Checked: one.checked(), Offline: one.IsOffline, DownSince: one.downSince})
	}
	if r.Hold > 0 && r.Several != nil && p.deps.Wait != nil {
		out.Wait = p.deps.Wait(l.Name, r)
	}
	return p.fillAccess(r, l, a)
}

// fillAccess gives r what a asks of each request.
func (p *Plan) fillAccess(r *Rule, l *config.Listener, a *config.Action) (err error) {
	if b := a.BasicAuth; b != nil {
		if b.File != "" {
			r.HTTP.Users, err = auth.OpenUsers(b.File, p.deps.Log)
		} else {
			r.HTTP.Users, err = auth.NewUsers(b.Users)
		}
		if err != nil {
			return p.Config.Errorf(b.At("file"), "basic_auth: %v", err)
		}
	}
	if fa := a.ForwardAuth; fa != nil {
		r.HTTP.Asked = fa.Address
		if r.HTTP.Auth, err = p.newForward(fa); err != nil {
			return p.Config.Errorf(fa.At("address"), "forward_auth: %v", err)
		}
	}
	if p.deps.Guard != nil {
		r.HTTP.Route.Guard = p.deps.Guard(l.Name, r)
	}
	return nil
}

// newForward finds out how the server of a forward_auth is reached.
func (p *Plan) newForward(a *config.ForwardAuth) (*auth.Forward, error) {
	u, err := url.Parse(a.Address)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "https" {
		u.Scheme = "http"
	}
	target := dial.Target(a.Target())
	dialServer := func(ctx context.Context) (net.Conn, error) {
		c, err := p.deps.Dialer.Dial(ctx, target, netip.Addr{})
		if err != nil {
			return nil, auth.DialError(err)
		}
		return c, nil
	}
	return auth.NewForward(auth.ForwardOptions{URL: u, Timeout: a.Timeout, Dial: dialServer, Copy: a.CopyHeaders}), nil
}

func headerChange(c *config.HeaderChanges) vhost.HeaderChange {
	if c == nil {
		return vhost.HeaderChange{}
	}
	return vhost.HeaderChange{Remove: c.Remove, Set: c.Set}
}

// upstream makes the upstream of r's requests. r is a rule of its own for that target: its dialer may be
// changed.
func (p *Plan) upstream(l *config.Listener, r *Rule, a *config.Action) (*vhost.Upstream, error) {
	if a.Timeouts != nil && a.Timeouts.Connect > 0 {
		own := *r.Dialer
		own.Timeout = a.Timeouts.Connect
		r.Dialer = &own
	}
	up := &vhost.Upstream{
		Key: fmt.Sprintf("%s proxy=%t transparent=%t at %s connect=%v", r.Written, r.SendProxy, r.Transparent,
			r.To, r.Dialer.Timeout),
		Name: r.publicName(), Speaks: r.speaker(),
	}
	if p.deps.Upstream != nil {
		p.deps.Upstream(l.Name, r, up)
	}
	u := a.Upstream
	if u == nil {
		return up, nil
	}
	switch u.Protocol {
	case "h2c":
		up.Protocol = vhost.H2C
	case "https":
		up.Protocol = vhost.HTTPS
		up.TLS = &tls.Config{ServerName: u.ServerName, InsecureSkipVerify: u.Insecure}
		if u.Insecure {
			up.TLS.MinVersion = tls.VersionTLS10
			for _, suite := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
				up.TLS.CipherSuites = append(up.TLS.CipherSuites, suite.ID)
			}
		}
		if up.TLS.ServerName == "" {
			up.TLS.ServerName = r.To.Host
		}
		if u.CA != "" {
			cas, err := tlsterm.OpenAuthorities(u.CA, p.deps.Log)
			if err != nil {
				return nil, p.Config.Errorf(u.At("ca"), "upstream: %v", err)
			}
			up.Roots = cas.Pool
		}
		up.Key += fmt.Sprintf(" name=%s insecure=%t ca=%s", up.TLS.ServerName, u.Insecure, u.CA)
	}
	up.Key += " " + u.Protocol
	return up, nil
}

// publicName is how a visitor may hear of a target: the names of nodes and
// containers tell which hop failed, addresses are nobody's business.
func (r *Rule) publicName() string {
	switch {
	case r.Label != nil:
		return "the container " + r.Label.Container
	case r.To.Scheme == dial.Tailnet:
		return r.To.Host
	case r.To.Scheme == dial.Docker:
		return "the container " + r.To.Host
	}
	return "a local service"
}

// speaker says on whose behalf the connections of r are made.
func (r *Rule) speaker() vhost.Speaker {
	switch {
	case r.SendProxy:
		return vhost.ForPath
	case r.Transparent:
		return vhost.ForClient
	}
	return vhost.ForAll
}
