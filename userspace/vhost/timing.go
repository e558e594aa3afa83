package vhost

import (
	"fmt"
	"net/http"
	"time"
)

// timingHeader asks the hops behind this one to show what they took. It is believed from a hop that is
// believed only.
const timingHeader = "X-Tailsplice-Timing"

// wantsTiming says whether the answer shall show how long the hops took.
func (s *Server) wantsTiming(r *http.Request, info ConnInfo) bool {
	return s.opts.Timing != nil && s.opts.Timing() || r.Header[timingHeader] != nil && believes(info, r.TLS != nil)
}

// addTiming adds this hop to those behind it, which the upstream has named, as one metric of Server-Timing:
// the node's name, and the milliseconds since the request's header was read.
func (s *Server) addTiming(h http.Header, started time.Time) {
	h.Add("Server-Timing", fmt.Sprintf("%s;dur=%.3f", s.opts.Node, float64(time.Since(started))/float64(time.Millisecond)))
}
