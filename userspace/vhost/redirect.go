package vhost

import (
	"net/http"
	"net/url"
	"strings"
)

// Redirect answers with another place.
type Redirect struct {
	// To is "https", for the same address by https, or an absolute URL. One
	// without a path gets the request's path and query.
	To   string
	Code int
}

// redirect answers x's request.
func (s *Server) redirect(x *exchange, to *Redirect) {
	target := to.To
	here := x.req.URL.EscapedPath()
	if !strings.HasPrefix(here, "/") {
		here = "/" // OPTIONS *
	}
	if x.req.URL.RawQuery != "" {
		here += "?" + x.req.URL.RawQuery
	}
	if target == "https" {
		host := x.host
		if host == "" {
			s.page(x, http.StatusBadRequest, fault{title: "Which host?", text: "The request names no host, so there is nowhere to send it by https."})
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
