package front

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/route"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// routeRequest finds the route of a request. certs is nil for http.
func (s *service) routeRequest(req *http.Request, host, path string, certs *tlsterm.Store) (*vhost.Route, error) {
	r, err := s.findRequest(req, host, path, certs)
	switch {
	case err != nil:
		return nil, err
	case r.reject:
		return nil, vhost.ErrRejected
	}
	return r.http, nil
}

// findRequest finds the rule of a request. A host's rules are tried by path,
// longest first, then in the config's order; then shorter wildcards, then the
// default.
func (s *service) findRequest(req *http.Request, host, path string, certs *tlsterm.Store) (*rule, error) {
	known, exactly := false, false
	var allow []string
	r, ok := s.names.Lookup(host, func(r *rule) bool {
		known = true
		exactly = exactly || slices.Contains(r.patterns, host)
		ok, otherMethod := r.match.Takes(req, path)
		if otherMethod {
			for _, m := range r.match.Methods {
				if !slices.Contains(allow, m) {
					allow = append(allow, m)
				}
			}
		}
		return ok
	})
	if by := s.passesBy(req, host, certs); by != "" {
		return nil, &passesByError{by, host}
	}
	switch {
	case ok && !exactly && coalesced(req, host, certs):
		return nil, vhost.ErrMisdirected
	case ok:
		return r, nil
	case allow != nil:
		return nil, &vhost.MethodError{Allow: allow}
	case known:
		return nil, vhost.ErrNoPath
	}
	return nil, vhost.ErrNoHost
}

// routesByPath says whether any rule for host is for a part of its paths.
func (s *service) routesByPath(host string) (some bool) {
	s.names.Lookup(host, func(r *rule) bool {
		some = some || !r.match.TakesPath("/")
		return some
	})
	return some
}

// coalesced says whether a browser sends the request on a connection that it has
// made for another name, because their certificate is the same. A connection for
// this name might have led elsewhere: edges choose by the name in the hello. So
// only a route for the very name takes such requests.
func coalesced(req *http.Request, host string, certs *tlsterm.Store) bool {
	if certs == nil || req.ProtoMajor < 2 || req.TLS == nil {
		return false
	}
	asked := certs.Asked(req.TLS.ServerName)
	return asked != "" && asked != host && certs.Shared(asked, host)
}

// misdirected is the metric's word for a request that goes round an sni listener.
const misdirected = "misdirected"

type passesByError struct{ edge, host string }

func (e *passesByError) Error() string {
	return fmt.Sprintf("%v: the sni listener %s, by which it may have come, does not let everybody have %s",
		vhost.ErrMisdirected, e.edge, e.host)
}
func (e *passesByError) Unwrap() error { return vhost.ErrMisdirected }

// passesBy names the sni listener of this daemon that a request goes round: its connection may have come by
// that, with a name in its hello by which it was let through, and the request is for a host whose name would
// not have been, or only for some. A client comes again with a connection of its own then.
func (s *service) passesBy(req *http.Request, host string, certs *tlsterm.Store) (listener string) {
	if len(s.edges) == 0 || certs == nil || req.TLS == nil {
		return ""
	}
	asked := certs.Asked(req.TLS.ServerName)
	if asked == host || !fromHere(req) {
		return ""
	}
	find := func(names *route.Table[*rule], name string) *rule {
		r, _ := names.Lookup(name, func(r *rule) bool { return !slices.Equal(r.alpn, []string{acmeTLS}) })
		return r
	}
	for _, edge := range s.edges {
		names := edge.service.Load().names
		came, needs := find(names, asked), find(names, host)
		if came == nil || came.reject || came == needs {
			continue // that is not the way by which it came, or it is the same
		}
		if needs == nil || needs.reject || needs.allow != nil {
			return edge.name
		}
	}
	return ""
}

// fromHere says whether the other end of a request's connection is this host itself.
func fromHere(req *http.Request) bool {
	peer, err := netip.ParseAddrPort(req.RemoteAddr)
	local, ok := req.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return err == nil && (peer.Addr().IsLoopback() || ok && addrPort(local).Addr() == peer.Addr().Unmap())
}

// asksClients says whether some route of a host wants a client's certificate.
func (s *service) asksClients(host string) bool {
	asks := false
	if s.clientCerts {
		s.names.Lookup(host, func(r *rule) bool {
			asks = asks || r.http != nil && r.http.ClientCAs != nil
			return asks
		})
	}
	return asks
}

// askingClients makes c ask for a certificate where a route wants one, and
// nowhere else: browsers ask their user. No session is resumed there, for it
// would bring the certificate, or the lack of it, of the first handshake.
func (l *listener) askingClients(c *tls.Config) *tls.Config {
	next := c.GetConfigForClient
	asking := c.Clone()
	asking.GetConfigForClient = nil
	asking.ClientAuth = tls.RequestClientCert
	asking.SessionTicketsDisabled = true
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if next != nil {
			if own, err := next(hello); own != nil || err != nil {
				return own, err
			}
		}
		if l.service.Load().asksClients(l.certs.Asked(hello.ServerName)) {
			return asking, nil
		}
		return nil, nil
	}
	return c
}

