package front

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// lookAtLabels makes followLabels look again, soon.
func (f *Front) lookAtLabels() {
	select {
	case f.labelsMoved <- struct{}{}:
	default:
	}
}

// followLabels keeps the routes as the labels are until ctx ends. No flow is
// touched: each has the service that it began with.
func (f *Front) followLabels(ctx context.Context) {
	expire := time.NewTimer(0)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.labelsMoved:
		case <-expire.C:
		}
		if again := f.applyLabels(); again > 0 {
			expire.Reset(again)
		}
	}
}

// applyLabels brings the routes in line with the labels once. again is when the
// next removed container is forgotten, 0 if there is none.
func (f *Front) applyLabels() (again time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0
	}
	f.useLabels(f.containers.Labelled())
	return f.plan.Labels.Forgets()
}

// useLabels makes the routes of these labels the ones in force.
//
// f.mu is held.
func (f *Front) useLabels(seen []container.Labelled) {
	before := f.plan
	f.plan = before.WithLabels(before.Labels, seen)
	for name, s := range f.plan.Services {
		if s != before.Services[name] {
			with := *f.listeners[name].service.Load()
			with.Service = s
			f.listeners[name].service.Store(&with)
		}
	}
	f.tellLabels(before)
	f.countRoutes()
}

// tellLabels logs what is new in the labels' routes since before, which is in force
// no more. It is nil at the start.
//
// f.mu is held.
func (f *Front) tellLabels(before *plan.Plan) {
	type line struct{ listener, route, container, target string }
	lines := func(p *plan.Plan) map[line]bool {
		out := map[line]bool{}
		for name, s := range p.Services {
			for _, r := range s.Rules {
				if r.Label != nil {
					out[line{name, r.Name, r.Label.Container, r.Written}] = true
				}
			}
		}
		return out
	}
	log := func(msg string, in, notIn map[line]bool) {
		for l := range in {
			if !notIn[l] {
				f.log.Info(msg, "listener", l.listener, "route", l.route, "container", l.container, "target", l.target)
			}
		}
	}
	if before == nil {
		before = &plan.Plan{Labels: new(plan.Labels)}
	} else {
		defer before.Labels.End()
	}
	was, is := lines(before), lines(f.plan)
	log("a route from a container's labels was removed", was, is)
	log("a route from a container's labels was added", is, was)
	for _, p := range f.plan.Labels.Problems {
		if !slices.Contains(before.Labels.Problems, p) {
			f.log.Warn("a container's label is ignored", "container", p.Container, "label", p.Label, "listener", p.Listener, "problem", p.Problem)
		}
	}
}

// dialLabelled connects to the container of a rule by labels. A container that
// was killed a moment ago may leave a dial to it without any answer: once the
// containers have changed, it begins anew, and learns that.
func dialLabelled(ctx context.Context, r *plan.Rule, client netip.Addr) (net.Conn, error) {
	attempt, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.Label.Current, cancel)()
	up, err := r.Dialer.Dial(attempt, r.To, client)
	if err != nil && attempt.Err() != nil && ctx.Err() == nil {
		return r.Dialer.Dial(ctx, r.To, client)
	}
	return up, err
}
