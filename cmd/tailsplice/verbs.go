package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// change asks the daemon for a change, and prints what it answers into v, as it came or for people.
func (a *asker) change(cmd *cobra.Command, what string, query url.Values, v any, people func(io.Writer)) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
	defer cancel()
	var raw json.RawMessage
	if err := a.Change(ctx, what+"?"+query.Encode(), &raw); err != nil {
		return err
	}
	return a.print(cmd, raw, v, people)
}

func newDrain() *cobra.Command {
	return drainCommand(true, &cobra.Command{
		Use:   "drain LISTENER|--all",
		Short: "Close a listener's sockets, and let its flows go on",
		Long: `Close the sockets of a listener, so that clients and load balancers go elsewhere.
Its open connections go on. A listener stays drained when the configuration is
reloaded, and is open again after a restart. While all are drained, /readyz says
that the daemon is not ready.

A listener with announce is withdrawn first, and accepts connections until its
grace is over.

An https or http listener answers further requests on connections that are open.

With --all --end the daemon ends, with exit status 0, when its last flow has
ended, however long that takes. Connections of https and http listeners end
after the requests that they have. The command waits for that; interrupting it
changes nothing. SIGTERM ends the daemon after its --drain-timeout, as always.`,
		Example: `  tailsplice drain web
  tailsplice drain --all && tailsplice flows
  tailsplice drain --all --end && poweroff`,
	})
}

func newUndrain() *cobra.Command {
	return drainCommand(false, &cobra.Command{
		Use:   "undrain LISTENER|--all",
		Short: "Open the sockets of a drained listener again",
		Long: `Open the sockets of a listener again that tailsplice drain has closed. Where
another program has taken an address meanwhile, that is an error, and the daemon
tries again each second.`,
		Example: `  tailsplice undrain web
  tailsplice undrain --all`,
	})
}

// drainCommand makes cmd drain listeners, or undo that.
func drainCommand(drain bool, cmd *cobra.Command) *cobra.Command {
	var a asker
	var all, end bool
	what := "undrain"
	if drain {
		what = "drain"
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 || all == (len(args) == 1) {
			return &usageError{errors.New("name one listener, or use --all")}
		}
		query := url.Values{}
		if all {
			query.Set("all", "true")
		} else {
			query.Set("listener", args[0])
		}
		if end && !all {
			return &usageError{errors.New("--end ends the daemon, with all of its listeners: add --all")}
		}
		if end {
			query.Set("end", "true")
		}
		var d server.Drained
		err := a.change(cmd, what, query, &d, func(w io.Writer) {
			for _, l := range d.Listeners {
				printDrained(w, l)
			}
		})
		if err != nil || !end {
			return err
		}
		return a.awaitEnd(cmd)
	}
	cmd.ValidArgsFunction = a.completes(func(s *server.Status) (names []string) {
		for _, l := range s.Listeners {
			if l.Drained.IsZero() == drain {
				names = append(names, l.Name)
			}
		}
		return names
	})
	cmd.Flags().BoolVar(&all, "all", false, "all listeners")
	if drain {
		cmd.Flags().BoolVar(&end, "end", false, "end the daemon when its last flow has ended, and wait for that")
	}
	return a.flags(cmd)
}

// awaitEnd waits until the daemon has ended, and shows on a terminal what is left.
func (a *asker) awaitEnd(cmd *cobra.Command) error {
	shows := !a.asJSON && term.IsTerminal(int(os.Stdout.Fd()))
	for {
		var s server.Status
		if err := a.get(cmd, "status", &s); err == nil && shows {
			left := s.Flows
			for _, o := range s.Older {
				left += o.Flows
			}
			fmt.Fprintf(cmd.OutOrStdout(), "\r%s left, and the daemon ends when there is none\x1b[K", plural(left, "open flow"))
		}
		c, err := net.Dial("unix", a.Socket)
		if err == nil {
			c.Close()
		} else if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			if shows {
				fmt.Fprint(cmd.OutOrStdout(), "\r\x1b[K")
			}
			if !a.asJSON {
				fmt.Fprintln(cmd.OutOrStdout(), "the daemon has ended")
			}
			return nil
		}
		select {
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		case <-time.After(endEvery):
		}
	}
}

