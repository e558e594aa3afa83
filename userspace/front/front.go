// Package front is where the parts meet: it accepts connections, checks
// limits and PROXY headers, finds the route, dials the upstream and hands the
// pair to a datapath.
//
// The server and its listeners:
//
//	front.go         the server: options, start, reload, drain, close
//	service.go       what a listener does by the plan, and by which datapath
//	auto.go          which datapaths there are, and which of them auto has
//	listen.go        addresses are bound, and follow the tailnet's changes
//	places.go        interfaces and hosts that listeners name
//	gate.go          listeners are shut while their default can't be reached
//	owner_linux.go   which process has a port that is taken
//	files_unix.go    the limit of open files
//	certificates.go  what https listeners show, and how ACME gets at them
//	access_log.go    which access logs are open
//	labels.go        routes that the labels of containers add to the plan
//
// A connection, in the order in which it meets them:
//
//	accept.go            it is admitted, or refused at once
//	keepalive_linux.go   the socket options that it has from its listener
//	screen.go            who is denied, or comes too often
//	fastpath_linux.go    the usual way, on a loop, without a goroutine
//	conn.go              what is known of it, and who it is: PROXY header
//	arrival_linux.go     by which interface it came
//	trust.go             whom the configuration and tailscaled say that is
//	splice.go            sni and tcp: hello, route, dial, relay, log
//	transparent.go       connections from the client's own address
//	rtt.go               what TCP says of the peer: gone, far, silent
//
// http and https, by request:
//
//	http.go      the HTTP server of a listener, and a request's log line
//	requests.go  the route of a request
//	charge.go    requests are counted for their source
//	access.go    who may use a route
//	hold.go      a request waits for a node that will be back
//
// What is watched, and shown:
//
//	memory_linux.go    how much memory there is, and what is done when it, or the kernel's for TCP, is short
//	sockdiag_linux.go  what the kernel says of all TCP sockets
//	ratelimited.go     log lines that strangers cause
//	counts.go          what the metrics show of all this
//	problems.go        what of the configuration does not work now, while the rest does
//	health.go          whether connections move, and who may ask
//	status.go          what can be seen from outside
//	here.go            what a configuration needs of a machine, for `check --here`
package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/deny"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
	"github.com/tailsplice/tailsplice/userspace/transparent"
)

// Options are what the daemon knows beside its configuration.
type Options struct {
	Log     *slog.Logger
	LogLost func() int64 // lines that Log could not write; nil: none
	Version string
	Loops   *loop.Reactor // where connections are accepted and relayed: the caller closes it after the Front
	Relay   *relay.Relay
	Control []string // addresses that are bound for metrics and health, for status; "" is none

	// Datapaths are those that work on this machine; userspace is always
	// there and is not listed. A flow that one refuses is offered to those
	// behind it. For `datapath: auto` see Front.Offer.
	Datapaths []datapath.Datapath
	// Missing says why a datapath that configuration may name is not there.
	Missing map[string]string
}

