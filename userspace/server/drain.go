package server

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// Drained is what `tailsplice drain --json` and `tailsplice undrain --json` print.
type Drained struct {
	Format    int               `json:"format_version"` // flow.FormatVersion
	Listeners []DrainedListener `json:"listeners"`      // that were named
}

// DrainedListener is a listener that was drained, or is no more.
type DrainedListener struct {
	Name  string    `json:"name"`
	Since time.Time `json:"drained,omitzero"` // when it was drained; not there: it is not
	Flows int       `json:"flows"`            // that it has now
	Bound []string  `json:"bound"`            // addresses that are bound now
	Shut  string    `json:"closed,omitempty"` // why while_down has closed it
}

// SetDrained closes the sockets of a listener, or of all, or opens them again. Where others are told that a
// listener should get connections, that is withdrawn first, and its sockets close after its grace. Flows go
// on. A reload leaves the listener drained, a restart does not. query has listener=NAME or all. The error
// says that there is no such listener, or that one is drained no more and can't be bound yet, which is tried
// again.
func (srv *Server) SetDrained(query url.Values, drained bool) (Drained, error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isClosed || srv.isEnding {
		return Drained{}, errors.New("the daemon is stopping: all of its listeners are closed")
	}
	names, err := srv.listenersOf(query)
	if err != nil {
		return Drained{}, err
	}
	var graces []func()
	for _, name := range names {
		l := srv.listeners[name]
		switch {
		case !drained:
			l.drained, l.lingers, l.until = time.Time{}, false, time.Time{}
		case l.drained.IsZero():
			l.drained = time.Now()
			graces = append(graces, srv.linger(l, l.drained))
		}
	}
	srv.rebindNow(srv.tailnetErr)
	for _, grace := range graces {
		go grace()
	}
	if srv.lacksAddresses() {
		srv.addressesMoved.wake()
	}
	d := Drained{Format: flow.FormatVersion}
	var errs []error
	for _, name := range names {
		d.Listeners = append(d.Listeners, srv.drainedListener(srv.listeners[name]))
		for lacking, err := range srv.unbound {
			if lacking.listener == name {
				errs = append(errs, fmt.Errorf("listener %q is not drained, and can't be bound yet: it is tried again each second: %w", name, err))
			}
		}
	}
	return d, errors.Join(errs...)
}

// listenersOf are the names of the listeners that query chooses.
//
// +checklocks:srv.mu
func (srv *Server) listenersOf(query url.Values) (names []string, err error) {
	for _, c := range srv.plan.Config.Listeners {
		names = append(names, c.Name)
	}
	name := query.Get("listener")
	switch {
	case query.Has("all"):
		return names, nil
	case name == "":
		return nil, errors.New("name a listener, or all: there are " + strings.Join(names, ", "))
	case slices.Contains(names, name):
		return []string{name}, nil
	}
	return nil, noSuch("listener", name, names)
}

// noSuch is an error of a name that is none of those that there are.
func noSuch(what, name string, there []string) error {
	nearest := ""
	if n := spelling.Nearest(name, there); n != "" {
		nearest = fmt.Sprintf(", did you mean %q?", n)
	}
	if len(there) == 0 {
		return fmt.Errorf("there is no %s %q, and no other", what, name)
	}
	return fmt.Errorf("there is no %s %q%s: there are %s", what, name, nearest, strings.Join(there, ", "))
}

// drainedListener is what is said of l.
//
// +checklocks:srv.mu
func (srv *Server) drainedListener(l *listener) DrainedListener {
	d := DrainedListener{Name: l.name, Since: l.drained, Bound: srv.boundOf(l)}
	for _, f := range srv.flows.Live() {
		if f.Listener == l.name {
			d.Flows++
		}
	}
	if err := l.gate.closed(); err != nil {
		d.Shut = err.Error()
	}
	return d
}

// boundOf are the addresses of l that are bound now.
//
// +checklocks:srv.mu
func (srv *Server) boundOf(l *listener) []string {
	all := []string{}
	for _, s := range srv.sockets {
		if s.owner.Load() == l {
			all = append(all, s.bound())
		}
	}
	slices.Sort(all)
	return all
}

// drainedNames are the listeners that are drained, and whether there is no other.
//
// +checklocks:srv.mu
func (srv *Server) drainedNames() (names []string, isAll bool) {
	isAll = true
	for _, c := range srv.plan.Config.Listeners {
		if srv.listeners[c.Name].drained.IsZero() {
			isAll = false
		} else {
			names = append(names, c.Name)
		}
	}
	return names, isAll
}
