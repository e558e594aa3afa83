package server

import (
	"errors"
	"maps"
	"net/url"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// Disabled is what `tailsplice target disable --json` and `tailsplice target enable --json` print.
type Disabled struct {
	Format int `json:"format_version"` // flow.FormatVersion
	DisabledTarget
	Flows int `json:"flows"` // to it alone that live; they go on
}

// DisabledTarget is a target that an operator has disabled, or enabled.
type DisabledTarget struct {
	Target string    `json:"target"`
	Since  time.Time `json:"disabled,omitzero"` // not there: it is enabled
}

// SetDisabled lets no new connection go to a target, or lets them go there again: to clients it is as one
// that does not answer. Flows go on. query has target=TARGET, as [Server.Status] writes it. It lasts over
// reloads, also where they leave the target out, and not over a restart. The error says that there is no such
// target.
func (srv *Server) SetDisabled(query url.Values, disabled bool) (Disabled, error) {
	target := query.Get("target")
	srv.mu.Lock()
	there := srv.targetNames()
	srv.mu.Unlock()
	if target == "" {
		return Disabled{}, errors.New("name a target: `tailsplice status` lists them")
	}
	if !slices.Contains(there, target) && (disabled || !srv.disabled.Has(target)) {
		return Disabled{}, noSuch("target", target, there)
	}
	srv.disabled.Set(target, disabled)
	d := Disabled{Format: flow.FormatVersion, DisabledTarget: DisabledTarget{target, srv.disabled.Since()[target]}}
	for _, f := range srv.flows.Live() {
		if f.Target == target {
			d.Flows++
		}
	}
	return d, nil
}

// targetNames are the targets of the routes that are in force, sorted.
//
// +checklocks:srv.mu
func (srv *Server) targetNames() []string {
	all := map[string]bool{}
	for _, l := range srv.listeners {
		for _, r := range l.service.Load().Rules {
			for _, name := range targetsOf(r) {
				all[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// targetsOf are the targets of r, as they are written.
func targetsOf(r *plan.Rule) (names []string) {
	if r.Label != nil { // not by its ids
		return []string{r.Written}
	}
	for _, to := range r.All {
		names = append(names, to.To.String())
	}
	return names
}

// disabledTargets are those that an operator has disabled, sorted.
func (srv *Server) disabledTargets() (all []DisabledTarget) {
	since := srv.disabled.Since()
	for _, target := range slices.Sorted(maps.Keys(since)) {
		all = append(all, DisabledTarget{target, since[target]})
	}
	return all
}
