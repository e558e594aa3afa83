package vhost

import (
	"net/http"
	"slices"
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
	if slices.ContainsFunc(names, func(n string) bool { return len(n) > 63 || strings.Trim(n, alphanumeric+"-_.") != "" }) {
		return nil
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
	var way []stop
	for _, n := range slices.Concat([]string{"you"}, x.passed(), []string{s.opts.Node}) {
		way = append(way, stop{Name: n, State: "working"})
	}
	return append(way, stop{Name: bare(f.target), State: f.state, Failed: true})
}

// timingHeader asks the hops behind this one to show what they took. It is believed from a hop that is
// believed only.
const timingHeader = "X-Tailsplice-Timing"
