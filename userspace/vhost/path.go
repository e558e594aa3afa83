package vhost

import (
	"net/http"
	"strings"
)

// PathHeader tells the next hop by which hops a request has come, the first one first, for the pages that
// show its path. It is believed from a hop that is believed only.
const PathHeader = "X-Tailsplice-Path"

// passed are the names of the hops before this one, as far as they are known: what the last of them says, or
// that one itself.
func (x *exchange) passed() []string {
	c := x.visit.Conn
	if believes(c, x.req.TLS != nil) {
		if names := hopNames(x.req.Header); len(names) > 0 {
			return names
		}
	}
	if c.Hop != "" {
		return []string{c.Hop}
	}
	return nil
}

// hopNames reads PathHeader. Nothing of it counts if a part of it is no node's name, or it has too many.
func hopNames(h http.Header) []string {
	names := splitList(h[PathHeader])
	if len(names) > maxHops {
		return nil
	}
	for _, n := range names {
		if len(n) > 63 || strings.ContainsFunc(n, func(r rune) bool {
			return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-' || r == '_' || r == '.')
		}) {
			return nil
		}
	}
	return names
}

// stop is a place on the path that a page shows.
type stop struct {
	Name, State string
	Failed      bool
}

// stops is the path of a request to the hop that did not answer it; nil if the fault is here.
func (s *Server) stops(x *exchange, f fault) []stop {
	if f.target == "" {
		return nil
	}
	way := []stop{{Name: "you", State: "working"}}
	for _, n := range append(x.passed(), s.opts.Node) {
		way = append(way, stop{Name: n, State: "working"})
	}
	return append(way, stop{Name: bare(f.target), State: f.state, Failed: true})
}
