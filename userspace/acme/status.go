package acme

import (
	"cmp"
	"slices"
	"time"
)

// States of a name.
const (
	StateValid     = "valid"     // served, and nothing to do
	StateObtaining = "obtaining" // its first certificate is on its way
	StateRenewing  = "renewing"  // served, and the next one is on its way
	StateFailing   = "failing"   // the last attempt failed: see Problem and NextTry
	StateExpired   = "expired"   // what is served has expired: see Problem
)

// Status is one name's.
type Status struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	OnDemand bool      `json:"on_demand,omitempty"`
	CA       string    `json:"ca,omitempty"` // directory URL that the certificate is from
	NotAfter time.Time `json:"not_after,omitzero"`
	RenewAt  time.Time `json:"renew_at,omitzero"`
	Problem  string    `json:"problem,omitempty"`  // what the last attempt failed for, and what to do
	Attempts int       `json:"attempts,omitempty"` // that failed since the last success
	NextTry  time.Time `json:"next_try,omitzero"`
}

// Status lists the names of a section, and those on demand that were asked for, by name.
func (s *Source) Status() []Status {
	var sites []*site
	t := s.m.table.Load()
	for name := range s.names {
		if site := t.sites[name]; site != nil {
			sites = append(sites, site)
		}
	}
	s.m.mu.Lock()
	for name, site := range s.m.dynamic {
		if s.demand.allows(name) != nil {
			sites = append(sites, site)
		}
	}
	s.m.mu.Unlock()
	out := make([]Status, 0, len(sites))
	for _, site := range sites {
		out = append(out, site.status())
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (s *site) status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Name: s.name, OnDemand: s.onDemand.Load(), Problem: s.problem, Attempts: s.failures, State: StateObtaining}
	if s.failures > 0 {
		st.NextTry = s.nextTry
	}
	c := s.cert.Load()
	if c != nil {
		st.NotAfter, st.RenewAt, st.State = c.Leaf.NotAfter, s.renewAt(), StateValid
		if s.issuer != nil {
			st.CA = s.issuer.ca.Directory
		}
	}
	switch {
	case c != nil && time.Now().After(c.Leaf.NotAfter):
		st.State = StateExpired
	case s.problem != "":
		st.State = StateFailing
	case c != nil && s.trying:
		st.State = StateRenewing
	}
	return st
}
