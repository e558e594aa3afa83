package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/logwriter"
	"github.com/tailsplice/tailsplice/userspace/server"
)

func newUpgrade() *cobra.Command {
	var c admin.Client
	var o upgradeOptions
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Have a new process take over from the daemon, without refusing or closing a connection",
		Long: `Have the daemon start its program again, as a rule a newer version of it, and
hand its listening sockets over. The new process reads the configuration, proves
its datapaths and opens its logs first; connections that come while it takes
over wait, and none is refused. Then the flows of sni and tcp listeners go over,
too. The old process goes on with what can't, requests first of all, until the
last has ended or --drain-timeout is over. ` + "`tailsplice status`" + ` shows how many
are left there.

If the new process can't start, or not in time, the daemon goes on as it was; the
last lines of the new process are printed, and the exit status is 1. An older
version is used in the same way.`,
		Example: `  tailsplice upgrade
  tailsplice upgrade --binary /opt/tailsplice-1.4/tailsplice --drain-timeout 4h`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.binary != "" {
				path, err := filepath.Abs(o.binary)
				if err != nil {
					return err
				}
				o.binary = path
			}
			if o.timeout <= 0 || o.drain < 0 {
				return &usageError{errors.New("--timeout must be more than 0, and --drain-timeout not less")}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout+servingTimeout+answerTimeout)
			defer cancel()
			notes, err := c.Upgrade(ctx, o.values())
			fmt.Fprint(terminal{cmd.OutOrStdout()}, notes)
			return err
		},
	}
	controlFlag(cmd, &c.Socket)
	cmd.Flags().StringVar(&o.binary, "binary", "", "the `program` to start; without it, the path that the daemon was started with")
	cmd.Flags().DurationVar(&o.timeout, "timeout", upgradeTimeout,
		"how long the new process may take until it is ready")
	cmd.Flags().DurationVar(&o.drain, "drain-timeout", time.Hour, "how long the old process goes on with the connections that it can't hand over, 10s at least")
	return cmd
}

// upgradeTimeout is how long a new process may take until it is ready, unless something else is asked for.
const upgradeTimeout = time.Minute

// upgradeOptions are what can be asked for.
type upgradeOptions struct {
	binary         string // absolute, or ""
	timeout, drain time.Duration
}

func (o upgradeOptions) values() url.Values {
	return url.Values{"binary": {o.binary}, "timeout": {o.timeout.String()}, "drain_timeout": {o.drain.String()}}
}

// parseUpgrade is the reverse of values. What is missing is as the command's flags have it.
func parseUpgrade(q url.Values) (o upgradeOptions, err error) {
	o = upgradeOptions{binary: q.Get("binary"), timeout: upgradeTimeout, drain: time.Hour}
	if o.binary != "" && !filepath.IsAbs(o.binary) {
		return o, fmt.Errorf("binary %q: it must be an absolute path", o.binary)
	}
	for name, to := range map[string]*time.Duration{"timeout": &o.timeout, "drain_timeout": &o.drain} {
		if !q.Has(name) {
			continue
		}
		if *to, err = time.ParseDuration(q.Get(name)); err != nil || *to < 0 {
			return o, fmt.Errorf("%s %q: it must be a time such as 1m", name, q.Get(name))
		}
	}
	return o, nil
}

// leastDrain is how long an old process goes on at least: the flows that can go over do so meanwhile.
const leastDrain = 10 * time.Second

// servingTimeout is how long connections may wait for a new process that was ready to accept them, and
// newestTimeout how long it may take after that to say that it is the newest one, which it does at once.
const (
	servingTimeout = 10 * time.Second
	newestTimeout  = 5 * time.Second
)

// proof is how long a new process serves while the old one, which has all that it had, can take its place:
// the first connections are those that have waited for it.
const proof = 200 * time.Millisecond

// process is a daemon that serves, and what may be done to it.
type process struct {
	options runOptions
	cfg     *config.Config // of the start
	log     *slog.Logger
	level   *slog.LevelVar
	lines   *logwriter.Writer
	server  *server.Server
	control *controls
	elders  handover.Elders
	keeper  keeper
	isFirst bool   // no other process has started this one
	program string // the path that it was started from, see openProgram

	upgraded    chan *successor // gets the process that has taken over
	ends        chan struct{}   // is sent to when the daemon is to end with its last flow
	isUpgrading atomic.Bool
	isEnding    atomic.Bool                             // no upgrade begins any more
	giveUp      atomic.Pointer[context.CancelCauseFunc] // ends the upgrade that is under way

	// changes is held while the configuration is reloaded, or another process takes over.
	changes sync.Mutex
	// +checklocks:changes
	next *successor // that has taken over
}

