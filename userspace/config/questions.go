package config

import (
	"cmp"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// questions warns of a forward_auth whose questions come back to a route that asks them again.
func (v *validator) questions(c *Config) {
	for _, a := range c.Actions() {
		var asked []*Action
		for next := a; next != nil && next.ForwardAuth != nil && !slices.Contains(asked, next); {
			asked = append(asked, next)
			if next = v.answers(c.Node, next.ForwardAuth); next == a {
				v.warnf(a.ForwardAuth.At("address"), "forward_auth %q leads back to a route that asks it: nobody would "+
					"ever get in. Write the address of the auth server itself, or give it a route of its own here, "+
					"without forward_auth", a.ForwardAuth.Address)
			}
		}
	}
}

// answers is what a listener of this daemon does with the questions of f, nil if they don't lead to one.
func (v *validator) answers(node string, f *ForwardAuth) *Action {
	u, err := url.Parse(f.Address)
	if err != nil {
		return nil
	}
	t := Target{Scheme: u.Scheme, Host: u.Hostname()}
	port := u.Port()
	switch u.Scheme {
	case "http":
		t.Scheme, port = "tcp", cmp.Or(port, "80")
	case "https":
		t.Scheme, port = "tcp", cmp.Or(port, "443")
	}
	n, _ := strconv.ParseUint(port, 10, 16)
	t.Port = uint16(n)
	b, ok := v.ownAddress(node, t)
	if !ok || b.listener == nil || b.listener.Mode != "http" && b.listener.Mode != "https" {
		return nil
	}
	var found *Route
	named := "" // the pattern that found it
	for i := range b.listener.Routes {
		r := &b.listener.Routes[i]
		path := strings.TrimSuffix(r.Path, "/")
		below := u.Path == path || strings.HasPrefix(u.Path, path+"/") || path == ""
		if !below || len(r.Headers) > 0 || len(r.Methods) > 0 && !slices.Contains(r.Methods, "GET") {
			continue
		}
		for _, pattern := range r.Host {
			// The longer pattern goes first, and of one the longer path.
			if Covers(pattern, strings.ToLower(u.Hostname())) && (found == nil || len(pattern) > len(named) ||
				pattern == named && len(path) > len(strings.TrimSuffix(found.Path, "/"))) {
				found, named = r, pattern
			}
		}
	}
	if found != nil {
		return &found.Action
	}
	return b.listener.Default
}