// Front is a running set of listeners. Make it with New, end it with Drain or
// Close.
type Front struct {
	opts Options
	log  *slog.Logger

	tailnet    *tailnet.Client
	containers *container.Client
	acme       *acme.Manager
	way        atomic.Pointer[transparent.Way] // nil: none is needed, or can be had
	deps       plan.Deps
	limiter    *limit.Limiter
	newRate    *limit.Rate    // of new connections
	requests   *limit.Limiter // under way
	flows      *flow.Registry
	metrics    *metrics.Set
	targets    targets
	limited    *rateLimited
	spare      *spareFiles
	started    time.Time

	ctx    context.Context // ends when flows must end at once
	cancel context.CancelFunc
	conns  sync.WaitGroup // every connection that was accepted

	memory        atomic.Int64                           // the budget in bytes; 0: none
	greedySources atomic.Pointer[map[netip.Prefix]int64] // sources that open no connections while memory is short, and what they hold
	hops          atomic.Pointer[plan.Peers]             // whom accept_proxy.from names, on any listener
	ports         atomic.Pointer[map[uint16]bool]        // that connections were accepted at since the start: flows outlive listeners

	mostWaiting atomic.Int64 // connections that may wait for a hello
	partBytes   atomic.Int64 // of hellos that are not whole

	watchTailnet, watchContainers sync.Once
	addressesMoved                chan struct{} // wakes followAddresses
	watchInterfaces               sync.Once
	labelsMoved                   chan struct{} // wakes followLabels

	mu        sync.Mutex // guards what follows, and serialises reloads
	plan      *plan.Plan // in force, with the routes of labels
	loaded    time.Time
	listeners map[string]*listener       // by name
	sockets   map[string]*listenerSocket // by bound address
	closed    bool

	missing      map[string]string         // Options.Missing, as it is now
	logs         map[string]*accesslog.Log // open access logs, by format and file
	denyFiles    []*deny.File              // that are followed
	tailnetAddrs []netip.Addr              // this node's, as last known
	tailnetErr   error                     // why they are not known now, though a listener wants them
	unbound      map[lack]error            // what can't be bound now, and why
	healthErr    error                     // why control.health can't be bound on the tailnet
	places       map[string]place          // that listeners name
	wayErr       error                     // why there is no way though a route wants it

	auto     atomic.Pointer[[]datapath.Returner] // that Offer gave
	nodeName atomic.Pointer[string]
	held     atomic.Int64   // requests that wait for a node: see hold.go
	heldBy   *limit.Limiter // the same, by source
}

