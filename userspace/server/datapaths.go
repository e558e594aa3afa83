package server

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// Offer has flows of `datapath: auto` offered to d from now on when they are ping-pong, behind the datapaths
// that were given before. Safe for concurrent use. d must not be closed before the Server.
func (srv *Server) Offer(d datapath.Returner) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	var auto []datapath.Returner
	if old := srv.auto.Load(); old != nil {
		auto = slices.Clone(*old)
	}
	auto = append(auto, d)
	srv.auto.Store(&auto)
}

// Lacks says why a datapath can't be had by its name. Safe for concurrent use.
func (srv *Server) Lacks(name, why string) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.missing[name] = why
}

// named are the datapaths to be tried before userspace, best first, where the configuration has that word: a
// flow that one refuses is offered to those behind it.
func (srv *Server) named(word string) []datapath.Datapath {
	i := slices.IndexFunc(srv.opts.Datapaths, func(d datapath.Datapath) bool { return d.Name() == word })
	if i < 0 {
		return nil
	}
	return srv.opts.Datapaths[i:]
}

// has gives a function that says why this machine can't offer the datapath of a word, nil if it can: whoever
// names one wants to know. missing says of each datapath that is not there why.
func (srv *Server) has(missing map[string]string) func(word string) error {
	return func(word string) error {
		if word == userspace || word == plan.Auto || srv.named(word) != nil {
			return nil
		}
		reason := cmp.Or(missing[word], "this version does not have it")
		return fmt.Errorf("datapath %s is not available: %s: use `datapath: auto` to go on without it", word, reason)
	}
}

// datapaths are those that work: named ones, and those for auto.
func (srv *Server) datapaths() []datapath.Datapath {
	all := slices.Clone(srv.opts.Datapaths)
	if auto := srv.auto.Load(); auto != nil {
		for _, d := range *auto {
			if !slices.Contains(all, datapath.Datapath(d)) {
				all = append(all, d)
			}
		}
	}
	return all
}

// A waiter is a datapath that the configuration may name, and that may not be there yet: it refuses flows
// until it is, and Health says why.
type waiter interface {
	Waits() bool
}

func waits(d datapath.Datapath) bool {
	w, ok := d.(waiter)
	return ok && w.Waits()
}

// Clamper is a datapath that bounds what a flow holds in the kernel by cutting the payload off segments,
// whose senders send it again.
type Clamper interface {
	// ClampedSegments is how many it has cut off since its start.
	ClampedSegments() uint64
}

// autoKernel is the datapath of the kernel that plan.Auto may choose.
const autoKernel = "sockmap"

// userspace is the datapath that is always there.
const userspace = "userspace"

// isWanted reports whether flows are to have a datapath, by its name or by auto.
func isWanted(n plan.Needs, name string) bool {
	return n.Datapaths[name] || name == autoKernel && n.Datapaths[plan.Auto]
}

// datapathStates are the datapaths that a configuration may name, by name.
//
// +checklocks:srv.mu
func (srv *Server) datapathStates() []DatapathStatus {
	needs := srv.plan.Needs
	all := []DatapathStatus{{Name: userspace, Available: true, Wanted: true}}
	there := map[string]bool{}
	for _, d := range srv.datapaths() {
		there[d.Name()] = true
		s := DatapathStatus{Name: d.Name(), Available: true, Wanted: isWanted(needs, d.Name())}
		if h, ok := d.(datapath.Health); ok {
			s.Reason, s.Stalls = h.Health()
			s.Available = s.Reason == ""
			s.SwitchedOff = !s.Available && !waits(d)
		}
		if c, ok := d.(Clamper); ok {
			s.Clamped = c.ClampedSegments()
		}
		all = append(all, s)
	}
	for name, why := range srv.missing {
		if !there[name] {
			all = append(all, DatapathStatus{Name: name, Reason: why, Wanted: isWanted(needs, name)})
		}
	}
	slices.SortFunc(all, func(a, b DatapathStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// via names the datapath that a flow of r begins with now, and says why it is not another one. named are
// those of its word.
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