// successor is a process that has taken over, and how long this one may go on.
type successor struct {
	*handover.Successor
	drain  time.Duration
	newest *handover.Message // its first, by which it says what it takes
}

// isSupervised says whether a supervisor is told which process is the daemon's.
// The first process of a PID namespace stays in any case: nothing outlives it, and it can't have siblings.
func isSupervised() bool { return os.Getenv("NOTIFY_SOCKET") != "" && os.Getpid() != 1 }

// status is the server's, with the older processes.
func (d *process) status() server.Status {
	s := d.server.Status()
	s.Older = d.elders.List()
	return s
}

// takeOver serves in place of old.
func (d *process) takeOver(old *handover.Predecessor) error {
	d.keeper.elders = old.Take(func(s handover.Socket) bool { return s.Kind == handover.KindElder })
	if err := old.Ready(); err != nil {
		handover.Close(d.keeper.elders)
		return err
	}
	d.keeper.left = old.Take(handover.IsOfFlows)
	d.server.Accept()
	if err := old.Serve(); err != nil { // it may be gone: all the more
		d.log.Warn("the process that this one has taken over from was not told", "err", err)
	}
	d.elders.Add(old.Link)
	return nil
}

// ofServer says which sockets of another process are the server's by cfg.
func ofServer(cfg *config.Config) func(handover.Socket) bool {
	_, onTailnet := server.TailnetPort(cfg.Control.Health)
	return func(s handover.Socket) bool {
		return s.Kind == handover.KindListener || s.Kind == handover.KindHealth && onTailnet
	}
}

// upgrade has another program take over, as query asks. Without an error that one serves.
func (d *process) upgrade(ctx context.Context, query url.Values) (notes []string, err error) {
	o, err := parseUpgrade(query)
	if err != nil {
		return nil, err
	}
	if !d.isUpgrading.CompareAndSwap(false, true) {
		return nil, errors.New("another upgrade is under way: `tailsplice status` shows when it has ended")
	}
	defer d.isUpgrading.Store(false)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	d.giveUp.Store(&cancel)
	defer d.giveUp.Store(nil)
	if d.isEnding.Load() { // whoever has said so may have seen no upgrade
		cancel(nil)
	}
	d.awaitMain(ctx)
	d.changes.Lock()
	defer d.changes.Unlock()
	if d.next != nil {
		return nil, admin.ErrMoved
	}
	if d.isEnding.Load() {
		return nil, errors.New("the daemon is shutting down")
	}
	if d.keeper.isToBeMain() {
		return nil, errors.New("the upgrade before this one is not over yet: try again in a moment")
	}
	path := o.binary
	if path == "" {
		if path, err = ownPath(); err != nil {
			return nil, err
		}
	}
	d.log.Info("an upgrade begins", "binary", path)
	var newest *handover.Message
	s, err := handover.Start(handover.Program{Path: path, Args: os.Args[1:], Sibling: !d.isFirst || isSupervised(),
		Stderr: os.Stderr, Lines: func(line []byte) { d.lines.Write(line) }})
	if err == nil {
		newest, err = d.handOver(ctx, s, o)
	}
	if err != nil {
		err = fmt.Errorf("%s did not take over, and the daemon goes on as it was: %w", path, err)
		d.log.Error("an upgrade failed", "err", err)
		return nil, err
	}
	next := &successor{s, max(o.drain, leastDrain), newest}
	d.next = next
	d.upgraded <- next
	return []string{d.describe(next)}, nil
}

// mainWait is how long an upgrade may wait for the end of the one before it.
const mainWait = 5 * time.Second

// awaitMain waits until this is the main process, but not for long.
func (d *process) awaitMain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, mainWait)
	defer cancel()
	for d.keeper.isToBeMain() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// describe says for people what an upgrade has led to.
func (d *process) describe(next *successor) string {
	text := fmt.Sprintf("process %d has taken over from %d", next.PID, os.Getpid())
	if _, left := d.server.Remaining(); left > 0 {
		text += fmt.Sprintf(", which hands %s over, or goes on with them for up to %s", plural(left, "connection"), next.drain)
	}
	return text
}

