package server

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/deny"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// Reload changes over to cfg without closing a flow. With an error nothing has changed. What New would go on
// without is an error here, unless the daemon does without it already: whoever changes a configuration is
// there to hear it.
func (srv *Server) Reload(cfg *config.Config) error {
	err := srv.apply(cfg)
	result := "ok"
	if err != nil {
		result = "error"
	}
	srv.metrics.Reloads.WithLabelValues(result).Inc()
	return err
}

// apply compiles cfg, opens what it needs, and only then swaps.
func (srv *Server) apply(cfg *config.Config) error {
	places, err := findPlaces(srv.ctx, cfg) // before the lock: a name server may be slow
	if err != nil {
		return err
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isClosed || srv.isEnding {
		return errors.New("the daemon is shutting down")
	}
	if srv.isFrozen {
		return errHandover
	}
	c := &change{starts: srv.plan == nil, places: places}
	if err := srv.prepare(c, cfg); err != nil {
		c.undo()
		return err
	}
	srv.swap(c)
	if c.starts {
		if err := srv.nothingServes(); err != nil {
			return err
		}
	}
	if srv.lacksAddresses() {
		srv.addressesMoved.wake()
	}
	return nil
}

// A change is a configuration on its way into force: what is prepared of it.
type change struct {
	starts    bool // there was none before
	plan      *plan.Plan
	places    map[string]place
	listeners map[string]*listener
	swaps     []func() // change what the listeners have already; they can't fail

	denials   map[string]*denials
	denyFiles []*deny.File
	logs      map[string]*accesslog.Log
	freshLogs []*accesslog.Log // of logs
	bound

	memory                int64
	connections, requests int
}

// undo closes what was opened for c.
func (c *change) undo() {
	for _, s := range c.opened {
		s.Close()
	}
	for _, l := range c.freshLogs {
		l.Close()
	}
	closeFiles(c.denyFiles)
}

// prepare makes c of cfg, and changes nothing that serves. With an error the caller undoes it.
//
// +checklocks:srv.mu
func (srv *Server) prepare(c *change, cfg *config.Config) (err error) {
	deps := srv.deps
	deps.Datapath = srv.has(srv.missing)
	p, wrong := plan.Compile(cfg, deps)
	c.listeners, c.swaps, err = srv.prepareListeners(p, c.starts)
	if err := errors.Join(wrong, err); err != nil {
		return err
	}
	if c.denials, c.denyFiles, err = srv.openDenials(cfg, c.starts); err != nil {
		return err
	}
	if c.logs, c.freshLogs, err = srv.openLogs(cfg.File, p.Needs.AccessLogs, c.starts); err != nil {
		return err
	}
	var labels *plan.Labels // until now
	if !c.starts {
		labels = srv.plan.Labels
	}
	c.plan = p.WithLabels(labels, p.ListLabelled(srv.ctx))
	c.memory = memory.BudgetOf(cfg.Limits.Memory)
	c.connections, c.requests = srv.fitLimits(cfg, p.Needs, c.memory)
	var tailnetErr error
	if len(p.Needs.Listens) > 0 {
		var addrs []netip.Addr
		addrs, tailnetErr = selfAddrs(srv.ctx, srv.tailnet)
		srv.useTailnetAddrs(addrs)
	}
	c.bound = srv.bind(cfg, c.listeners, c.places, tailnetErr)
	if c.starts {
		return nil
	}
	return cmp.Or(srv.newClash(c.clashes), srv.mustBind(c.want, c.failed))
}

// swap brings c into force. Nothing of it fails.
//
// +checklocks:srv.mu
func (srv *Server) swap(c *change) {
	cfg, needs := c.plan.Config, c.plan.Needs
	srv.openReturnPath(needs.Transparent)
	srv.nodeName.Store(&cfg.Node)
	srv.hops.Store(hopsOf(cfg)) // before one of them comes: its flows may last
	for _, swap := range c.swaps {
		swap()
	}
	srv.swapServices(c)
	srv.rebind(c.want, c.opened)
	srv.places = c.places
	if srv.namesInterface() {
		srv.watchInterfaces.Do(func() { go srv.followInterfaces(srv.ctx) })
	}
	srv.bequeath(c)
	for name, old := range srv.listeners {
		if c.listeners[name] != old {
			old.retire(srv.ctx)
		}
	}
	srv.useLogs(c.logs)
	closeFiles(srv.denyFiles)
	srv.denyFiles = c.denyFiles
	srv.watchNeeded(needs)
	srv.memory.SetBudget(c.memory)
	srv.limiter.SetLimits(c.connections, cfg.Limits.ConnectionsPerSource)
	srv.requests.SetLimits(c.requests, cfg.Limits.RequestsPerSource)
	if r := cfg.Limits.NewConnectionsPerSource; r != nil {
		srv.newRate.Set(r.Every(), r.Burst)
	} else {
		srv.newRate.Set(0, 0)
	}
	before := srv.plan
	srv.plan, srv.listeners, srv.loaded = c.plan, c.listeners, time.Now()
	srv.health.Use(srv.ctx, c.plan.Checks())
	srv.tellLabels(before)
	srv.countRoutes()
	go srv.warnOfTailscaled(needs.Listens)
	srv.noteUnbound(c.bound)
	srv.watchDefaults()
	srv.tellOthers()
}

// swapServices gives the listeners of c what they do.
//
// +checklocks:srv.mu
func (srv *Server) swapServices(c *change) {
	var edges []*listener
	for _, l := range c.listeners {
		if l.mode == "sni" {
			edges = append(edges, l)
		}
	}
	for _, lc := range c.plan.Config.Listeners {
		s := &service{Service: c.plan.Services[lc.Name], deny: c.denials[lc.Name]}
		if a := c.plan.Config.AccessLogOf(lc); a != nil {
			s.accessLog = c.logs[logKey(a)]
		}
		if lc.Mode == "https" {
			s.edges = edges
		}
		l := c.listeners[lc.Name]
		l.service.Store(s)
		if l.http == nil && lc.IsHTTP() {
			l.http = srv.newHTTPServer(l, l.certs)
		}
	}
}

// prepareListeners returns the listeners of p: those that are there and go on, and new ones. swaps change
// those that go on; they can't fail. A new listener shows certificates without what can't be used if the
// daemon starts.
//
// +checklocks:srv.mu
func (srv *Server) prepareListeners(p *plan.Plan, starts bool) (all map[string]*listener, swaps []func(), err error) {
	all = map[string]*listener{}
	swap, err := srv.acme.Prepare(p.Needs.ACME)
	errs, swaps := []error{err}, []func(){swap}
	open := tlsterm.Load
	if starts {
		open = tlsterm.Open
	}
	for _, c := range p.Config.Listeners {
		l := srv.listeners[c.Name]
		if l == nil || l.mode != c.Mode {
			next := &listener{name: c.Name, mode: c.Mode, isShut: !srv.wereOpen[c.Name], drained: srv.orders.Drained[c.Name]}
			next.until, next.lingers = srv.orders.Lingers[c.Name]
			if l != nil {
				next.drained = l.drained
			}
			l = next
		}
		all[c.Name] = l
		s := p.Services[c.Name]
		switch {
		case c.Mode != "https" || s == nil:
			continue
		case l.certs != nil:
			swap, err = l.certs.Prepare(s.Certificates)
			swaps = append(swaps, swap)
		default:
			l.certs, err = open(s.Certificates, srv.log)
		}
		errs = append(errs, err)
	}
	return all, swaps, errors.Join(errs...)
}

// mustBind is an error of what can't be bound, and is no address of the tailnet or of an interface (it will
// be there later) nor one that this daemon does without already.
//
// +checklocks:srv.mu
func (srv *Server) mustBind(want []binding, failed map[string]error) error {
	var errs []error
	for _, b := range want {
		if err := failed[b.addr]; err != nil && !b.onTailnet && !b.onInterface && srv.unbound[lack{b.addr, b.owner.name}] == nil {
			errs = append(errs, fmt.Errorf("listener %q: %w", b.owner.name, err))
		}
	}
	return errors.Join(errs...)
}

// nothingServes says what is wrong where no listener can serve anybody, and none will by itself: who starts
// such a daemon is better told at once.
//
// +checklocks:srv.mu
func (srv *Server) nothingServes() error {
	var errs []error
	for _, c := range srv.plan.Config.Listeners {
		l := srv.listeners[c.Name]
		if l.certs != nil && !l.certs.Usable() {
			for _, cert := range l.certs.Certificates() {
				errs = append(errs, fmt.Errorf("listener %q: %s", c.Name, cert.Problem))
			}
		} else if unread := l.service.Load().deny.problems(c.Name); len(unread) > 0 {
			for _, p := range unread {
				errs = append(errs, errors.New(p.String()))
			}
		} else if !l.drained.IsZero() || c.WhileDown == whileDownClose || srv.mayServe(l, c.Listen) {
			return nil
		}
	}
	for c, err := range srv.unbound {
		errs = append(errs, fmt.Errorf("listener %q: %w", c.listener, err))
	}
	return errors.Join(errs...)
}

// mayServe reports whether l has an address, or may get one of those that it names at any time.
//
// +checklocks:srv.mu
func (srv *Server) mayServe(l *listener, listens []string) bool {
	for _, listen := range listens {
		if config.OnTailnet(listen) || srv.places[placeOf(listen)].isInterface {
			return true
		}
	}
	for _, s := range srv.sockets {
		if s.owner.Load() == l {
			return true
		}
	}
	return false
}

// watchNeeded starts what follows the tailnet and the containers, once it is needed: a daemon that uses
// neither doesn't complain that they are missing.
func (srv *Server) watchNeeded(n plan.Needs) {
	if n.Tailnet {
		srv.watchTailnet.Do(func() { go srv.tailnet.Run(srv.ctx) })
	}
	if n.Docker {
		srv.watchContainers.Do(func() { go srv.containers.Run(srv.ctx) })
	}
}
