package flow

import (
	"cmp"
	"slices"
	"sync/atomic"
)

// MostRoutes bounds the routes counted by name: whoever starts containers chooses the names of some.
const MostRoutes = 1000

// OtherRoutes is what routes beyond MostRoutes are counted as, for each listener.
const OtherRoutes = "other"

// Account is what flows are counted in: that of a route, or that of a whole listener.
type Account struct {
	Listener, Route string // Route is "" for the listener's own

	// Of requests, which are no flows of the registry, while they are under way. Only of a route.
	Requests, Up, Down atomic.Int64

	// Guarded by Registry.mu.
	listener *Account // that of the whole listener; nil if this is it
	current  bool     // the configuration has it
	live     int
	up, down int64 // of flows that have ended
	// What was shown last: a count may not go back, where a datapath counts less in the end than before.
	shownUp, shownDown int64
	index              int // in accounts.all
}

func (a *Account) add(up, down int64) {
	a.up, a.down = a.up+up, a.down+down
	if a.listener != nil {
		a.listener.add(up, down)
	}
}

// accounts are all accounts of a registry.
type accounts struct {
	all   []*Account
	named map[Route]*Account
	count int // of those in all that MostRoutes bounds
}

// Route names a route for counting.
type Route struct{ Listener, Route string }

// Account is what flows of a route are counted in. With an empty route it is that of the whole listener.
func (r *Registry) Account(listener, route string) *Account {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accounts.of(Route{listener, route})
}

func (s *accounts) of(key Route) *Account {
	if a := s.named[key]; a != nil {
		return a
	}
	bounded := key.Route != "" && key.Route != OtherRoutes
	if bounded && s.count >= MostRoutes {
		return s.of(Route{key.Listener, OtherRoutes})
	}
	a := &Account{Listener: key.Listener, Route: key.Route}
	if key.Route != "" {
		a.listener = s.of(Route{key.Listener, ""})
	}
	a.index = len(s.all)
	s.all, s.named[key] = append(s.all, a), a
	if bounded {
		s.count++
	}
	return a
}

// Configured says which routes there are from now on, so that they are counted before others. Those that are
// gone, and whose flows have ended, make room if there is too little. dropped are those that did.
func (r *Registry) Configured(routes []Route) (dropped []Route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.accounts
	for _, a := range s.all {
		a.current = false
	}
	missing := 0
	for _, key := range routes {
		if a := s.named[key]; a != nil {
			a.current = true
		} else {
			missing++
		}
	}
	if s.count+missing > MostRoutes {
		s.all = slices.DeleteFunc(s.all, func(a *Account) bool {
			if a.current || a.live > 0 || a.Requests.Load() > 0 || a.Route == "" || a.Route == OtherRoutes {
				return false
			}
			key := Route{a.Listener, a.Route}
			dropped = append(dropped, key)
			delete(s.named, key)
			return true
		})
		s.count -= len(dropped)
		for i, a := range s.all {
			a.index = i
		}
	}
	for _, key := range routes {
		s.of(key).current = true
	}
	return dropped
}

// Traffic is what was counted in an account until now.
type Traffic struct {
	Listener, Route string // Route is "" for the whole listener
	Live            int    // flows or requests; 0 for the whole listener
	Up, Down        int64  // bytes, also those of what lives
}

// Traffic says what was counted until now, by listener and route, and how many of the live flows each
// datapath has. Nobody waits for it longer than it takes to copy two lists.
func (r *Registry) Traffic() (all []Traffic, datapaths map[string]int) {
	// What ends after the copy still has its bytes, and is not in the copy's sums: everything counts once.
	type part struct {
		f     *Flow
		index int // of its account; -1: none
	}
	r.mu.Lock()
	accounts := slices.Clone(r.accounts.all)
	all = make([]Traffic, len(accounts))
	whole := make([]int, len(accounts)) // index of the listener's account
	for i, a := range accounts {
		all[i] = Traffic{Listener: a.Listener, Route: a.Route, Live: a.live, Up: a.up, Down: a.down}
		whole[i] = -1
		if a.listener != nil {
			whole[i] = a.listener.index
		} else {
			all[i].Live = 0
		}
	}
	live := make([]part, len(r.live))
	for i, f := range r.live {
		live[i] = part{f, -1}
		if f.Account != nil {
			live[i].index = f.Account.index
		}
	}
	r.mu.Unlock()
	datapaths = map[string]int{}
	for _, p := range live {
		datapaths[p.f.datapath()]++
		up, down := p.f.bytes()
		for i := p.index; i >= 0; i = whole[i] {
			all[i].Up, all[i].Down = all[i].Up+up, all[i].Down+down
		}
	}
	for i, a := range accounts {
		all[i].Live += int(a.Requests.Load())
		all[i].Up, all[i].Down = all[i].Up+a.Up.Load(), all[i].Down+a.Down.Load()
	}
	r.mu.Lock()
	for i, a := range accounts {
		a.shownUp, a.shownDown = max(a.shownUp, all[i].Up), max(a.shownDown, all[i].Down)
		all[i].Up, all[i].Down = a.shownUp, a.shownDown
	}
	r.mu.Unlock()
	slices.SortFunc(all, func(a, b Traffic) int {
		return cmp.Or(cmp.Compare(a.Listener, b.Listener), cmp.Compare(a.Route, b.Route))
	})
	return all, datapaths
}