// endEvery is how often a command looks whether the daemon has ended.
const endEvery = 500 * time.Millisecond

func printDrained(w io.Writer, l server.DrainedListener) {
	switch {
	case !l.Since.IsZero() && len(l.Bound) > 0:
		fmt.Fprintf(w, "%s is drained, and has %s: it accepts connections for a while yet, as its announcement is withdrawn\n", l.Name, plural(l.Flows, "open flow"))
	case !l.Since.IsZero():
		fmt.Fprintf(w, "%s is drained, and has %s\n", l.Name, plural(l.Flows, "open flow"))
	case l.Shut != "":
		fmt.Fprintf(w, "%s is not drained, and while_down keeps it closed until a target of its default answers: %s\n", l.Name, l.Shut)
	case len(l.Bound) == 0:
		fmt.Fprintf(w, "%s is not drained, and not bound yet: tailsplice status says why\n", l.Name)
	default:
		fmt.Fprintf(w, "%s is open on %s\n", l.Name, strings.Join(l.Bound, " "))
	}
}

func newFlowsKill() *cobra.Command {
	var a asker
	var s flow.Selection
	var client string
	cmd := &cobra.Command{
		Use:   "kill ID...|--route NAME|--client ADDRESS|--name NAME",
		Short: "End flows at once, by a reset of both sides",
		Long: `End flows at once. Both sides get a reset. The flows are named by their ids, or
by --route, --client and --name: then all flows end that fit each option given.
Names are whole, unlike those of tailsplice flows.

A flow of an http or https listener is a connection of a client, of no route.
Its requests end as if the client had left. Flows of an older process, after
tailsplice upgrade, are not known here.`,
		Example: `  tailsplice flows kill 0123456789abcdef0123456789abcdef
  tailsplice flows kill --client 192.0.2.0/24
  tailsplice flows kill --route '*.example.org' --name www.example.org`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if (len(args) > 0) == (s.Route != "" || s.Name != "" || client != "") {
				return &usageError{errors.New("name flows by their ids, or by --route, --client or --name")}
			}
			s.IDs = args
			if client != "" {
				if s.Client, err = flow.ParseClient(client); err != nil {
					return &usageError{err}
				}
			}
			var k server.Killed
			return a.change(cmd, "flows/kill", s.Values(), &k, func(w io.Writer) {
				fmt.Fprintf(w, "killed %s\n", plural(k.Killed, "flow"))
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&s.Route, "route", "", "the `name` of the route, as tailsplice status shows it")
	cmd.Flags().StringVar(&s.Name, "name", "", "the server `name` or host")
	cmd.Flags().StringVar(&client, "client", "", "the client's `address`, or a range such as 192.0.2.0/24")
	_ = cmd.RegisterFlagCompletionFunc("route", a.completes(func(s *server.Status) (names []string) {
		for _, l := range s.Listeners {
			for _, r := range l.Routes {
				if l.Mode != "http" && l.Mode != "https" {
					names = append(names, r.Match)
				}
			}
		}
		return names
	}))
	for _, flag := range []string{"name", "client"} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.NoFileCompletions)
	}
	return a.flags(cmd)
}

func newTarget() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "target",
		Short: "Disable a target, or enable it again",
	})
	cmd.AddCommand(targetCommand(true, &cobra.Command{
		Use:   "disable TARGET",
		Short: "Let no new connection go to a target",
		Long: `Let no new connection go to a target, as if it were down. Requests go to other
targets of the route, if it has some. Open connections go on. The target is named
as tailsplice status shows it. It stays disabled when the configuration is
reloaded, and is enabled again after a restart.`,
		Example: `  tailsplice target disable tailnet://home:443
  tailsplice target disable 127.0.0.1:8080 --json`,
	}), targetCommand(false, &cobra.Command{
		Use:   "enable TARGET",
		Short: "Let connections go to a disabled target again",
		Long: `Let connections go to a target again that tailsplice target disable has
disabled.`,
		Example: `  tailsplice target enable tailnet://home:443`,
	}))
	return cmd
}