// New binds cfg's addresses and starts serving. What can be mended while the rest
// serves (an address that is not there yet or whose port is taken, a certificate's
// file, the folder of an access log, no tailscaled, no dockerd) is logged and
// tried again, and [Front.Problems] shows it. Where nothing of it would serve, and
// for anything else that keeps a listener from working, it is an error, and
// nothing is left running.
func New(cfg *config.Config, opts Options) (*Front, error) {
	f := &Front{opts: opts, log: opts.Log, flows: flow.NewRegistry(), started: time.Now(),
		listeners: map[string]*listener{}, sockets: map[string]*listenerSocket{}, missing: map[string]string{},
		limited: &rateLimited{log: opts.Log, last: map[string]*lines{}}, addressesMoved: make(chan struct{}, 1),
		labelsMoved: make(chan struct{}, 1)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.metrics = metrics.New(opts.Version, f.state)
	if opts.LogLost != nil {
		f.metrics.WatchLog(opts.LogLost)
	}
	maps.Copy(f.missing, opts.Missing)
	f.deps = plan.NewDeps(opts.Log)
	f.deps.Datapath, f.deps.Upstream, f.deps.Guard = f.has, f.completeUpstream, f.guard
	f.tailnet, f.containers = f.deps.Tailnet, f.deps.Containers
	f.acme = acme.New(opts.Log)
	f.containers.FollowLabels(config.IsLabel, f.lookAtLabels)
	f.limiter, f.requests = limit.New(math.MaxInt, math.MaxInt), limit.NewRequests(math.MaxInt, math.MaxInt) // set by apply
	f.newRate = limit.NewRate()                                                                              // set by apply
	f.heldBy = limit.NewRequests(heldMost, heldPerSource)
	f.spare = newSpareFiles()
	f.hops.Store(plan.NewPeers(nil))
	f.ports.Store(&map[uint16]bool{})
	f.mostWaiting.Store(mostWaiting())

	f.tailnet.OnChange(f.lookAtAddresses)
	if err := f.apply(cfg); err != nil {
		f.Close()
		return nil, err
	}
	go f.followAddresses(f.ctx)
	go f.followLabels(f.ctx)
	go f.watchMemory()
	return f, nil
}

// Reload changes over to cfg without closing a flow. With an error nothing
// has changed. What New would go on without is an error here, unless the daemon
// does without it already: whoever changes a configuration is there to hear it.
func (f *Front) Reload(cfg *config.Config) error {
	err := f.apply(cfg)
	result := "ok"
	if err != nil {
		result = "error"
	}
	f.metrics.Reloads.WithLabelValues(result).Inc()
	return err
}

// apply compiles cfg, binds what it needs, and only then swaps.
func (f *Front) apply(cfg *config.Config) error {
	places, err := findPlaces(f.ctx, cfg) // before the lock: a name server may be slow
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return errors.New("the daemon is shutting down")
	}
	starts := f.plan == nil
	p, wrong := plan.Compile(cfg, f.deps)
	listeners, swaps, err := f.prepareListeners(p, starts)
	if err := errors.Join(wrong, err); err != nil {
		return err
	}
	denials, denyFiles, err := f.openDenials(cfg)
	if err != nil {
		return err
	}
	logs, dropLogs, err := f.openLogs(cfg.File, p.Needs.AccessLogs, starts)
	if err != nil {
		closeFiles(denyFiles)
		return err
	}
	undo := func() {
		dropLogs()
		closeFiles(denyFiles)
	}
	var labels *plan.Labels // until now
	if !starts {
		labels = f.plan.Labels
	}
	p = p.WithLabels(labels, p.ListLabelled(f.ctx))
	memory := memoryOf(cfg)
	connections, requests := f.fitLimits(cfg, p.Needs, memory)

	var tailnetErr error
	if len(p.Needs.Listens) > 0 {
		var addrs []netip.Addr
		addrs, tailnetErr = selfAddrs(f.ctx, f.tailnet)
		f.useTailnetAddrs(addrs)
	}
	want := bindings(cfg, listeners, f.tailnetAddrs, places)
	want, clashes := f.apart(want)
	if err := f.newClash(clashes); err != nil && !starts {
		undo()
		return err
	}
	opened, failed := f.bindMissing(want)
	if err := f.mustBind(want, failed); err != nil && !starts {
		for _, s := range opened {
			s.Close()
		}
		undo()
		return err
	}

	// From here on nothing fails.
	f.openWay(p.Needs.Transparent)
	f.nodeName.Store(&cfg.Node)
	f.hops.Store(hopsOf(cfg)) // before one of them comes: its flows may last
	for _, swap := range swaps {
		swap()
	}
	var edges []*listener
	for _, l := range listeners {
		if l.mode == "sni" {
			edges = append(edges, l)
		}
	}
	for i := range cfg.Listeners {
		c := &cfg.Listeners[i]
		s := &service{Service: p.Services[c.Name], deny: denials[c.Name]}
		if a := cfg.AccessLogOf(c); a != nil {
			s.accessLog = logs[logKey(a)]
		}
		if c.Mode == "https" {
			s.edges = edges
		}
		l := listeners[c.Name]
		l.service.Store(s)
		if l.http == nil && c.IsHTTP() {
			l.http = f.newHTTPServer(l, l.certs)
		}
	}
	f.rebind(want, opened)
	f.places = places
	if f.namesInterface() {
		f.watchInterfaces.Do(func() { go f.followInterfaces(f.ctx) })
	}
	for name, old := range f.listeners {
		if listeners[name] != old {
			old.retire(f.ctx)
		}
	}
	f.useLogs(logs)
	closeFiles(f.denyFiles)
	f.denyFiles = denyFiles
	f.watchNeeded(p.Needs)
	f.memory.Store(memory)
	f.limiter.SetLimits(connections, cfg.Limits.ConnectionsPerSource)
	f.requests.SetLimits(requests, cfg.Limits.RequestsPerSource)
	if r := cfg.Limits.NewConnectionsPerSource; r != nil {
		f.newRate.Set(r.Every(), r.Burst)
	} else {
		f.newRate.Set(0, 0)
	}
	before := f.plan
	f.plan, f.listeners, f.loaded = p, listeners, time.Now()
	f.tellLabels(before)
	f.countRoutes()
	go f.warnOfTailscaled(p.Needs.Listens)
	f.noteUnbound(want, failed, clashes, tailnetErr)
	f.watchDefaults()
	if starts {
		if err := f.nothingServes(want); err != nil {
			return err
		}
	}
	if f.lacksAddresses() {
		f.lookAtAddresses()
	}
	return nil
}

