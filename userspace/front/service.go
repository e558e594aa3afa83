package front

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// listener is a configured listener while the daemon lives. What it does is
// its service, which a reload swaps; what it is (name and mode) stays.
type listener struct {
	name, mode string
	service    atomic.Pointer[service]
	http       *httpServer    // http and https only
	certs      *tlsterm.Store // https only
	managed    []*acme.Source // likewise: those of certs that come by ACME

	gate *gate // with while_down: close only; guarded by Front.mu, and so is shut
	shut bool  // its sockets are to be closed; without while_down: close it says nothing
}

// retire ends what l does beside its flows, which go on; requests do until ctx ends.
//
// Front.mu is held.
func (l *listener) retire(ctx context.Context) {
	if l.http != nil {
		go l.http.shutdown(ctx)
	}
	l.gate.stop()
}

// service is what a listener does by the plan, and what is open for that. It is
// immutable: a flow that has begun with one keeps it.
type service struct {
	*plan.Service
	deny      *denials       // nil: nobody
	edges     []*listener    // https only: this daemon's sni listeners, by which connections may have come
	accessLog *accesslog.Log // http(s) only; nil: none
}

// via names the datapath that a flow of r begins with now, and says why it is not another one. named are those of
// its word.
func via(r *plan.Rule, named []datapath.Datapath, all []DatapathStatus) (name, why string) {
	kernel, auto := DatapathStatus{}, r.Datapath == plan.Auto
	for _, d := range all {
		if d.Name == autoKernel {
			kernel = d
		}
	}
	switch {
	case r.HTTP != nil:
		return userspace, "HTTP is served by this process, which has to see the bytes"
	case auto && kernel.Available:
		return userspace, "auto: flows that send small messages back and forth go on by " + autoKernel
	case auto && kernel.Reason != "":
		return userspace, "auto: " + autoKernel + " is not there: " + kernel.Reason
	case auto:
		return userspace, "auto: " + autoKernel + " is not there"
	case len(named) == 0:
		return userspace, "the configuration says so"
	}
	for _, d := range named {
		i := slices.IndexFunc(all, func(s DatapathStatus) bool { return s.Name == d.Name() })
		if i < 0 || all[i].Available {
			return d.Name(), why
		}
		why = cmp.Or(why, d.Name()+" takes no flows: "+all[i].Reason)
	}
	return userspace, why
}

// userspace is the datapath that is always there.
const userspace = "userspace"

// named are the datapaths to be tried before userspace, best first, where the
// configuration has that word: a flow that one refuses is offered to those behind
// it.
func (f *Front) named(word string) []datapath.Datapath {
	i := slices.IndexFunc(f.opts.Datapaths, func(d datapath.Datapath) bool { return d.Name() == word })
	if i < 0 {
		return nil
	}
	return f.opts.Datapaths[i:]
}

// has is an error where this machine can't offer the datapath of that word: whoever
// names one wants to know.
//
// f.mu is held.
func (f *Front) has(word string) error {
	if word == userspace || word == plan.Auto || f.named(word) != nil {
		return nil
	}
	reason := cmp.Or(f.missing[word], "this version does not have it")
	return fmt.Errorf("datapath %s is not available: %s: use `datapath: auto` to go on without it", word, reason)
}
