package vhost

import (
	"strings"
	"time"
)

// expectIgnored is for how long an upstream that says nothing to Expect: 100-continue is not asked again. The
// client of each request would wait for expectTimeout.
const expectIgnored = 10 * time.Minute

// expects says whether the upstream shall decide if it wants the request's body. Otherwise this hop asks the
// client for it.
func (x *exchange) expects() bool {
	return strings.EqualFold(x.req.Header.Get("Expect"), "100-continue") && hasBody(x.req) &&
		x.req.ProtoAtLeast(1, 1) &&
		time.Since(time.Unix(0, x.up.silent.Load())) > expectIgnored
}

// heardNothing notes that the upstream gets the body although it has said nothing yet.
func (x *exchange) heardNothing(now time.Time) {
	if x.expecting && !x.heard.Load() {
		x.up.silent.Store(now.UnixNano())
	}
}