// prepareListeners returns the listeners of p: those that are there and go on, and
// new ones. swaps change those that go on; they can't fail.
//
// f.mu is held.
func (f *Front) prepareListeners(p *plan.Plan, starts bool) (all map[string]*listener, swaps []func(), err error) {
	all = map[string]*listener{}
	swap, err := f.acme.Prepare(p.Needs.ACME)
	errs, swaps := []error{err}, []func(){swap}
	for i := range p.Config.Listeners {
		c := &p.Config.Listeners[i]
		l := f.listeners[c.Name]
		if l == nil || l.mode != c.Mode {
			l = &listener{name: c.Name, mode: c.Mode, shut: true}
		}
		all[c.Name] = l
		if c.Mode == "https" && p.Services[c.Name] != nil {
			certs, managed, swap, err := f.prepareCertificates(c, l.certs, starts)
			errs = append(errs, err)
			swaps = append(swaps, func() { swap(); l.certs, l.managed = certs, managed })
		}
	}
	return all, swaps, errors.Join(errs...)
}

// mustBind is an error of what can't be bound, and is no address of the tailnet or of an interface (it will
// be there later) nor one that this daemon does without already.
//
// f.mu is held.
func (f *Front) mustBind(want []binding, failed map[string]error) error {
	var errs []error
	for _, b := range want {
		if err := failed[b.addr]; err != nil && !b.tailnet && !b.place && f.unbound[lack{b.addr, b.owner.name}] == nil {
			errs = append(errs, fmt.Errorf("listener %q: %w", b.owner.name, err))
		}
	}
	return errors.Join(errs...)
}

// nothingServes says what is wrong where no listener can serve anybody, and none
// will by itself: who starts such a daemon is better told at once.
//
// f.mu is held.
func (f *Front) nothingServes(want []binding) error {
	var errs []error
	for i := range f.plan.Config.Listeners {
		c := &f.plan.Config.Listeners[i]
		l := f.listeners[c.Name]
		waits := c.WhileDown == whileDownClose || slices.ContainsFunc(c.Listen, config.OnTailnet) ||
			slices.ContainsFunc(c.Listen, func(l string) bool { return f.places[placeOf(l)].isInterface })
		bound := slices.ContainsFunc(want, func(b binding) bool { return b.owner == l && f.sockets[b.addr] != nil })
		if l.certs != nil && !l.certs.Usable() {
			for _, cert := range l.certs.Certificates() {
				errs = append(errs, fmt.Errorf("listener %q: %s", c.Name, cert.Problem))
			}
		} else if bound || waits {
			return nil
		}
	}
	for c, err := range f.unbound {
		errs = append(errs, fmt.Errorf("listener %q: %w", c.listener, err))
	}
	return errors.Join(errs...)
}

// watchNeeded starts what follows the tailnet and the containers, once it is
// needed: a daemon that uses neither doesn't complain that they are missing.
func (f *Front) watchNeeded(n plan.Needs) {
	if n.Tailnet {
		f.watchTailnet.Do(func() { go f.tailnet.Run(f.ctx) })
	}
	if n.Docker {
		f.watchContainers.Do(func() { go f.containers.Run(f.ctx) })
	}
}

const (
	// filesReserved is for what strangers have no share in: listeners, logs, the control socket, a reload.
	// Half of it is for pipes, without which bulk is copied.
	filesReserved = 256
	pipesWanted   = 2048 // where there is room for them
)

