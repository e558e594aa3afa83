package vhost

import (
	"encoding/base64"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
)

// rewrite turns the request that came in into the one that goes out.
func (s *Server) rewrite(pr *httputil.ProxyRequest) {
	x := pr.In.Context().Value(exchangeKey{}).(*exchange)
	r := x.route
	x.up.address(pr.Out.URL, x)
	setTarget(pr.Out.URL, r.path(&x.uri), x.uri.Query)
	pr.Out.Host = x.uri.Authority
	x.setHeaders(pr.Out.Header, x.uri.Authority)
	if x.wantsTiming {
		pr.Out.Header[timingHeader] = []string{"1"}
	}
	if x.body != nil {
		x.body.passTrailers(x.req, pr.Out)
	}
	if r.ClientCAs != nil {
		dropHeader(pr.Out.Header, "Client-Cert")
		dropHeader(pr.Out.Header, "Client-Cert-Chain")
		raw := base64.StdEncoding.EncodeToString(x.req.TLS.PeerCertificates[0].Raw)
		pr.Out.Header["Client-Cert"] = []string{":" + raw + ":"} // RFC 9440 2.2
	}
	if r.StripPrefix != "" {
		pr.Out.Header["X-Forwarded-Prefix"] = []string{pr.Out.Header.Get("X-Forwarded-Prefix") + escaped(strings.TrimSuffix(r.StripPrefix, "/"))}
	}
	r.RequestHeader.applyFolded(pr.Out.Header)
	if host := pr.Out.Header["Host"]; host != nil {
		pr.Out.Host = host[0]
		delete(pr.Out.Header, "Host")
	}
	if pr.Out.Host == "" {
		pr.Out.Host = noHost
	}
	spellWebSocket(pr.Out.Header)
	if !x.isExpecting {
		delete(pr.Out.Header, "Expect")
	}
}

// noHost makes net/http write a Host without a value, as RFC 9112 3.2 wants it of a request whose URI has no
// authority. For "" it would write that of the URL, which is the key of a pool of connections.
const noHost = "/"

// Rewritten is the host and the path that upstreams are asked for, of a request for these.
func (r *Route) Rewritten(host, path string) (string, string) {
	if to := r.RequestHeader.Set["Host"]; to != "" {
		host = to
	}
	path = r.path(&URI{Path: escaped(path), Plain: RoutePath(path)})
	if plain, err := url.PathUnescape(path); err == nil {
		path = plain
	}
	return host, path
}

// path is what the upstream is asked for at u. What the client has escaped stays so.
func (r *Route) path(u *URI) string {
	if r.StripPrefix == "" && r.AddPrefix == "" {
		return u.Path
	}
	return escaped(strings.TrimSuffix(r.AddPrefix, "/")) + r.rest(u)
}

// rest is u's path behind StripPrefix.
func (r *Route) rest(u *URI) string {
	path := u.resolved()
	if r.StripPrefix != "" {
		path = stripPrefix(path, strings.TrimSuffix(r.StripPrefix, "/"))
	}
	return path
}

// resolved is u's path without dot segments and double slashes, which would lead out of a prefix.
func (u *URI) resolved() string {
	if plain, err := url.PathUnescape(u.Path); err == nil && plain == u.Plain {
		return u.Path
	}
	path := RoutePath(strings.NewReplacer("%2e", ".", "%2E", ".").Replace(u.Path))
	if plain, err := url.PathUnescape(path); err == nil && plain == u.Plain {
		return path
	}
	return escaped(u.Plain) // dot segments between escaped slashes
}

// stripPrefix takes a prefix off a resolved path, in whatever way the client wrote it there.
func stripPrefix(path, prefix string) string {
	i := 0
	for n := 0; n < len(prefix) && i < len(path); n++ {
		if path[i] == '%' {
			i += 2
		}
		i++
	}
	rest := path[i:]
	if len(rest) >= 3 && strings.EqualFold(rest[:3], "%2f") {
		rest = rest[3:]
	}
	return "/" + strings.TrimPrefix(rest, "/")
}

// escaped is a path percent-encoded.
func escaped(plain string) string { return (&url.URL{Path: plain}).EscapedPath() }

// Redirect answers with another place.
type Redirect struct {
	// To is "https" (the same address), or a URL, which without a path gets the request's path and query.
	To   string
	Code int
}

// redirect answers x's request.
func (s *Server) redirect(x *exchange, to *Redirect) {
	target := to.To
	here := strings.ReplaceAll(x.uri.Path, `\`, "%5C") // which browsers take for a slash
	if here == "*" {
		here = "/"
	}
	here += x.uri.Query
	if target == "https" {
		host := x.uri.Host
		if host == "" {
			s.page(x, http.StatusBadRequest, fault{title: "This request names no host", text: "Without a host there is no https:// address to send you to."})
			return
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		target = "https://" + host
	}
	if u, err := url.Parse(target); err == nil && u.Path == "" && u.RawQuery == "" && u.Fragment == "" {
		target += here
	}
	x.resp.Header().Set("Location", target)
	x.resp.Header().Set("Content-Length", "0")
	x.resp.WriteHeader(to.Code)
}
