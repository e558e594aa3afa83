package vhost

import (
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
)

// rewrite turns the request that came in into the one that goes out.
func (s *Server) rewrite(pr *httputil.ProxyRequest) {
	x := pr.In.Context().Value(exchangeKey{}).(*exchange)
	x.up.address(pr.Out.URL, x)
	pr.Out.URL.User = nil
	pr.Out.Host = pr.In.Host
	// ReverseProxy re-encodes queries that Go's parser finds odd, for the sake
	// of handlers which decide by them. We don't; the upstream gets what was sent.
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery
	x.setHeaders(pr.Out.Header)
	if x.timing {
		pr.Out.Header[timingHeader] = []string{"1"}
	}
	if x.body != nil {
		x.body.passTrailers(x.req, pr.Out, &x.visit)
	}
	r := x.route
	if r.ClientCAs != nil {
		delete(pr.Out.Header, "Client-Cert-Chain")
		setClientCert(pr.Out.Header, x.req.TLS.PeerCertificates[0])
	}
	if r.StripPrefix != "" {
		stripPrefix(pr.Out, r.StripPrefix)
	}
	if r.AddPrefix != "" {
		addPrefix(pr.Out.URL, r.AddPrefix)
	}
	r.RequestHeader.apply(pr.Out.Header)
	if host := pr.Out.Header["Host"]; host != nil {
		pr.Out.Host = host[0]
		delete(pr.Out.Header, "Host")
	}
}

// Rewritten is the host and the path that upstreams are asked for, of a request
// for these.
func (r *Route) Rewritten(host, path string) (string, string) {
	out := &http.Request{URL: &url.URL{Path: path}, Header: http.Header{}}
	if r.StripPrefix != "" {
		stripPrefix(out, r.StripPrefix)
	}
	if r.AddPrefix != "" {
		addPrefix(out.URL, r.AddPrefix)
	}
	if to := r.RequestHeader.Set["Host"]; to != "" {
		host = to
	}
	return host, out.URL.Path
}

// stripPrefix takes a prefix off the path, which a route has found to match,
// and says so in X-Forwarded-Prefix. What the client has encoded in the rest
// stays so, unless it wrote the prefix itself in an unusual way.
func stripPrefix(out *http.Request, prefix string) {
	prefix = strings.TrimSuffix(prefix, "/")
	u := out.URL
	plain := RoutePath(out)
	raw := u.EscapedPath()
	escaped := (&url.URL{Path: prefix}).EscapedPath()
	if rest, ok := strings.CutPrefix(raw, escaped); ok && plain == u.Path && (rest == "" || rest[0] == '/') {
		u.Path, u.RawPath = plain[len(prefix):], rest
	} else {
		u.Path, u.RawPath = plain[len(prefix):], ""
	}
	if u.Path == "" {
		u.Path, u.RawPath = "/", ""
	}
	out.Header["X-Forwarded-Prefix"] = []string{out.Header.Get("X-Forwarded-Prefix") + escaped}
}

// addPrefix puts a prefix before the path. Dot segments are resolved first, or
// they would lead out of it.
func addPrefix(u *url.URL, prefix string) {
	escaped := (&url.URL{Path: strings.TrimSuffix(prefix, "/")}).EscapedPath()
	prefix = strings.TrimSuffix(prefix, "/")
	if plain := cleanPath(u.Path); plain != u.Path {
		u.Path, u.RawPath = plain, ""
	}
	u.RawPath = escaped + u.EscapedPath()
	u.Path = prefix + u.Path
}
