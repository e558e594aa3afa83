package server

import (
	"encoding/json"
	"maps"
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

	Shut   map[string]shut   `json:"shut,omitempty"`   // open listeners that while_down has closed
	Checks []json.RawMessage `json:"checks,omitempty"` // each a health.Record
}

// shut is why a listener is closed by while_down.
type shut struct {
	Targets []string `json:"targets"` // of its default
	Why     string   `json:"why"`
}

const (
	// mostChecks is what Checks may have, in bytes.
	mostChecks = 512 << 10
	// mostFirst is what the first part of OrdersInParts may have, and mostPart another one, in bytes: no
	// message takes 64 KiB.
	mostFirst = 48 << 10
	mostPart  = 32 << 10
)

// Orders are what an operator has said that lasts until a restart, what is announced, which containers may be
// stopped, and what is known of targets that may be down, for Options.Orders of another process.
func (srv *Server) Orders() (json.RawMessage, error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return json.Marshal(srv.listOrders())
}

// OrdersInParts are Orders for the process that takes over, of which a message takes each part. The first has
// what is of most use, and all but the checks as a rule: there are processes that know no others. Which
// containers are started from now on is told by TellLate.
func (srv *Server) OrdersInParts() (first json.RawMessage, more []json.RawMessage, err error) {
	var part orders
	size, most := 0, mostFirst
	end := func() error {
		b, err := json.Marshal(part)
		more = append(more, b)
		part, size, most = orders{}, 0, mostPart
		return err
	}
	for _, one := range srv.lastOrders().each() {
		b, err := json.Marshal(one)
		if err != nil {
			return nil, nil, err
		}
		if len(b) > mostPart {
			srv.log.Warn("something that the next process should know is too long", "bytes", len(b))
			continue
		}
		if size+len(b) > most || len(more) == 0 && one.Checks != nil {
			if err := end(); err != nil {
				return nil, nil, err
			}
		}
		size += len(b)
		part.add(one)
	}
	if err := end(); err != nil {
		return nil, nil, err
	}
	return more[0], more[1:], nil
}

// lastOrders are the orders that TellLate adds to.
func (srv *Server) lastOrders() orders {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.wakes.collect(true)
	return srv.listOrders()
}

// each are o one by one, what is of most use first.
func (o orders) each() (all []orders) {
	for name, at := range o.Drained {
		one := orders{Drained: map[string]time.Time{name: at}}
		if until, lingers := o.Lingers[name]; lingers {
			one.Lingers = map[string]time.Time{name: until}
		}
		all = append(all, one)
	}
	for name, at := range o.Disabled {
		all = append(all, orders{Disabled: map[string]time.Time{name: at}})
	}
	for _, s := range o.Announced {
		all = append(all, orders{Announced: []announce.Spec{s}})
	}
	for _, w := range o.Woken {
		all = append(all, orders{Woken: []*woken{w}})
	}
	for name, s := range o.Shut {
		all = append(all, orders{Shut: map[string]shut{name: s}})
	}
	for _, c := range o.Checks {
		all = append(all, orders{Checks: []json.RawMessage{c}})
	}
	return all
}

// add takes what p has.
func (o *orders) add(p orders) {
	o.Drained, o.Lingers = merged(o.Drained, p.Drained), merged(o.Lingers, p.Lingers)
	o.Disabled, o.Shut = merged(o.Disabled, p.Disabled), merged(o.Shut, p.Shut)
	o.Woken, o.Announced = append(o.Woken, p.Woken...), append(o.Announced, p.Announced...)
	o.Checks = append(o.Checks, p.Checks...)
}

// merged is to, or another map, with what from has.
func merged[V any](to, from map[string]V) map[string]V {
	if to == nil && len(from) > 0 {
		return maps.Clone(from)
	}
	maps.Copy(to, from)
	return to
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

// inherit takes the orders of another process. What is wrong with another part than the first, or with one of
// the checks, is no reason to do without the rest.
//
// +checklocks:srv.mu
func (srv *Server) inherit(first json.RawMessage, more []json.RawMessage) error {
	if err := json.Unmarshal(first, &srv.orders); err != nil {
		return err
	}
	for _, part := range more {
		var o orders
		if err := json.Unmarshal(part, &o); err != nil {
			srv.log.Debug("a part of what another process has sent is not used", "err", err)
		}
		srv.orders.add(o)
	}
	var found []health.Record
	for _, b := range srv.orders.Checks {
		var r health.Record
		if err := json.Unmarshal(b, &r); err != nil {
			srv.log.Debug("what another process has found of a target is not used", "err", err)
		} else {
			found = append(found, r)
		}
	}
	srv.health.Inherit(found)
	srv.orders.Checks = nil
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
		if size += len(b); err == nil && len(b) < mostPart-1<<10 && size <= mostChecks {
			o.Checks = append(o.Checks, b)
		}
	}
	return o
}
