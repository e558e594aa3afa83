package server

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/tailsplice/tailsplice/userspace/announce"
	"github.com/tailsplice/tailsplice/userspace/health"
)

// orders are what an operator has said, and what else another process is to know. Fields that it does not
// know are left out: what must not be gets another name.
type orders struct {
	Drained  map[string]time.Time `json:"drained"`  // listeners
	Lingers  map[string]time.Time `json:"lingers"`  // those that still accept: see listener.until
	Disabled map[string]time.Time `json:"disabled"` // targets
	Woken    []*woken             `json:"woken"`    // containers that were started here

	Announced []announce.Spec `json:"announced"` // what others were told should get connections

	Shut   map[string]shut   `json:"shut,omitempty"`   // listeners that while_down has closed, and that were open before
	Checks []json.RawMessage `json:"checks,omitempty"` // each a health.Record
}

// shut is why a listener is closed by while_down.
type shut struct {
	Targets []string `json:"targets"` // of its default
	Why     string   `json:"why"`
}

// What Checks may have, in bytes: in all, and in a part of OrdersInParts.
const (
	mostChecks = 512 << 10
	partChecks = 32 << 10
)

// mostFirst is what the first part of OrdersInParts may have, in bytes: no message takes 64 KiB.
const mostFirst = 48 << 10

// Orders are what an operator has said that lasts until a restart, what is announced, which containers may be
// stopped, and what is known of targets that may be down, for Options.Orders of another process.
func (srv *Server) Orders() (json.RawMessage, error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return json.Marshal(srv.listOrders())
}

// OrdersInParts are Orders for the process that takes over: the first part is whole for one that knows no
// others, and a message takes each. Which containers are started from now on is told by TellLate.
func (srv *Server) OrdersInParts() (first json.RawMessage, more []json.RawMessage, err error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.wakes.collect(true)
	o := srv.listOrders()
	checks := o.Checks
	o.Checks = nil
	first, err = json.Marshal(o)
	if err == nil && len(first) > mostFirst {
		o.Shut = nil // which costs a check more, and the rest is of more use
		first, err = json.Marshal(o)
	}
	if err != nil {
		return nil, nil, err
	}
	for len(checks) > 0 {
		n, size := 1, len(checks[0])
		for n < len(checks) && size+len(checks[n]) <= partChecks {
			size += len(checks[n])
			n++
		}
		part, err := json.Marshal(orders{Checks: checks[:n]})
		if err != nil {
			return nil, nil, err
		}
		more, checks = append(more, part), checks[n:]
	}
	return first, more, nil
}

// TellLate calls send with what has come to the orders since OrdersInParts, and was not sent yet, for
// AddOrders of the other process. Where send fails that is sent again when TellLate is called next.
func (srv *Server) TellLate(send func(late json.RawMessage) error) {
	for late := srv.wakes.takeLate(); len(late) > 0; late = srv.wakes.takeLate() {
		b, _ := json.Marshal(orders{Woken: late}) // which has nothing that can't be written
		if send(b) != nil {
			srv.wakes.putBack(late)
			return
		}
	}
}

// AddOrders takes what TellLate of another process has sent.
func (srv *Server) AddOrders(late json.RawMessage) error {
	var o orders
	err := json.Unmarshal(late, &o)
	if err == nil {
		srv.wakes.adopt(o.Woken, srv.lapse)
		srv.opts.moved()
	}
	return err
}

// inherit takes the orders of another process. What is wrong with one of the checks is no reason to do
// without the rest.
//
// +checklocks:srv.mu
func (srv *Server) inherit(first json.RawMessage, more []json.RawMessage) error {
	if err := json.Unmarshal(first, &srv.orders); err != nil {
		return err
	}
	checks := srv.orders.Checks
	for _, part := range more {
		var o orders
		if err := json.Unmarshal(part, &o); err != nil {
			srv.log.Debug("a part of what another process has sent is not used", "err", err)
		}
		checks = append(checks, o.Checks...)
	}
	var found []health.Record
	for _, b := range checks {
		var r health.Record
		if err := json.Unmarshal(b, &r); err != nil {
			srv.log.Debug("what another process has found of a target is not used", "err", err)
		} else {
			found = append(found, r)
		}
	}
	srv.health.Inherit(found)
	srv.disabled.SetAll(srv.orders.Disabled)
	srv.wakes.adopt(srv.orders.Woken, srv.lapse)
	srv.announced = srv.orders.Announced
	return nil
}

// listOrders are the orders as they are now.
//
// +checklocks:srv.mu
func (srv *Server) listOrders() orders {
	o := orders{Drained: map[string]time.Time{}, Lingers: map[string]time.Time{}, Disabled: srv.disabled.Since(), Woken: srv.wakes.list(),
		Announced: slices.Clone(srv.announced), Shut: map[string]shut{}}
	for name, l := range srv.listeners {
		if l.gate != nil && l.isShut && l.wasOpen {
			s := shut{Targets: l.defaultTargets()}
			if why := l.gate.closed(); why != nil {
				s.Why = health.Brief(why)
			}
			o.Shut[name] = s
		}
		if l.announcer != nil {
			if isUp, _, _ := l.announcer.State(); isUp {
				o.Announced = append(o.Announced, l.announcer.Spec())
			}
		}
		if !l.drained.IsZero() {
			o.Drained[name] = l.drained
			if l.lingers {
				o.Lingers[name] = l.until
			}
		}
	}
	size := 0
	for _, r := range srv.health.Records() {
		b, err := json.Marshal(r)
		if size += len(b); err == nil && len(b) <= partChecks && size <= mostChecks {
			o.Checks = append(o.Checks, b)
		}
	}
	return o
}