// fitLimits lowers the limits of connections and of requests to what memory and
// the file descriptors allow, and says so: better to refuse in time than to fail
// in the middle.
func (f *Front) fitLimits(cfg *config.Config, needs plan.Needs, memory int64) (connections, requests int) {
	connections, requests = cfg.Limits.Connections, cfg.Limits.Requests
	if most := memory / 4 * 3 / connectionBytes; memory > 0 && int64(connections) > most {
		connections = int(most)
		f.log.Info("limits.connections is lowered to what limits.memory allows, at 12 KiB for each in three quarters of it",
			"connections", cfg.Limits.Connections, "connections_lowered_to", connections, "memory", memory)
	}
	perConnection, perRequest := filesOf(needs)
	need := connections*perConnection + requests*perRequest
	files, err := raiseFileLimit(uint64(need + filesReserved + 2*pipesWanted))
	if err != nil {
		return connections, requests
	}
	reserved := min(filesReserved, int(files)/2) // where there are few, they are shared
	room := int(files) - reserved
	if need > room {
		if perRequest > 0 {
			requests = max(1, min(requests, room/(2*perConnection)))
		}
		connections = max(1, min(connections, (room-requests*perRequest)/perConnection))
		need = connections*perConnection + requests*perRequest
		f.log.Warn("limits.connections and limits.requests are lowered to what the limit of open files allows: raise LimitNOFILE= (systemd) or `ulimit -n`",
			"connections", cfg.Limits.Connections, "requests", cfg.Limits.Requests,
			"connections_lowered_to", connections, "requests_lowered_to", requests, "open_files", files)
	}
	f.opts.Relay.LimitPipes(reserved/4 + max(0, room-need)/2)
	return connections, requests
}

// filesOf is how many sockets a connection takes, and a request: the target's of
// a flow is there as long as the client's, an HTTP client has one and each of its
// requests may have one more.
func filesOf(n plan.Needs) (perConnection, perRequest int) {
	perConnection = 1
	if n.Flows {
		perConnection = 2
	}
	if n.Requests {
		perRequest = 1
	}
	return perConnection, perRequest
}

func (f *Front) node() string {
	if n := f.nodeName.Load(); n != nil {
		return *n
	}
	return ""
}

// FlowCount is how many flows live.
func (f *Front) FlowCount() int { return f.flows.Len() }

// Flows lists the live flows that query takes, oldest first. It is one that flow.Query makes.
func (f *Front) Flows(query url.Values) ([]flow.Snapshot, error) {
	q, err := flow.ParseQuery(query)
	if err != nil {
		return nil, err
	}
	return f.flows.Snapshot(q), nil
}

// firstLook is after how much time Top tells for the first time, at most: somebody has just pressed a key.
const firstLook = 250 * time.Millisecond

// Top sends what the live flows move each interval of query, which else is one that flow.Query makes, until ctx ends
// or send fails.
func (f *Front) Top(ctx context.Context, query url.Values, send func(any) error) error {
	q, err := flow.ParseQuery(query)
	if err != nil {
		return err
	}
	every, err := time.ParseDuration(query.Get("interval"))
	if err != nil || every < flow.MinInterval {
		return fmt.Errorf("interval %q: %v at least", query.Get("interval"), flow.MinInterval)
	}
	watcher := f.flows.Watch(q)
	next := time.NewTimer(min(every, firstLook))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-next.C:
			if err := send(watcher.Look(now)); err != nil {
				return err
			}
			next.Reset(every - time.Since(now))
		}
	}
}

// Metrics are the daemon's counters.
func (f *Front) Metrics() *metrics.Set { return f.metrics }

// stopAccepting closes all sockets and waits until nobody is being admitted.
func (f *Front) stopAccepting() {
	f.mu.Lock()
	f.closed = true
	sockets := f.sockets
	f.sockets = map[string]*listenerSocket{}
	f.mu.Unlock()
	for _, s := range sockets {
		s.Close()
	}
}

// Drain stops accepting and waits until all flows have ended or ctx ends;
// then it closes. The error says how many connections it had to cut.
func (f *Front) Drain(ctx context.Context) error {
	f.stopAccepting()
	f.mu.Lock()
	listeners := f.listeners
	f.mu.Unlock()
	for _, l := range listeners {
		if l.http != nil {
			go l.http.shutdown(ctx)
		}
	}
	done := make(chan struct{})
	go func() {
		f.conns.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("connections cut before their end: %d", f.limiter.Total())
	}
	f.Close()
	return err
}

// Close ends everything at once.
func (f *Front) Close() {
	f.stopAccepting()
	f.cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.listeners {
		if l.http != nil {
			l.http.close()
		}
	}
	f.conns.Wait()
	f.closeWay()
	f.useLogs(nil)
	closeFiles(f.denyFiles)
	f.acme.Close()
}