// handOver does the steps of a handover. After an error s is gone, and this daemon serves as before. newest
// is what s has said of itself.
//
// +checklocks:d.changes
func (d *process) handOver(ctx context.Context, s *handover.Successor,
	o upgradeOptions) (newest *handover.Message, err error) {
	inTime, cancel := context.WithTimeoutCause(ctx, o.timeout,
		fmt.Errorf("the upgrade was not that far after %v", o.timeout))
	defer cancel()
	failed := func(end func(), err error) (*handover.Message, error) {
		end()
		d.keeper.resume()
		d.server.Resume()
		if err := loader.RemoveDead("", d.log); err != nil {
			d.log.Warn("what ended daemons left in the kernel can't be removed", "err", err)
		}
		return nil, err
	}
	if err := d.offer(s); err != nil {
		// Most likely it has ended.
		if _, why := s.Await(ctx, handover.Ready, time.Second); why != nil {
			err = why
		}
		return failed(s.End, err)
	}
	ready, err := s.Await(ctx, handover.Ready, o.timeout)
	if err == nil {
		err = d.server.Withdrawn(inTime)
	}
	if err != nil {
		return failed(s.End, err)
	}
	d.server.AwaitStops(inTime)
	select {
	case <-d.keeper.adopted: // flows that are to go on could not any more
	case <-time.After(2 * recallWait):
	case <-ctx.Done():
		return failed(s.End, fmt.Errorf("given up: %w", context.Cause(ctx)))
	}
	d.server.Pause()
	if err := s.Spare(); err != nil {
		d.log.Warn("where memory is short, the kernel kills the new process first", "err", err)
	}
	flows := d.keeper.offer()
	_ = s.Send(handover.Message{Step: handover.Yours, Sockets: flows}) // where it has ended, Await says how
	handover.Close(flows)
	if _, err = s.Await(context.Background(), handover.Serving, servingTimeout); err == nil {
		newest, err = s.Await(context.Background(), handover.Newest, newestTimeout)
	}
	if err == nil {
		err = s.Lasts(proof)
	}
	if err != nil {
		return failed(s.Kill, err)
	}
	if err := d.keeper.nameMain(s.PID, ready.SeesToKept); err != nil {
		d.log.Warn("the service manager was not told which process is the main one, or did not answer",
			"pid", s.PID, "err", err)
	}
	if err = s.Lasts(0); err != nil { // the manager may not have taken it
		_ = d.keeper.store.Notify(fmt.Sprintf("MAINPID=%d", os.Getpid()))
		return failed(s.Kill, err)
	}
	s.Send(handover.Message{Step: handover.Main})
	d.keeper.leave()
	d.control.leave(ready.Taken)
	d.server.Leave()
	d.elders.Leave(s.PID)
	return newest, nil
}

// offer sends all that is bound.
func (d *process) offer(s *handover.Successor) error {
	var all []handover.Socket
	defer func() { handover.Close(all) }()
	for _, copies := range []func() ([]handover.Socket, error){d.server.Sockets, d.control.sockets, d.elders.Sockets, d.keeper.store.Sockets} {
		some, err := copies()
		if err != nil {
			return err
		}
		all = append(all, some...)
	}
	orders, more, err := d.server.OrdersInParts()
	if err != nil {
		return err
	}
	flows, _ := d.server.Remaining()
	return s.SendSockets(all, orders, flows, more...)
}

// ownPath is where this program was started from. Another version may be there by now.
func ownPath() (string, error) {
	if strings.Contains(os.Args[0], "/") {
		return filepath.Abs(os.Args[0])
	}
	if path, err := exec.LookPath(os.Args[0]); err == nil {
		return filepath.Abs(path)
	}
	return os.Executable()
}

// change is do, unless another process has taken over, which is to do it then.
func (d *process) change(do admin.Change) admin.Change {
	return func(query url.Values, who admin.Peer) (any, error) {
		if !d.changes.TryLock() {
			if d.isUpgrading.Load() { // which may take longer than anybody waits for an answer
				return nil, errors.New("an upgrade is under way: ask again when it has ended")
			}
			d.changes.Lock()
		}
		defer d.changes.Unlock()
		if d.next != nil {
			return nil, admin.ErrMoved
		}
		answer, err := do(query, who)
		d.keep()
		return answer, err
	}
}

// reload has the server use a changed configuration. With an error nothing has changed.
func (d *process) reload() (notes []string, err error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	if d.next != nil {
		return nil, admin.ErrMoved
	}
	daemon.SdNotify(false, daemon.SdNotifyReloading)
	defer daemon.SdNotify(false, daemon.SdNotifyReady)
	notes, err = reload(d.server, d.options.config, d.cfg.Control)
	limitHeap(d.server.Memory())
	if err != nil {
		d.log.Error("the configuration was not changed", "err", err)
		return nil, err
	}
	for _, n := range notes {
		d.log.Warn(n)
	}
	d.keep()
	d.log.Info("the configuration was reloaded", "config", d.options.config)
	return notes, nil
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
