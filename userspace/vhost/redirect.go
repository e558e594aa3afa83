package vhost

import (
	"net/http"
	"net/url"
	"strings"
)

// Redirect answers with another place.
type Redirect struct {
	// To is "https", for the same address by https, or an absolute URL. One without a path gets the request's
	// path and query.
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
