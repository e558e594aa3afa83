package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// answerTimeout bounds how long a command waits for the daemon. A reload may have to ask tailscaled.
const answerTimeout = 15 * time.Second

func newStatus() *cobra.Command {
	var a asker
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the daemon's listeners, routes, problems and counters",
		Long: `Show the state of the running daemon: its listeners and the addresses they are
bound to, certificates, routes, datapaths, problems, and counts of what it has
accepted and refused since it started.`,
		Example: `  tailsplice status
  tailsplice status --json | jq .refused`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s server.Status
			return a.ask(cmd, "status", &s, func(w io.Writer) { printStatus(w, s, time.Now()) })
		},
	}
	return a.flags(cmd)
}

func newFlows() *cobra.Command {
	var a asker
	var f flowFilter
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List the live flows",
		Long: `List the live flows, oldest first. All hops of a path use the same id for a flow,
so the same id in the list or the log of another hop is the same connection.`,
		Example: `  tailsplice flows
  tailsplice flows --name example.org --client 192.0.2.0/24
  tailsplice flows --json | jq -r '.[] | [.id, .name, .client] | @tsv'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := f.query()
			if err != nil {
				return err
			}
			noun := "flows?" + q.Values().Encode()
			if a.asJSON {
				return a.ask(cmd, noun, new(json.RawMessage), nil)
			}
			var s []flow.Snapshot
			if err := a.get(cmd, noun, &s); err != nil {
				return err
			}
			for i := range s {
				printableFlow(&s[i])
			}
			printFlows(cmd.OutOrStdout(), s, time.Now())
			return nil
		},
	}
	f.flags(cmd)
	cmd.AddCommand(newFlowsKill())
	return a.flags(cmd)
}

type asker struct {
	admin.Client
	asJSON bool
}

func (a *asker) flags(cmd *cobra.Command) *cobra.Command {
	controlFlag(cmd, &a.Socket)
	jsonFlag(cmd, &a.asJSON)
	return cmd
}

// get reads a noun from the daemon into v.
func (a *asker) get(cmd *cobra.Command, noun string, v any) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
	defer cancel()
	return a.Get(ctx, noun, v)
}

// ask reads a noun from the daemon into v and prints it, as it came or for people.
func (a *asker) ask(cmd *cobra.Command, noun string, v any, people func(io.Writer)) error {
	var raw json.RawMessage // it may have more than v takes
	if err := a.get(cmd, noun, &raw); err != nil {
		return err
	}
	return a.print(cmd, raw, v, people)
}

// print prints what the daemon has answered, as it came, or for people from v, which gets it.
func (a *asker) print(cmd *cobra.Command, raw json.RawMessage, v any, people func(io.Writer)) error {
	if a.asJSON {
		return errors.Join(printJSON(cmd, raw), json.Unmarshal(raw, v))
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return err
	}
	return show(cmd, false, v, people)
}

// printACME tells of one name whose certificate comes by ACME.
func printACME(w io.Writer, a acme.Status) {
	fmt.Fprintf(w, "    %s: %s", a.Name, a.State)
	on := func(what string, t time.Time) {
		if !t.IsZero() {
			fmt.Fprintf(w, ", %s %s", what, t.UTC().Format("2006-01-02 15:04 MST"))
		}
	}
	on("until", a.NotAfter)
	if a.State == acme.StateValid {
		on("renewed about", a.RenewAt)
	}
	on("next try", a.NextTry)
	fmt.Fprintln(w)
	if a.Problem != "" {
		fmt.Fprintf(w, "      %s\n", a.Problem)
	}
}

// whyDown is why a target is down that health checks have found so.
func whyDown(h *server.TargetHealth) string {
	switch {
	case h.Error != "":
		return h.Error
	case !h.Until.IsZero():
		return "it answers, and has gone down again and again: connections go there from " + moment(h.Until)
	}
	return "it answers again, and not often enough yet"
}

// downTargets says of each target that can't be reached why.
func downTargets(listeners []server.ListenerStatus) (all []string) {
	for _, l := range listeners {
		for _, r := range l.Routes {
			on := fmt.Sprintf("route %s of listener %s: ", r.Match, l.Name)
			for _, to := range r.Targets {
				if h := to.Health; h != nil && !h.Up {
					all = append(all, on+fmt.Sprintf("%s is down by its health checks since %s: %s",
						to.Target, moment(h.Since), whyDown(h)))
				}
			}
			for _, d := range r.Down {
				all = append(all, on+"the last try failed: "+d)
			}
		}
	}
	return all
}

// mostDown is how many targets that can't be reached printStatus names.
const mostDown = 10

// printProblems lists all that does not work, so that it is seen first.
func printProblems(w io.Writer, s server.Status) {
	for _, p := range s.Problems {
		fmt.Fprintf(w, "problem: %s\n", p)
	}
	for _, d := range s.Datapaths {
		if d.SwitchedOff {
			fmt.Fprintf(w, "problem: datapath %s is switched off until the daemon is started again, because it failed too often: %s\n", d.Name, d.Reason)
		}
		if d.Stalls > 0 {
			fmt.Fprintf(w, "problem: datapath %s: a flow waited up to 3 s for nothing %s: please report it\n", d.Name, plural(int(d.Stalls), "time"))
		}
	}
	for _, d := range s.Disabled {
		fmt.Fprintf(w, "disabled: %s gets no new connections since %s\n", d.Target, moment(d.Since))
	}
	down := downTargets(s.Listeners)
	for _, d := range down[:min(len(down), mostDown)] {
		fmt.Fprintf(w, "problem: %s\n", d)
	}
	if len(down) > mostDown {
		fmt.Fprintf(w, "problem: %s more can't be reached: see down and health with --json\n", plural(len(down)-mostDown, "target"))
	}
	for _, p := range s.Labels {
		on := ""
		if p.Listener != "" {
			on = " (on " + p.Listener + ")"
		}
		fmt.Fprintf(w, "ignored: container %s, %s: %s%s\n", p.Container, p.Label, p.Problem, on)
	}
	if s.LogLost > 0 {
		fmt.Fprintf(w, "problem: the log has lost %s: what reads standard error did not keep up\n", plural(int(s.LogLost), "line"))
	}
}

func printStatus(w io.Writer, s server.Status, now time.Time) {
	fmt.Fprintf(w, "%s: tailsplice %s, up %s, %s, %s\n", s.Node, s.Version, age(s.Started, now), plural(s.Flows, "flow"), plural(s.Requests, "request"))
	if s.Held > 0 {
		fmt.Fprintf(w, "connections and requests that wait for a target: %d\n", s.Held)
	}
	for _, o := range s.Older {
		fmt.Fprintf(w, "older process %d, tailsplice %s: %s (%s) left, until %s\n", o.PID, o.Version,
			plural(o.Connections, "connection"), plural(o.Flows, "flow"), o.Deadline.UTC().Format("2006-01-02 15:04:05 MST"))
	}
	printProblems(w, s)
	fmt.Fprintf(w, "config %s, loaded %s ago\n", s.Config, age(s.Loaded, now))
	if m := s.Memory; m != nil {
		printMemory(w, "memory", m.Used, m.Budget, m.Saving)
		printMemory(w, "TCP's memory", m.TCPUsed, m.TCPBudget, m.TCPSaving)
	}
	for _, l := range s.Listeners {
		printListener(w, l)
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "DATAPATH\tSTATE\tFLOWS\tWHY")
	for _, d := range s.Datapaths {
		state := "off"
		switch {
		case d.Available:
			state = "on"
		case !d.Wanted:
			state = "not used"
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s\n", d.Name, state, d.Flows, d.Reason)
	}
	tw.Flush()
	fmt.Fprintln(w)
	printCounts(w, "accepted", s.Accepted)
	printCounts(w, "flows ended", s.Ended)
	printCounts(w, "refused", s.Refused)
	printCounts(w, "dial errors", s.DialErrors)
	printCounts(w, "refused or given back by a datapath", s.Demoted)
	printCounts(w, "not transparent", s.NotTransparent)
}

// printMemory prints how much is taken of a budget; 0: it is not known.
func printMemory(w io.Writer, what string, used, budget int64, isSaved bool) {
	fmt.Fprintf(w, "%s: %s", what, bytes(used))
	if budget > 0 {
		fmt.Fprintf(w, " of %s", bytes(budget))
	}
	if isSaved {
		fmt.Fprint(w, ", buffers are small until it is less")
	}
	fmt.Fprintln(w)
}

func printListener(w io.Writer, l server.ListenerStatus) {
	bound := strings.Join(l.Bound, " ")
	switch {
	case !l.Drained.IsZero() && len(l.Bound) > 0:
		bound += " (drained since " + moment(l.Drained) + ", closes soon)"
	case !l.Drained.IsZero():
		bound = "drained since " + moment(l.Drained)
	case l.Closed != "":
		bound = "closed, until a target of default answers"
	case bound == "":
		bound = "not bound yet"
	}
	fmt.Fprintf(w, "\n%s (%s) on %s: %s\n", l.Name, l.Mode, strings.Join(l.Listen, " "), bound)
	for _, who := range []struct {
		what string
		from []string
	}{{"PROXY headers are believed from", l.AcceptProxy}, {"only for", l.Allow}, {"not for", l.Deny}} {
		if len(who.from) > 0 {
			fmt.Fprintf(w, "  %s %s\n", who.what, strings.Join(who.from, ", "))
		}
	}
	switch {
	case l.NotAnnounced != "":
		fmt.Fprintf(w, "  not announced: %s\n", l.NotAnnounced)
	case l.Announced != "":
		fmt.Fprintln(w, "  announced")
	}
	printCertificates(w, l)
	if len(l.Routes) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  MATCH\t  TARGET\tDATAPATH\tRESTRICTIONS\tSOURCE")
	for _, r := range l.Routes {
		printRoute(tw, r)
	}
	tw.Flush()
}

func printCertificates(w io.Writer, l server.ListenerStatus) {
	for _, c := range l.Certificates {
		fmt.Fprintf(w, "  certificate %s", c.Source)
		if len(c.Names) > 0 {
			fmt.Fprintf(w, " for %s", strings.Join(c.Names, ", "))
		}
		if !c.NotAfter.IsZero() {
			fmt.Fprintf(w, ", until %s", c.NotAfter.Format(time.DateOnly))
		}
		if c.Problem != "" {
			fmt.Fprint(w, ": can't be used, see problem")
		}
		fmt.Fprintln(w)
	}
	for _, a := range l.ACME {
		printACME(w, a)
	}
}

// printRoute writes a row of the table of routes.
func printRoute(w io.Writer, r server.RouteStatus) {
	match, to := r.Match, r.Forward
	if len(r.ALPN) > 0 {
		match += " alpn " + strings.Join(r.ALPN, ",")
	}
	if r.Reject {
		to = "reject"
	}
	if r.SendProxy {
		to += " (PROXY v2)"
	}
	if r.Transparent {
		to += " (transparent)"
	}
	from := r.Source
	if r.Container != "" && r.Container != "running" {
		from += " (" + r.Container + ")"
	}
	if len(r.Ailing) > 0 {
		from += "; " + strings.Join(r.Ailing, ", ")
	}
	datapath := r.Datapath
	if r.Wanted != "" && r.Wanted != r.Datapath {
		datapath += " (" + r.Wanted + ")" // as configured
	}
	asks := cmp.Or(strings.Join(r.Asks, "; "), "-")
	fmt.Fprintf(w, "  %s\t→ %s\t%s\t%s\t%s\n", match, to, cmp.Or(datapath, "-"), asks, from)
}

// moment is t for people.
func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

func printCounts(w io.Writer, what string, counts map[string]int64) {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%s %d", k, counts[k]))
	}
	if len(parts) > 0 {
		fmt.Fprintf(w, "%s: %s\n", what, strings.Join(parts, ", "))
	}
}

func printFlows(w io.Writer, flows []flow.Snapshot, now time.Time) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tNAME\tCLIENT\tUPSTREAM\tDATAPATH\tUP\tDOWN\tAGE")
	for _, f := range flows {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", f.ID, f.Name, f.Client, f.Target, f.Datapath, bytes(f.BytesUp), bytes(f.BytesDown), age(f.Started, now))
	}
	tw.Flush()
}

func age(t, now time.Time) string {
	d := now.Sub(t)
	if d < time.Minute {
		return d.Truncate(100 * time.Millisecond).String()
	}
	return d.Truncate(time.Second).String()
}

// bytes gives n with a binary unit and three digits at most.
func bytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	digits := 1
	if i == 0 || v >= 100 {
		digits = 0
	}
	return fmt.Sprintf("%.*f %s", digits, v, units[i])
}

func newReload() *cobra.Command {
	var daemon admin.Client
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Make the daemon read its configuration again",
		Long: `Make the daemon read its configuration again. No connection is closed. If the
configuration can't be used, the daemon keeps the one that it has, the errors
are printed, and the exit status is 1.

If another program is by now where the daemon was started from, as after the
installation of another version, that one takes over and reads the
configuration, as by ` + "`tailsplice upgrade`" + `. If it can't, nothing changes.

SIGHUP reads the configuration in any case, and reports errors in the daemon's
log.`,
		Example: `  tailsplice check && tailsplice reload`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), upgradeTimeout+servingTimeout+answerTimeout)
			defer cancel()
			notes, err := daemon.Reload(ctx)
			fmt.Fprint(terminal{cmd.ErrOrStderr()}, notes)
			return err
		},
	}
	controlFlag(cmd, &daemon.Socket)
	return cmd
}

// buildVersion is set by the Makefile.
var buildVersion string

func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// built is what `tailsplice version --json` prints.
type built struct {
	Format  int    `json:"format_version"` // flow.FormatVersion
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func printVersion(w io.Writer, asJSON bool) error {
	b := built{flow.FormatVersion, version(), runtime.Version(), runtime.GOOS, runtime.GOARCH}
	if asJSON {
		return json.NewEncoder(w).Encode(b)
	}
	_, err := fmt.Fprintf(w, "tailsplice %s (%s, %s/%s)\n", b.Version, b.Go, b.OS, b.Arch)
	return err
}

func newVersion() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long: `Print the version of this program, the version of Go that built it, and the
system that it is for. The version of a running daemon is in tailsplice status.`,
		Example: `  tailsplice version
  tailsplice --version --json | jq -r .version`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return printVersion(cmd.OutOrStdout(), asJSON) },
	}
	jsonFlag(cmd, &asJSON)
	return cmd
}
