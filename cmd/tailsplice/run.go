package main

import (
	"context"
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
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/flow"
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
second time closes them at once.`,
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

// run is the daemon's life from start to end.
func run(ctx context.Context, o runOptions) error {
	if o.drain < 0 {
		return &usageError{fmt.Errorf("--drain-timeout %s: it can't be negative; 0 closes flows at once", o.drain)}
	}
	// A reader of the log that is gone must not end the daemon.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	log, level, lines, err := newLogger(o)
	if err != nil {
		return err
	}
	defer lines.Close(logWait)
	// What the standard library writes to the global logger (an unsolicited
	// response on an idle upstream connection) is debugging.
	stdlog.SetFlags(0)
	stdlog.SetOutput(slog.NewLogLogger(log.Handler(), slog.LevelDebug).Writer())
	cfg, err := loadConfig(o.config)
	if err != nil {
		return err
	}
	for _, w := range cfg.Warnings {
		log.Warn(w.Error())
	}

	// Signals are ours before anything is bound: a HUP in the first second must not kill the daemon.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	var control controls
	defer control.close()
	if err := control.bind(cfg, log); err != nil {
		return err
	}
	datapaths := loadDatapaths(cfg, o.knownBad, log)
	defer datapaths.close()
	datapaths.options.Log, datapaths.options.LogLost, datapaths.options.Version = log, lines.Lost, version()
	datapaths.options.Control = []string{cfg.Control.Metrics, cfg.Control.Health}
	loops, err := startLoops()
	if err != nil {
		return err
	}
	defer loops.Close()
	datapaths.options.Loops, datapaths.options.Relay, datapaths.options.RaiseFiles = loops, relay.New(loops), raiseFileLimit
	defer datapaths.options.Relay.Close()
	f, err := server.New(cfg, datapaths.options)
	if err != nil {
		return err
	}
	defer f.Close()
	datapaths.offer(f)
	limitHeap(f.Memory())

	reload := func() ([]string, error) {
		daemon.SdNotify(false, daemon.SdNotifyReloading)
		defer daemon.SdNotify(false, daemon.SdNotifyReady)
		notes, err := reload(f, o.config, cfg.Control)
		limitHeap(f.Memory())
		if err != nil {
			log.Error("the configuration was not changed", "err", err)
			return nil, err
		}
		for _, n := range notes {
			log.Warn(n)
		}
		log.Info("the configuration was reloaded", "config", o.config)
		return notes, nil
	}
	control.serve(ctx, f, reload, cfg, log, level)
	log.Info("tailsplice runs", "version", version(), "node", cfg.Node, "pid", os.Getpid(), "config", o.config)
	daemon.SdNotify(false, daemon.SdNotifyReady)

	for {
		select {
		case s := <-signals:
			if s == syscall.SIGHUP {
				reload()
				continue
			}
			return drain(f, o.drain, s, signals, log)
		case <-ctx.Done():
			return nil
		}
	}
}

// controls are the listeners of the control section; nil: there is none.
type controls struct{ socket, metrics, health net.Listener }

func (c *controls) bind(cfg *config.Config, log *slog.Logger) error {
	socket, err := admin.Listen(cfg.Control.Socket)
	switch {
	case err == nil:
		c.socket = netutil.LimitListener(socket, controlConnections)
	case errors.Is(err, fs.ErrPermission) && os.Getuid() != 0:
		log.Warn("no control socket: `tailsplice status` and `reload` will not reach this daemon: set control.socket to a path of your own", "err", err)
	default:
		return err
	}
	if c.metrics, err = listenControl("metrics", cfg.Control.Metrics); err != nil {
		return err
	}
	c.health, err = listenControl("health", cfg.Control.Health)
	return err
}

func (c *controls) close() {
	for _, ln := range []net.Listener{c.health, c.metrics, c.socket} {
		if ln != nil {
			ln.Close()
		}
	}
}

// serve shows f and does what is asked of it, until ctx ends.
func (c *controls) serve(ctx context.Context, f *server.Server, reload func() ([]string, error), cfg *config.Config, log *slog.Logger, level *slog.LevelVar) {
	if c.socket != nil {
		d := admin.Daemon{
			Status: func() any { return f.Status() },
			Flows:  func(query url.Values) (any, error) { return f.Flows().List(query) },
			Top:    f.Flows().Top,
			Trace: func(ctx context.Context, query url.Values) (any, error) {
				q, err := plan.ParseQuestion(query)
				if err != nil {
					return nil, err
				}
				return f.Trace(ctx, q)
			},
			LogLevel: func() any { return levelOf(level) },
			Reload:   reload,
			Changes: map[string]admin.Change{
				"drain":          func(q url.Values, _ admin.Peer) (any, error) { return f.SetDrained(q, true) },
				"flows/kill":     func(q url.Values, who admin.Peer) (any, error) { return f.KillFlows(q, who.String()) },
				"target/disable": func(q url.Values, _ admin.Peer) (any, error) { return f.SetDisabled(q, true) },
				"target/enable":  func(q url.Values, _ admin.Peer) (any, error) { return f.SetDisabled(q, false) },
				"log/level":      func(q url.Values, _ admin.Peer) (any, error) { return setLevel(level, q) },
				"undrain":        func(q url.Values, _ admin.Peer) (any, error) { return f.SetDrained(q, false) },
			},
			Log: log,
		}
		go admin.Serve(ctx, c.socket, d.Handler(), log)
	}
	if c.metrics != nil {
		mux := http.NewServeMux()
		mux.Handle("/metrics", f.Metrics().Handler())
		go admin.Serve(ctx, admin.LimitConnections(c.metrics), mux, log)
	}
	health := admin.Health{Alive: f.Alive, Ready: func() (bool, fmt.Stringer) { r := f.Ready(); return r.Ready, r }}
	if port, ok := server.TailnetPort(cfg.Control.Health); ok {
		go f.ServeTailnet(ctx, port, func(ln net.Listener) { admin.ServeHealth(ctx, ln, health, log) })
	} else if c.health != nil {
		go admin.ServeHealth(ctx, c.health, health, log)
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

// listenControl binds an address of the control section, if there is one and it is not the tailnet's. The
// caller closes the listener.
func listenControl(key, addr string) (net.Listener, error) {
	if _, tailnet := server.TailnetPort(addr); addr == "" || tailnet {
		return nil, nil
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("control.%s: %w: choose another address, or leave it out", key, err)
	}
	return ln, nil
}

// reload brings a changed configuration into force, or says why not. Of the control section nothing changes,
// since its sockets are bound once. notes are what a person should know of the new configuration.
func reload(f *server.Server, file string, bound config.Control) (notes []string, err error) {
	f.ReopenLogs() // also where the configuration can't be used: log rotation comes by HUP
	cfg, err := config.Load(file)
	if err != nil {
		f.Metrics().Reloads.WithLabelValues("error").Inc() // as f.Reload does
		return nil, err
	}
	if err := f.Reload(cfg); err != nil {
		return nil, err
	}
	for _, w := range cfg.Warnings {
		notes = append(notes, w.Error())
	}
	if cfg.Control.Socket != bound.Socket || cfg.Control.Metrics != bound.Metrics || cfg.Control.Health != bound.Health {
		notes = append(notes, "control is as it was when the daemon started: restart it to change that section")
	}
	return notes, nil
}

// drain lets the flows end; a signal that comes a second time, or the deadline, cuts them. One of another
// kind does not: some supervisors send INT, and TERM after a while.
func drain(f *server.Server, timeout time.Duration, first os.Signal, signals <-chan os.Signal, log *slog.Logger) error {
	daemon.SdNotify(false, daemon.SdNotifyStopping)
	log.Info("draining: no new connections; the same signal again ends at once", "signal", first.String(),
		"flows", f.Flows().Len(), "deadline", timeout.String())
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	go func() {
		had := map[os.Signal]bool{first: true}
		for s := range signals {
			if had[s] {
				cancel()
				return
			}
			if s != syscall.SIGHUP {
				had[s] = true
				log.Info("still draining: the same signal again ends at once", "signal", s.String())
			}
		}
	}()
	if err := f.Drain(ctx); err != nil {
		log.Warn("ended", "err", err)
		return nil
	}
	log.Info("ended: all flows had finished")
	return nil
}

// logWait bounds how long the daemon waits at its end for the reader of the log.
const logWait = 2 * time.Second

// newLogger writes to standard error, and never waits for its reader. The caller closes the writer, and may
// change the level.
func newLogger(o runOptions) (*slog.Logger, *slog.LevelVar, *logwriter.Writer, error) {
	first, err := parseLevel(o.logLevel)
	if err != nil {
		return nil, nil, nil, &usageError{fmt.Errorf("--log-%w", err)}
	}
	level := new(slog.LevelVar)
	level.Set(first)
	text := o.logFormat == "text" || o.logFormat == "auto" && term.IsTerminal(int(os.Stderr.Fd()))
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
