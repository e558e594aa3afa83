// Package server is where the parts meet: it accepts connections, checks limits and PROXY headers, finds the
// route, dials the upstream and hands the pair to a datapath.
//
// The server and its listeners:
//
//	server.go     the server: options, start, reload, drain, close
//	reload.go     a configuration is prepared, and brought into force
//	service.go    what a listener does by the plan, and the certificates that it shows
//	datapaths.go  which datapaths there are, and which of them flows get
//	listen.go     addresses are bound, and follow the tailnet's changes
//	places.go     interfaces and hosts that listeners name
//	gate.go       listeners are shut while their default can't be reached
//	drain.go      listeners are closed at an operator's word
//	announce.go   others are told which listeners should get connections
//	handover.go   what is bound goes to another process, or comes from one
//	orders.go     what an operator has said goes there as well, and what is known of targets
//	limits.go     limits that fit the memory and the files that there are
//	access_log.go which access logs are open
//	labels.go     routes that the labels of containers add to the plan
//
// A connection, in the order in which it meets them:
//
//	accept.go          it is accepted, and counted or refused at once
//	screen.go          who is denied, or comes too often
//	fastpath_linux.go  the usual way, on a loop, without a goroutine
//	conn.go            what is known of it, and who it is: PROXY header
//	trust.go           whom the configuration and tailscaled say that is
//	splice.go          sni and tcp: hello, route, dial, relay, log
//	live.go            sni and tcp: flows while they live, and those that come from another process
//	give.go            sni and tcp: flows go to another process
//	keep.go            sni and tcp: flows are kept for the process after a crash
//	targets.go         sni and tcp: from one of several targets to the next
//	hold.go            connections and requests wait for a target that will be back
//	wake.go            containers and machines are woken for those who wait, and containers stopped
//	transparent.go     connections from the client's own address
//	refused.go         why connections and requests are refused, and that it is counted and logged
//
// http and https, by request:
//
//	http.go      the HTTP server of a listener, and a request's log line
//	requests.go  the route of a request
//	charge.go    requests are counted for their source
//	access.go    who may use a route
//
// What is watched, and shown:
//
//	counts.go    what the metrics show of all this
//	problems.go  what of the configuration does not work now, while the rest does
//	hang.go      whether the daemon goes on
//	health.go    whether connections move, and who may ask
//	status.go    what can be seen from outside
//	kill.go      flows are ended at an operator's word
//	disabled.go  targets get no new connections at an operator's word
//	checks.go    targets are checked, and what is shown of that
//	here.go      what a configuration needs of a machine, for `check --here`
//
// Locks are taken in this order: a gate's, Server.mu, and then those of the parts that a Server has, under
// which nothing of this package is locked. A loop calls with none of its locks held.
package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/announce"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/deny"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/memory"
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
	Loops   *loop.Reactor // where connections are accepted and relayed: the caller closes it after the Server
	Relay   *relay.Relay
	// RaiseFiles raises the limit of open files of this process towards want, as far as it may, and says what
	// it is then. Nil: there is none.
	RaiseFiles func(want uint64) (now uint64, err error)
	Control    []string // addresses that are bound for metrics and health, for status; "" is none

	// Handed are sockets of another process that New takes over, and closes: what the configuration does not
	// name of them is not bound afterwards. With Held, nothing is accepted before Server.Accept.
	Handed []handover.Socket
	Held   bool
	Orders json.RawMessage   // of [Server.Orders] of another process, or nil
	More   []json.RawMessage // what [Server.OrdersInParts] has beside them
	// whether a process from which this one has taken over still has flows; nil: there is none
	Older func() bool
	// KeepsFlows says that [Server.KeepFlows] will be called: what that needs costs each flow a little.
	KeepsFlows bool
	// Replaces says that a process that serves goes on if New fails: then a file of denied prefixes that
	// can't be read is an error.
	Replaces bool
	// Moved is called when what [Server.Bound] returns may have changed, or what is known of targets and
	// containers of what [Server.Orders] does. It must not block, nor call the Server.
	Moved func()

	// Datapaths are those that work on this machine; userspace is always there and is not listed. A flow that
	// one refuses is offered to those behind it. For `datapath: auto` see Server.Offer.
	Datapaths []datapath.Datapath
	// Missing says why a datapath that configuration may name is not there.
	Missing map[string]string
}

