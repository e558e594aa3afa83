package config

import (
	"net/url"
	"slices"
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
	b, ok := v.ownAddress(node, f.Target())
	if err != nil || !ok || b.listener == nil || !b.listener.IsHTTP() {
		return nil
	}
	var found *Route
	named := "" // the pattern that found it
	for _, r := range b.listener.Routes {
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
