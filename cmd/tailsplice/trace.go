package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

func newTrace() *cobra.Command {
	var a asker
	var file string
	var noDial bool
	var headers []string
	q := plan.Question{}
	cmd := &cobra.Command{
		Use:   "trace HOST[/PATH]",
		Short: "Show where this hop sends a host name, and whether the target answers",
		Long: `Show which listener and route match a host name, which target they lead to,
whether the target can be reached now, and what the next hop is. The command
asks the running daemon. With --config it reads a configuration instead, and
needs no daemon. It connects to each target and closes the connection again,
unless --no-dial is given.

Restrictions on clients (allow, basic_auth, forward_auth, client certificates)
are listed, but not tried. To follow a path, run the command on each hop.

The exit status is 0 if at least one listener leads to a target that answers
(or to a redirect) and no listener leads only to targets that do not answer.
Otherwise it is 1.`,
		Example: `  tailsplice trace example.vsq.cz
  tailsplice trace https://notes.vsq.cz/api/ --method POST
  tailsplice trace example.vsq.cz --config edge.yaml --no-dial
  tailsplice trace example.vsq.cz --json | jq -r '.listeners[].targets[]?.error // empty'`,
		Args: exactlyOne("name one host, such as example.org or example.org/api/"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := readQuestion(&q, args[0], headers); err != nil {
				return &usageError{err}
			}
			if cmd.Flags().Changed("config") && cmd.Flags().Changed("control") {
				return &usageError{errors.New("--config and --control exclude each other: use one")}
			}
			q.Dial = !noDial
			var t plan.Trace
			people := func(w io.Writer) { printTrace(w, t) }
			if cmd.Flags().Changed("config") {
				cfg, err := loadConfig(file)
				if err != nil {
					return err
				}
				if t, err = plan.TraceConfig(cmd.Context(), cfg, q); err != nil {
					return err
				}
				if err := show(cmd, a.asJSON, &t, people); err != nil {
					return err
				}
			} else if err := a.ask(cmd, "trace?"+q.Values().Encode(), &t, people); err != nil {
				return err
			}
			if !t.OK() {
				return errSilent
			}
			return nil
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().Lookup("config").Usage = "read this configuration `file` instead of asking the daemon"
	cmd.Flags().Lookup("config").DefValue = ""
	cmd.Flags().BoolVar(&noDial, "no-dial", false, "do not connect to the targets")
	cmd.Flags().StringVar(&q.Listener, "listener", "", "show only the listener of this `name`")
	cmd.Flags().StringVar(&q.Method, "method", "GET", "the `method` of the request")
	cmd.Flags().StringArrayVar(&headers, "header", nil, "a `header` of the request, as 'NAME: VALUE'; can be repeated")
	cmd.Flags().StringSliceVar(&q.ALPN, "alpn", []string{"h2", "http/1.1"}, "the `protocols` that the TLS client offers by ALPN")
	return a.flags(cmd)
}

// readQuestion takes HOST, HOST/PATH or a URL apart.
func readQuestion(q *plan.Question, what string, headers []string) error {
	full := what
	if !strings.Contains(full, "://") {
		full = "//" + full
	}
	u, err := url.Parse(full)
	if err != nil || u.Host == "" {
		return fmt.Errorf("%q is neither a host, such as example.org, nor a URL", what)
	}
	q.Host, q.Path = strings.TrimSuffix(strings.ToLower(u.Hostname()), "."), u.Path
	if strings.ContainsAny(q.Host, "* ") || q.Host == "" {
		return fmt.Errorf("%q is not a host that a client could ask for", u.Host)
	}
	v := q.Values()
	v["header"] = headers
	asked, err := plan.ParseQuestion(v)
	q.Header = asked.Header
	return err
}

func printTrace(w io.Writer, t plan.Trace) {
	colour := term.IsTerminal(int(os.Stdout.Fd()))
	fmt.Fprintf(w, "%s: %s %s%s\n", t.Node, t.Method, t.Host, t.Path)
	for _, l := range t.Listeners {
		fmt.Fprintf(w, "\n%s (%s) on %s\n", l.Listener, l.Mode, strings.Join(l.Listen, " "))
		route := "route " + l.Route
		if l.Route == "default" {
			route = "default"
		}
		if l.Source != "config" && l.Source != "" {
			route += " (labels of " + l.Source + ")"
		}
		switch l.Outcome {
		case plan.TraceNone:
			fmt.Fprintf(w, "  %s\n", l.Reason)
		case plan.TraceReject:
			fmt.Fprintf(w, "  %s rejects it\n", route)
		case plan.TraceRedirect:
			fmt.Fprintf(w, "  %s redirects to %s\n", route, l.Redirect)
		case plan.TraceForward:
			fmt.Fprintf(w, "  %s takes it\n", route)
		}
		for _, a := range l.Asks {
			fmt.Fprintf(w, "  if the client satisfies %s\n", a)
		}
		for _, to := range l.Targets {
			printTarget(w, l, to, colour)
		}
	}
}

func printTarget(w io.Writer, l plan.ListenerTrace, to plan.TargetTrace, colour bool) {
	state := loader.StateOK
	switch {
	case !to.Tried:
		state = "untried"
	case to.Error != "":
		state = loader.StateMissing
	}
	fmt.Fprintf(w, "  %s  → %s", mark(state, colour), to.Target)
	switch {
	case to.Backup:
		fmt.Fprint(w, " (backup)")
	case len(l.Targets) > 1:
		fmt.Fprintf(w, " (weight %d)", to.Weight)
	}
	if to.Health != "" {
		fmt.Fprintf(w, " (%s by its health checks)", to.Health)
	}
	if l.SendProxy {
		fmt.Fprint(w, " (PROXY v2)")
	}
	if l.Transparent {
		fmt.Fprint(w, " (transparent)")
	}
	if state == loader.StateOK {
		fmt.Fprint(w, " answers")
		if to.Address != "" && to.Address != to.Target {
			fmt.Fprintf(w, " at %s", to.Address)
		}
		fmt.Fprintf(w, " after %s", time.Duration(to.Took*float64(time.Second)).Round(10*time.Microsecond))
	}
	fmt.Fprintln(w)
	if to.Error != "" {
		fmt.Fprintf(w, "    %s\n", to.Error)
	}
	switch to.Kind {
	case "node":
		fmt.Fprintf(w, "    next hop: node %s: ask there: tailsplice trace %s%s\n", to.Name, to.NextHost, to.NextPath)
	case "container":
		fmt.Fprintf(w, "    next hop: container %s on this host\n", to.Name)
	case "local", "socket":
		fmt.Fprintln(w, "    next hop: a program on this host")
	}
}
