package server

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// followLabels keeps the routes as the labels are until ctx ends. No flow is touched: each has the service
// that it began with.
func (srv *Server) followLabels(ctx context.Context) {
	expire := time.NewTimer(0)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-srv.labelsMoved:
		case <-expire.C:
		}
		if again := srv.applyLabels(); again > 0 {
			expire.Reset(again)
		}
	}
}

// applyLabels brings the routes in line with the labels once. again is when the next removed container is
// forgotten, 0 if there is none.
func (srv *Server) applyLabels() (again time.Duration) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isClosed {
		return 0
	}
	srv.useLabels(srv.containers.Labelled())
	return srv.plan.Labels.Forgets()
}

// useLabels makes the routes of these labels the ones in force.
//
// +checklocks:srv.mu
func (srv *Server) useLabels(seen []container.Labelled) {
	before := srv.plan
	srv.plan = before.WithLabels(before.Labels, seen)
	for name, s := range srv.plan.Services {
		if s != before.Services[name] {
			with := *srv.listeners[name].service.Load()
			with.Service = s
			srv.listeners[name].service.Store(&with)
		}
	}
	srv.tellLabels(before)
	srv.countRoutes()
}

// tellLabels logs what is new in the labels' routes since before, which is in force no more. It is nil at the
// start.
//
// +checklocks:srv.mu
func (srv *Server) tellLabels(before *plan.Plan) {
	if before == nil {
		before = &plan.Plan{Labels: new(plan.Labels)}
	} else {
		defer before.Labels.End()
	}
	was, is := labelRoutes(before), labelRoutes(srv.plan)
	for r := range was {
		if !is[r] {
			srv.log.Info("a route from a container's labels was removed", "listener", r.listener, "route", r.route, "container", r.container, "target", r.target)
		}
	}
	for r := range is {
		if !was[r] {
			srv.log.Info("a route from a container's labels was added", "listener", r.listener, "route", r.route, "container", r.container, "target", r.target)
		}
	}
	for _, p := range srv.plan.Labels.Problems {
		if !slices.Contains(before.Labels.Problems, p) {
			srv.log.Warn("a container's label is ignored", "container", p.Container, "label", p.Label, "listener", p.Listener, "problem", p.Problem)
		}
	}
}

type labelRoute struct{ listener, route, container, target string }

// labelRoutes are the routes of p that labels make.
func labelRoutes(p *plan.Plan) map[labelRoute]bool {
	out := map[labelRoute]bool{}
	for name, s := range p.Services {
		for _, r := range s.Rules {
			if r.Label != nil {
				out[labelRoute{name, r.Name, r.Label.Container, r.Written}] = true
			}
		}
	}
	return out
}

// dialLabelled connects to the container of a rule by labels. A container that was killed a moment ago may
// leave a dial to it without any answer: once the containers have changed, it begins anew, and learns that.
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