// group makes cmd one that does nothing but to have others below it.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return &usageError{fmt.Errorf("%s has no command %q", cmd.Name(), args[0])}
		}
		return &usageError{fmt.Errorf("%s needs a command", cmd.Name())}
	}
	return cmd
}

// targetCommand makes cmd disable a target, or undo that.
func targetCommand(disable bool, cmd *cobra.Command) *cobra.Command {
	var a asker
	what := "target/enable"
	if disable {
		what = "target/disable"
	}
	cmd.Args = exactlyOne("name one target, as tailsplice status shows it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var d server.Disabled
		return a.change(cmd, what, url.Values{"target": args}, &d, func(w io.Writer) {
			if d.Since.IsZero() {
				fmt.Fprintf(w, "%s is enabled\n", d.Target)
			} else {
				fmt.Fprintf(w, "%s is disabled, and has %s\n", d.Target, plural(d.Flows, "open flow"))
			}
		})
	}
	cmd.ValidArgsFunction = a.completes(func(s *server.Status) (names []string) {
		var disabled []string
		for _, d := range s.Disabled {
			disabled = append(disabled, d.Target)
		}
		if !disable {
			return disabled
		}
		for _, l := range s.Listeners {
			for _, r := range l.Routes {
				if len(r.Targets) == 0 && r.Forward != "" {
					names = append(names, r.Forward)
				}
				for _, to := range r.Targets {
					names = append(names, to.Target)
				}
			}
		}
		return slices.DeleteFunc(names, func(name string) bool { return slices.Contains(disabled, name) })
	})
	return a.flags(cmd)
}

// logLevel is what `tailsplice log level --json` prints.
type logLevel struct {
	Format int    `json:"format_version"` // flow.FormatVersion
	Level  string `json:"level"`
}

func newLog() *cobra.Command {
	var a asker
	cmd := group(&cobra.Command{
		Use:   "log",
		Short: "Show or set the level of the daemon's log",
	})
	level := &cobra.Command{
		Use:   "level [LEVEL]",
		Short: "Show the level of the daemon's log, or set it",
		Long: `Show the lowest level of the lines that the running daemon logs, or set it:
debug, info, warn or error. It stays so when the configuration is reloaded. After
a restart it is what tailsplice run --log-level says.`,
		Example: `  tailsplice log level
  tailsplice log level debug`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return &usageError{errors.New("name one level: " + levels)}
			}
			if len(args) == 1 {
				if _, err := parseLevel(args[0]); err != nil {
					return &usageError{err}
				}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var l logLevel
			people := func(w io.Writer) { fmt.Fprintln(w, l.Level) }
			if len(args) == 0 {
				return a.ask(cmd, "log/level", &l, people)
			}
			return a.change(cmd, "log/level", url.Values{"level": args}, &l, people)
		},
		ValidArgs: []string{"debug", "info", "warn", "error"},
	}
	cmd.AddCommand(a.flags(level))
	return cmd
}

const levels = "debug, info, warn or error"

func parseLevel(text string) (level slog.Level, err error) {
	if err := level.UnmarshalText([]byte(text)); err != nil {
		return 0, fmt.Errorf("level %q: use %s", text, levels)
	}
	return level, nil
}

// levelOf is the level of a log.
func levelOf(v *slog.LevelVar) logLevel {
	return logLevel{flow.FormatVersion, strings.ToLower(v.Level().String())}
}

// setLevel sets it by a query that has level=LEVEL.
func setLevel(v *slog.LevelVar, query url.Values) (logLevel, error) {
	level, err := parseLevel(query.Get("level"))
	if err == nil {
		v.Set(level)
	}
	return levelOf(v), err
}