// Server is a running set of listeners. Make it with New, end it with Drain or Close.
type Server struct {
	opts Options
	log  *slog.Logger

	tailnet    *tailnet.Client
	containers *container.Client
	acme       *acme.Manager
	returnPath atomic.Pointer[transparent.ReturnPath] // nil: none is needed, or can be had
	deps       plan.Deps
	limiter    *limit.Limiter
	newRate    *limit.Rate    // of new connections
	requests   *limit.Limiter // under way
	flows      *flow.Registry
	metrics    *metrics.Set
	targets    dial.Outcomes // of flows, requests and checks
	disabled   dial.Disabled // targets, by an operator's word
	health     health.Set    // checks of targets
	limited    *rateLimited
	spare      *spareFiles
	started    time.Time

	ctx    context.Context // ends when flows must end at once
	cancel context.CancelFunc
	conns  sync.WaitGroup // every connection that was accepted, or adopted

	adoption adoption
	keeping  keeping

	memory *memory.Watch
	hops   atomic.Pointer[plan.Peers] // whom accept_proxy.from names, on any listener
	// that connections were accepted at since the start: flows outlive listeners
	ports atomic.Pointer[map[uint16]bool]

	bound atomic.Pointer[map[netip.AddrPort]bool] // addresses that connections are accepted at

	mostWaiting  atomic.Int64 // connections that may wait for a hello
	partialBytes atomic.Int64 // of hellos that are not whole
	slowPaths    atomic.Int64 // connections that took the slow path

	watchTailnet    sync.Once
	watchContainers sync.Once
	watchInterfaces sync.Once
	addressesMoved  wakeup        // wakes followAddresses
	labelsMoved     wakeup        // wakes followLabels
	looking         chan struct{} // has a value while Serves looks

	auto     atomic.Pointer[[]datapath.Returner] // that Offer gave
	nodeName atomic.Pointer[string]
	heldBy   *limit.Limiter // connections and requests that wait for their target, by source
	rooms    *rooms         // where they wait: see hold.go
	wakes    *wakes         // containers that were started for them

	// mu serialises reloads.
	mu sync.Mutex
	// +checklocks:mu
	present
}

// present is what a Server does now, and what it lacks for that.
type present struct {
	plan      *plan.Plan // in force, with the routes of labels
	loaded    time.Time
	listeners map[string]*listener       // by name
	sockets   map[string]*listenerSocket // by bound address
	isClosed  bool
	isHeld    bool              // nothing is accepted yet
	isFrozen  bool              // what is bound is on its way to another process
	hasLeft   bool              // it has arrived
	unwanted  []*listenerSocket // of another process, while nothing is accepted: they are closed then
	wereOpen  map[string]bool   // listeners of which sockets came from another process
	// closed when all announcements that were ended until now are withdrawn, or nil
	withdrawn <-chan struct{}
	orders    orders          // that another process had, until the first configuration is in force
	announced []announce.Spec // by another process; until this one tells others
	isEnding  bool            // connections are accepted still, and others are told to send none
	isPaused  bool            // another process may accept, and tell others

	healthSockets map[string]*net.TCPListener // of control.health on the tailnet, by address

	missing       map[string]string         // Options.Missing, as it is now
	logs          map[string]*accesslog.Log // open access logs, by format and file
	denyFiles     []*deny.File              // that are followed
	tailnetAddrs  []netip.Addr              // this node's, as last known
	tailnetErr    error                     // why they are not known now, though a listener wants them
	unbound       map[lack]error            // what can't be bound now, and why
	healthErr     error                     // why control.health can't be bound on the tailnet
	places        map[string]place          // that listeners name
	returnPathErr error                     // why there is none though a route wants it
}

