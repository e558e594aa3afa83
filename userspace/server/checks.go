package server

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// targetDownReason is the reason for which flows are counted as cut whose target is down.
const targetDownReason = "target_down"

// targetDown ends the flows of a target that health checks have found down, where their routes want that.
func (srv *Server) targetDown(c *health.Check, why error) {
	srv.mu.Lock()
	of := map[flow.Route]bool{}
	for _, l := range srv.listeners {
		for _, r := range l.service.Load().Rules {
			for _, one := range targetRules(r) {
				if r.ResetDown && one.Check == c {
					of[flow.Route{Listener: l.name, Route: r.Name}] = true
				}
			}
		}
	}
	srv.mu.Unlock()
	why = fmt.Errorf("on_down: reset: the target is down: %w", why)
	killed := 0
	for _, f := range srv.flows.Live() {
		if f.Killer != nil && f.Target == c.Target && of[flow.Route{Listener: f.Listener, Route: f.Route}] {
			f.Killer.Kill(why)
			killed++
		}
	}
	if killed > 0 {
		srv.metrics.Cut.WithLabelValues(targetDownReason).Add(float64(killed))
	}
}

// checksOfFlows are the checks by which flows may end that live.
//
// +checklocks:srv.mu
func (srv *Server) checksOfFlows() (all []*health.Check) {
	for _, l := range srv.listeners {
		for _, r := range l.service.Load().Rules {
			for _, one := range targetRules(r) {
				if r.ResetDown && one.Check != nil {
					all = append(all, one.Check)
				}
			}
		}
	}
	return all
}

// TargetHealth is what health checks have found of a target.
type TargetHealth struct {
	Check string `json:"check"` // connect, tls or http
	Up    bool   `json:"up"`
	// when it went down, came back, or was checked first; not there: it was not yet
	Since time.Time `json:"since,omitzero"`
	// percent of its weight that it has: less than 100 after it has come back
	Share int `json:"share"`
	// it stays down so long at least, because it has gone down again and again
	Until time.Time `json:"until,omitzero"`
	Error string    `json:"error,omitempty"`
}

// healthOf describes what checks r's only target; nil where nothing does.
func healthOf(r *plan.Rule) *TargetHealth {
	if r.Check == nil {
		return nil
	}
	s := r.Check.Status()
	h := &TargetHealth{Check: r.Check.Kind, Up: !s.Down, Since: s.Since, Share: s.Share, Until: s.Until}
	if s.Err != nil {
		h.Error = s.Err.Error()
	}
	return h
}

// targetStates are the targets that the metrics show: those that were connected to or that are checked. One
// that is checked is up while all of its checks say so.
func (srv *Server) targetStates() (all []metrics.Target) {
	of := map[string]*metrics.Target{}
	made := srv.targets.Counts()
	for name, err := range srv.targets.Last() {
		of[name] = &metrics.Target{Name: name, Up: err == nil, Connections: made[name]}
	}
	for _, c := range srv.health.Running() {
		t := of[c.Target]
		if t == nil {
			t = &metrics.Target{Name: c.Target}
			of[c.Target] = t
		}
		t.Up = !c.IsDown() && (t.Up || t.Checks == nil)
		if t.Checks == nil {
			t.Checks = map[string]int64{}
		}
		t.Checks["ok"] += c.Succeeded.Load()
		t.Checks["failed"] += c.Failed.Load()
		t.Checks["unclear"] += c.Unclear.Load()
	}
	for _, name := range slices.Sorted(maps.Keys(of)) {
		all = append(all, *of[name])
	}
	return all
}

// targetRules are r's targets, each as a rule that has it alone.
func targetRules(r *plan.Rule) []*plan.Rule {
	if r.Several == nil {
		return []*plan.Rule{r}
	}
	return r.Several
}
