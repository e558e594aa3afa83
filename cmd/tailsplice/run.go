package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/logwriter"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// controlConnections is how many connections to the control socket may be open; more wait in the kernel.
const controlConnections = 32

type runOptions struct {
	config    string
	drain     time.Duration
	logFormat string
	logLevel  string
	knownBad  bool
}

func newRun() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground until a signal stops it.

SIGHUP reloads the configuration without closing a connection, and reopens the
access logs after log rotation. A configuration that can't be used changes
nothing.

SIGTERM and SIGINT stop accepting connections and let the open ones finish.
After --drain-timeout the daemon closes those that are left. The same signal a
second time closes them at once.

` + "`tailsplice upgrade`" + ` has a new process take over without refusing or closing a
connection. Where no systemd is told which process that is, the first process
stays, passes signals on, and ends with the newest one and its exit status.

Where systemd keeps descriptors for the daemon (FileDescriptorStoreMax=), the next
process after a crash takes the listening sockets back, in which new connections
wait meanwhile, and the live flows of sni and tcp listeners, but for those that
lost bytes. Drained listeners and disabled targets stay so.`,
		Example: `  tailsplice run --config /etc/tailsplice/tailsplice.yaml
  tailsplice run -c edge.yaml --log-format text --log-level debug`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) },
	}
	configFlag(cmd, &o.config)
	cmd.Flags().DurationVar(&o.drain, "drain-timeout", 30*time.Second, "how long open connections may take to finish after SIGTERM or SIGINT")
	cmd.Flags().StringVar(&o.logFormat, "log-format", "auto", "the `format` of the log on standard error: text, json, or auto, which is text on a terminal and JSON elsewhere")
	cmd.Flags().StringVar(&o.logLevel, "log-level", "info", "the lowest `level` of the lines that are logged: debug, info, warn or error")
	cmd.Flags().BoolVar(&o.knownBad, "allow-known-bad-kernel", false, "use the sockmap datapath on kernels that are known to lose or repeat bytes: connections may be corrupted without notice")
	return cmd
}

// run is the daemon's life from start to end, and after that the one of the process that has taken over,
// where this one is waited for.
func run(ctx context.Context, o runOptions) error {
	signals := make(chan os.Signal, 4)
	defer signal.Stop(signals)
	after, err := serve(ctx, o, signals)
	if err == nil && after != nil {
		err = after.follow(signals)
	}
	return err
}

// serve is the daemon's life. Where another process has taken over, and this one has to stay until that
// ends, it returns that one.
func serve(ctx context.Context, o runOptions, signals chan os.Signal) (after *supervised, err error) {
	if o.drain < 0 {
		return nil, &usageError{fmt.Errorf("--drain-timeout %s: it can't be negative; 0 closes flows at once", o.drain)}
	}
	// A reader of the log that is gone must not end the daemon.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	old, err := handover.Inherit(func(error) {
		cancel()
		time.AfterFunc(lostWait, func() { os.Exit(1) })
	})
	if err != nil {
		return nil, err
	}
	log, level, lines, err := newLogger(o, old.Output())
	if err != nil {
		return nil, err
	}
	defer lines.Close(logWait)
	// What the standard library writes to the global logger (an unsolicited response on an idle upstream
	// connection) is debugging.
	stdlog.SetFlags(0)
	stdlog.SetOutput(slog.NewLogLogger(log.Handler(), slog.LevelDebug).Writer())
	cfg, err := readConfig(o.config, log)
	if err != nil {
		return nil, err
	}
	// Signals are ours before anything is bound: a HUP in the first second must not kill the daemon.
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	s := &starting{old: old, process: &process{options: o, cfg: cfg, log: log, level: level, lines: lines,
		control: new(controls), isFirst: old == nil, program: openProgram(),
		upgraded: make(chan *successor, 1), ends: make(chan struct{}, 1)}}
	defer s.close()
	if err := s.open(); err != nil {
		return nil, err
	}
	if err := s.begin(ctx, signals); err != nil {
		return nil, err
	}
	return s.live(ctx, signals)
}

// readConfig loads the configuration, and logs what it warns of.
func readConfig(file string, log *slog.Logger) (*config.Config, error) {
	cfg, err := loadConfig(file)
	if err != nil {
		return nil, err
	}
	for _, w := range cfg.Warnings {
		log.Warn(w.Error())
	}
	return cfg, nil
}

// starting is a process on its way from its configuration to serving.
type starting struct {
	*process
	old *handover.Predecessor // from which it takes over; nil: none

	// for flows that a process which has ended has left in the sockmap datapath
	recall     handover.Recall
	endRecalls func()

	datapaths *datapaths
	loops     *loop.Reactor
	relay     *relay.Relay
}

// open makes all that serving takes, and binds what the configuration names, or takes it from a process
// before this one. Nothing is accepted yet. Also after an error, the caller calls close.
func (s *starting) open() (err error) {
	from, orders, more := s.openStore(s.old)
	s.control.isLent.Store(s.old != nil)
	if err := s.control.bind(s.cfg, from, s.log); err != nil {
		return err
	}
	s.recall, s.endRecalls = s.openOrphans() // before loadDatapaths removes it
	s.datapaths = loadDatapaths(s.cfg, s.options.knownBad, s.log)
	if s.loops, err = startLoops(); err != nil {
		return err
	}
	s.relay = relay.New(s.loops)
	o := s.datapaths.options
	o.Log, o.LogLost, o.Version = s.log, s.lines.Lost, version()
	o.Control = []string{s.cfg.Control.Metrics, s.cfg.Control.Health}
	o.Handed, o.Held = from.Take(ofServer(s.cfg)), true
	o.Orders, o.More, o.Replaces = orders, more, s.old != nil
	o.Moved, o.KeepsFlows = s.keeper.wake, s.keeper.store.Keeps()
	o.Loops, o.Relay, o.RaiseFiles = s.loops, s.relay, raiseFileLimit
	o.Older = func() bool { return len(s.elders.List()) > 0 || s.keeper.isAdopting() }
	if s.server, err = server.New(s.cfg, o); err != nil {
		return err
	}
	s.datapaths.offer(s.server)
	growFiles(2 * s.old.Flows())
	limitHeap(s.server.Memory())
	return nil
}

// close is for the end of the process, however far its start came.
func (s *starting) close() {
	if s.server != nil {
		s.server.Close()
	}
	if s.relay != nil {
		s.relay.Close()
	}
	if s.loops != nil {
		s.loops.Close()
	}
	if s.datapaths != nil {
		s.datapaths.close()
	}
	s.control.close()
}

// begin accepts connections: in place of the old process, or beside the flows that one which has ended left.
func (s *starting) begin(ctx context.Context, signals chan os.Signal) error {
	s.elders.OnSignal = func(sig os.Signal) { s.passOn(sig, signals) }
	s.elders.OnFlow = s.server.AdoptFlow
	s.elders.OnState = func(late json.RawMessage) {
		if err := s.server.AddOrders(late); err != nil {
			s.log.Debug("what an older process has sent is not used", "err", err)
		}
	}
	s.elders.OnMain = func(isAlone bool) { s.succeed(ctx, isAlone) }
	if s.old != nil {
		s.datapaths.await(ctx)
		if err := s.takeOver(s.old); err != nil {
			return err
		}
	} else {
		s.keeper.store.Discard()
		s.server.Accept()
		go func() {
			s.adopt(s.keeper.flows, s.recall)
			close(s.keeper.adopted)
			s.endRecalls()
		}()
	}
	s.control.serve(ctx, s.process)
	s.log.Info("tailsplice runs", "version", version(), "node", s.cfg.Node, "pid", os.Getpid(),
		"config", s.options.config)
	if s.old == nil { // else the old process, which is the main one still, says it
		s.beMain(ctx)
		daemon.SdNotify(false, daemon.SdNotifyReady)
	}
	return nil
}

// live waits for what ends the process: a signal, the operator's word, or another process that takes over.
func (d *process) live(ctx context.Context, signals chan os.Signal) (after *supervised, err error) {
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGHUP {
				go d.hangUp()
				continue
			}
			if next := d.endUpgrade(); next != nil { // it has succeeded
				next.Signal(s) // which was meant for it
				return d.outlive(next, signals)
			}
			return nil, d.drain(s, signals)
		case <-d.ends:
			return nil, d.drain(nil, signals)
		case next := <-d.upgraded:
			return d.outlive(next, signals)
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// lostWait is how long a process may take to its end whose predecessor is gone before it has handed over.
const lostWait = 10 * time.Second

// controls are the listeners of the control section; nil: there is none.
type controls struct {
	socket, metrics, health net.Listener
	bound                   []boundControl
	isLent                  atomic.Bool // what came from another process is still that one's
	serving                 sync.WaitGroup
}

// boundControl is a socket of the control section, and what it is called between processes.
type boundControl struct {
	kind, address string
	isHanded      bool // it came from another process
	net.Listener
}

// bind binds what cfg names, or takes it from a process before this one.
func (c *controls) bind(cfg *config.Config, from taker, log *slog.Logger) error {
	socket, err := c.open(handover.KindControl, cfg.Control.Socket, from, admin.Listen, admin.Adopt)
	switch {
	case err == nil:
		c.socket = netutil.LimitListener(socket, controlConnections)
	case errors.Is(err, fs.ErrPermission) && os.Getuid() != 0:
		log.Warn("no control socket: `tailsplice status` and `reload` will not reach this daemon: set control.socket to a path of your own", "err", err)
	default:
		return err
	}
	for _, l := range []struct {
		to            *net.Listener
		kind, address string
	}{{&c.metrics, handover.KindMetrics, cfg.Control.Metrics}, {&c.health, handover.KindHealth, cfg.Control.Health}} {
		if _, tailnet := server.TailnetPort(l.address); l.address == "" || tailnet {
			continue
		}
		listen := func(address string) (net.Listener, error) { return listenControl(l.kind, address) }
		adopt := func(ln net.Listener, _ string) (net.Listener, error) { return ln, nil }
		if *l.to, err = c.open(l.kind, l.address, from, listen, adopt); err != nil {
			return err
		}
	}
	return nil
}

// open takes a socket that there is already, by adopt, or binds it, by listen.
func (c *controls) open(kind, address string, from taker, listen func(string) (net.Listener, error),
	adopt func(net.Listener, string) (net.Listener, error)) (ln net.Listener, err error) {
	handed := from.Take(func(s handover.Socket) bool { return s.Kind == kind && s.Address == address })
	defer handover.Close(handed)
	if len(handed) > 0 {
		if ln, err = net.FileListener(handed[0].File); err == nil {
			ln, err = adopt(ln, address)
		}
	} else {
		ln, err = listen(address)
	}
	if err == nil {
		c.bound = append(c.bound, boundControl{kind, address, len(handed) > 0, ln})
	}
	return ln, err
}

// sockets are copies of those that are bound, for another process. The caller closes them.
func (c *controls) sockets() (all []handover.Socket, err error) {
	for _, b := range c.bound {
		f, err := b.Listener.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			handover.Close(all)
			return nil, err
		}
		all = append(all, handover.Socket{Kind: b.kind, Address: b.address, File: f})
	}
	return all, nil
}

// leave closes what is bound. The file of a control socket that is among taken stays, for it is another
// process's.
func (c *controls) leave(taken []handover.Socket) {
	for _, b := range c.bound {
		if l, ok := b.Listener.(leaver); ok && handover.Find(taken, b.kind, "", b.address) != nil {
			l.Leave()
		} else {
			b.Close()
		}
	}
	c.bound = nil
}

// answerWait is how long the daemon waits at its end for clients of its control section that have asked.
const answerWait = 2 * time.Second

// finish waits until what was asked of the control section is answered.
func (c *controls) finish() {
	done := make(chan struct{})
	go func() {
		c.serving.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(answerWait):
	}
}

func (c *controls) close() {
	for _, b := range c.bound {
		if l, ok := b.Listener.(leaver); ok && c.isLent.Load() && b.isHanded {
			l.Leave()
		} else {
			b.Close()
		}
	}
}

// leaver is a control socket whose file can be left to another process.
type leaver interface{ Leave() error }

// serve shows d and does what is asked of it, until ctx ends.
func (c *controls) serve(ctx context.Context, d *process) {
	f, cfg, log := d.server, d.cfg, d.log
	if c.socket != nil {
		h := admin.Daemon{
			Status: func() any { return d.status() },
			Flows:  func(query url.Values) (any, error) { return f.Flows().List(query) },
			Top:    f.Flows().Top,
			Trace: func(ctx context.Context, query url.Values) (any, error) {
				q, err := plan.ParseQuestion(query)
				if err != nil {
					return nil, err
				}
				return f.Trace(ctx, q)
			},
			LogLevel: func() any { return levelOf(d.level) },
			Reload:   d.reloadOrUpgrade,
			Upgrade:  d.upgrade,
			Changes: map[string]admin.Change{
				"drain":          d.change(func(q url.Values, _ admin.Peer) (any, error) { return d.drainListeners(q) }),
				"flows/kill":     d.change(func(q url.Values, who admin.Peer) (any, error) { return f.KillFlows(q, who.String()) }),
				"target/disable": d.change(func(q url.Values, _ admin.Peer) (any, error) { return f.SetDisabled(q, true) }),
				"target/enable":  d.change(func(q url.Values, _ admin.Peer) (any, error) { return f.SetDisabled(q, false) }),
				"log/level":      d.change(func(q url.Values, _ admin.Peer) (any, error) { return setLevel(d.level, q) }),
				"undrain":        d.change(func(q url.Values, _ admin.Peer) (any, error) { return d.undrainListeners(q) }),
			},
			Log: log,
		}
		socket, handler := c.socket, h.Handler()
		c.serving.Go(func() { admin.Serve(ctx, socket, handler, log) })
		go d.watchControl(ctx, handler)
	}
	if c.metrics != nil {
		mux := http.NewServeMux()
		mux.Handle("/metrics", f.Metrics().Handler())
		c.serving.Go(func() { admin.Serve(ctx, admin.LimitConnections(c.metrics), mux, log) })
	}
	health := admin.Health{Alive: f.Alive, Ready: func() (bool, fmt.Stringer) { r := f.Ready(); return r.Ready, r }}
	if port, ok := server.TailnetPort(cfg.Control.Health); ok {
		go f.ServeTailnet(ctx, port, func(ln net.Listener) { admin.ServeHealth(ctx, ln, health, log) })
	} else if c.health != nil {
		c.serving.Go(func() { admin.ServeHealth(ctx, c.health, health, log) })
	}
}

// startLoops starts a loop for each processor. Go may use one more, for all other goroutines: a loop that
// waits in the kernel keeps its processor for up to 10 ms.
func startLoops() (*loop.Reactor, error) {
	n := runtime.GOMAXPROCS(0)
	loops, err := loop.New(n)
	runtime.GOMAXPROCS(n + 1)
	return loops, err
}

// leastHeap is what Go's collector aims at at least, in bytes: the daemon takes about 10 MiB when it does
// nothing, and below that the collector would take half of the CPU time, and free nothing.
const leastHeap = 24 << 20

// limitHeap has Go's collector aim at half of the memory that flows may hold, in bytes, unless GOMEMLIMIT
// says at what.
func limitHeap(memory int64) {
	if os.Getenv("GOMEMLIMIT") == "" && memory > 0 {
		debug.SetMemoryLimit(max(memory/2, leastHeap))
	}
}

// listenControl binds an address of the control section. The caller closes the listener.
func listenControl(key, addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("control.%s: %w: choose another address, or leave it out", key, err)
	}
	return ln, nil
}

// logWait bounds how long the daemon waits at its end for the reader of the log.
const logWait = 2 * time.Second

// newLogger writes to standard error, which is or will be out, and never waits for its reader. The caller
// closes the writer, and may change the level.
func newLogger(o runOptions, out *os.File) (*slog.Logger, *slog.LevelVar, *logwriter.Writer, error) {
	first, err := parseLevel(o.logLevel)
	if err != nil {
		return nil, nil, nil, &usageError{fmt.Errorf("--log-%w", err)}
	}
	level := new(slog.LevelVar)
	level.Set(first)
	text := o.logFormat == "text" || o.logFormat == "auto" && term.IsTerminal(int(out.Fd()))
	if !text && o.logFormat != "auto" && o.logFormat != "json" {
		return nil, nil, nil, &usageError{fmt.Errorf("--log-format %q: use text, json or auto", o.logFormat)}
	}
	logger := func(w io.Writer) *slog.Logger {
		ho := &slog.HandlerOptions{Level: level}
		if text {
			return slog.New(slog.NewTextHandler(terminal{w}, ho))
		}
		return slog.New(slog.NewJSONHandler(terminal{w}, ho)).With("format_version", flow.FormatVersion)
	}
	w := logwriter.New(os.Stderr, func(w io.Writer, lines int) {
		logger(w).Error("log lines are missing here because the reader of standard error did not keep up: check that it runs", "lines", lines)
	})
	return logger(w), level, w, nil
}