// New binds cfg's addresses and starts serving. What can be mended while the rest serves (an address that is
// not there yet or whose port is taken, a certificate's file, one of denied prefixes, the folder of an access
// log, no tailscaled, no dockerd) is logged and tried again, and [Server.Problems] shows it. Where nothing of
// it would serve, and for anything else that keeps a listener from working, it is an error, and nothing is
// left running.
func New(cfg *config.Config, opts Options) (*Server, error) {
	srv := &Server{opts: opts, log: opts.Log, flows: flow.NewRegistry(), started: time.Now(),
		present: present{listeners: map[string]*listener{}, sockets: map[string]*listenerSocket{}, missing: map[string]string{},
			isHeld: opts.Held, wereOpen: map[string]bool{}, healthSockets: map[string]*net.TCPListener{}},
		limited:        &rateLimited{log: opts.Log, last: map[string]*lines{}},
		addressesMoved: make(wakeup, 1), labelsMoved: make(wakeup, 1),
		looking: make(chan struct{}, 1), keeping: keeping{woken: make(wakeup, 1)}}
	srv.ctx, srv.cancel = context.WithCancel(context.Background())
	srv.metrics = metrics.New(opts.Version, srv.state)
	srv.targets.Most, srv.targets.Took = metrics.MostNames, srv.metrics.DialTime.Observe
	if opts.LogLost != nil {
		srv.metrics.WatchLog(opts.LogLost)
	}
	maps.Copy(srv.missing, opts.Missing)
	srv.deps = plan.NewDeps(opts.Log)
	srv.deps.Dialer.Disabled = &srv.disabled
	srv.deps.Upstream, srv.deps.Guard, srv.deps.Wait = srv.completeUpstream, srv.guard, srv.awaitUpstreams
	srv.health.Log, srv.health.Tells = opts.Log, tells
	srv.health.Down, srv.health.Moved = srv.targetDown, srv.opts.moved
	srv.deps.Health = &srv.health
	srv.tailnet, srv.containers = srv.deps.Tailnet, srv.deps.Containers
	srv.acme = acme.New(opts.Log)
	srv.deps.ACME = srv.acme
	srv.containers.FollowLabels(config.IsLabel, srv.labelsMoved.wake)
	// apply sets the limits of these
	srv.limiter = limit.New(math.MaxInt, math.MaxInt)
	srv.requests = limit.NewRequests(math.MaxInt, math.MaxInt)
	srv.newRate = limit.NewRate()
	srv.heldBy, srv.rooms, srv.wakes = limit.NewRequests(heldMost, heldPerSource), newRooms(), newWakes()
	srv.spare = newSpareFiles()
	srv.hops.Store(plan.NewPeers(nil))
	srv.ports.Store(&map[uint16]bool{})
	srv.bound.Store(&map[netip.AddrPort]bool{})
	srv.memory = srv.newMemory()
	srv.mostWaiting.Store(mostWaiting())

	srv.tailnet.OnChange(srv.addressesMoved.wake)
	srv.tailnet.OnChange(srv.rooms.move)
	srv.containers.OnChange(srv.rooms.move)
	srv.mu.Lock()
	err := srv.adopt(opts.Handed)
	if err == nil && opts.Orders != nil {
		err = srv.inherit(opts.Orders, opts.More)
	}
	srv.mu.Unlock()
	if err == nil {
		err = srv.apply(cfg)
	}
	srv.mu.Lock()
	srv.orders = orders{}
	if err == nil && !srv.isHeld {
		srv.lingerOn()
	}
	srv.mu.Unlock()
	if err != nil {
		srv.Close()
		return nil, err
	}
	go srv.followAddresses(srv.ctx)
	go srv.followLabels(srv.ctx)
	srv.memory.Start()
	return srv, nil
}

func (srv *Server) node() string {
	if n := srv.nodeName.Load(); n != nil {
		return *n
	}
	return ""
}

// Flows are those that live.
func (srv *Server) Flows() *flow.Registry { return srv.flows }

// Metrics are the daemon's counters.
func (srv *Server) Metrics() *metrics.Set { return srv.metrics }

// moved says that what is bound may have changed.
func (o *Options) moved() {
	if o.Moved != nil {
		o.Moved()
	}
}

// stopAccepting closes all sockets and waits until nobody is being admitted.
func (srv *Server) stopAccepting() {
	srv.adoption.end()
	srv.mu.Lock()
	srv.isClosed = true
	sockets, unwanted := srv.sockets, srv.unwanted
	srv.sockets, srv.unwanted = map[string]*listenerSocket{}, nil
	srv.mu.Unlock()
	for _, s := range unwanted {
		s.Close()
	}
	for _, s := range sockets {
		s.Close()
	}
}

// Drain withdraws what is announced, stops accepting once the grace of that is over, and waits until all
// flows have ended or ctx ends; then it closes. The error says how many connections it had to cut.
func (srv *Server) Drain(ctx context.Context) error {
	srv.Withdraw(ctx)
	srv.mu.Lock()
	listeners := srv.listeners
	srv.mu.Unlock()
	for _, l := range listeners {
		l.endRequests(ctx)
	}
	done := make(chan struct{})
	go func() {
		srv.conns.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("connections cut before their end: %d", srv.limiter.Total())
	}
	srv.Close()
	return err
}

// Close ends everything at once.
func (srv *Server) Close() {
	srv.endAnnouncements()
	srv.stopAccepting()
	srv.cancel()
	srv.memory.Close()
	srv.mu.Lock()
	defer srv.mu.Unlock()
	for _, l := range srv.listeners {
		if l.http != nil {
			l.http.close()
		}
	}
	srv.conns.Wait()
	srv.closeReturnPath()
	srv.useLogs(nil)
	closeFiles(srv.denyFiles)
	srv.acme.Close()
	srv.wakes.stop()
}