// compileHTTP makes what becomes of the requests of a rule.
func (f *Front) compileHTTP(cfg *config.Config, l *config.Listener, r *rule, a *config.Action) (*vhost.Route, error) {
	out := &vhost.Route{Name: r.name, AddPrefix: a.AddPrefix, MaxBody: a.MaxBody, Compress: a.Compress,
		RequestHeader: headerChange(a.RequestHeaders), ResponseHeader: headerChange(a.ResponseHeaders)}
	if a.StripPrefix {
		out.StripPrefix = r.match.Path
	}
	if a.Timeouts != nil {
		out.AnswerTimeout, out.BodyTimeout = a.Timeouts.Answer, a.Timeouts.Body
	}
	if a.Redirect != nil {
		out.Redirect = &vhost.Redirect{To: a.Redirect.To, Code: a.Redirect.Code}
	}
	if c := a.ClientCertificates; c != nil {
		cas, err := tlsterm.OpenAuthorities(c.CA, f.log)
		if err != nil {
			return nil, cfg.Errorf(c.At("ca"), "client_certificates: %v", err)
		}
		out.ClientCAs = func() *x509.CertPool { pool, _ := cas.Pool(); return pool }
	}
	for i := range a.Forward {
		target := *r // its own target; the rest is shared
		target.target, target.written = dial.Target(a.Forward[i].To), a.Forward[i].To.String()
		up, err := f.newUpstream(cfg, l, &target, a)
		if err != nil {
			return nil, err
		}
		out.Upstreams = append(out.Upstreams, vhost.Choice{Upstream: up, Weight: a.Forward[i].Weight})
	}
	return out, nil
}

func headerChange(c *config.HeaderChanges) vhost.HeaderChange {
	if c == nil {
		return vhost.HeaderChange{}
	}
	return vhost.HeaderChange{Remove: c.Remove, Set: c.Set}
}

// newUpstream is where the requests of r go, which is the upstream's own.
func (f *Front) newUpstream(cfg *config.Config, l *config.Listener, r *rule, a *config.Action) (*vhost.Upstream, error) {
	if a.Timeouts != nil && a.Timeouts.Connect > 0 {
		own := *r.dialer
		own.Timeout = a.Timeouts.Connect
		r.dialer = &own
	}
	up := &vhost.Upstream{
		Key: fmt.Sprintf("%s proxy=%t transparent=%t at %s connect=%v", r.written, r.sendProxy, r.transparent, r.target, r.dialer.Timeout), Name: publicName(r), Speaks: speaker(r),
		Dial: func(ctx context.Context) (net.Conn, error) {
			info, _ := vhost.Info(ctx)
			up, err := f.dialUpstream(ctx, l.Name, r, visitor{info.Client.Addr(), info.Unknown})
			if err != nil {
				f.complain.Warn("dial "+r.written, "upstream can't be reached", "id", info.ID, "listener", l.Name, "route", r.name, "target", r.written, "client", info.Client, "err", err)
				return nil, pageReason(err)
			}
			if r.sendProxy {
				h := proxyheader.Header{Source: info.Client, Destination: info.Local, ServerName: info.ServerName, ID: info.ID}
				if !vhost.MayTell(info.Client.Addr(), info.Unknown) {
					h.Source = netip.AddrPort{} // as in proxyHeader
				}
				if _, err := up.Write(h.Append(nil)); err != nil {
					up.Close()
					return nil, fmt.Errorf("send the PROXY header: %w", err)
				}
			}
			return up, nil
		},
	}
	if r.hold > 0 {
		up.Watch = &vhost.Watch{Soon: holdFirst, Late: max(r.hold, holdFirst), Unheard: unheard}
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
			up.TLS.ServerName = r.target.Host
		}
		if u.CA != "" {
			cas, err := tlsterm.OpenAuthorities(u.CA, f.log)
			if err != nil {
				return nil, cfg.Errorf(u.At("ca"), "upstream: %v", err)
			}
			up.Roots = cas.Pool
		}
		up.Key += fmt.Sprintf(" name=%s insecure=%t ca=%s", up.TLS.ServerName, u.Insecure, u.CA)
	}
	up.Key += " " + u.Protocol
	return up, nil
}

// speaker is for whom the connections of r speak.
func speaker(r *rule) vhost.Speaker {
	switch {
	case r.sendProxy:
		return vhost.ForPath
	case r.transparent:
		return vhost.ForClient
	}
	return vhost.ForAll
}
