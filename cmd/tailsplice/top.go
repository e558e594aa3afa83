package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

func newTop() *cobra.Command {
	var control string
	var asJSON bool
	var every time.Duration
	var rounds int
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch the live flows, the busiest first",
		Long: `Watch the live flows, the busiest first, with the bytes a second that each
moved since the last look. On a terminal the list fills the screen and is drawn
anew; elsewhere each look is printed below the last. ^C ends it.`,
		Example: `  tailsplice top
  tailsplice top --interval 5s
  tailsplice top --json --rounds 1 | jq '.flows[0]'   # the busiest of one second`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < 100*time.Millisecond {
				return &usageError{fmt.Errorf("--interval %v is too short: 100ms at least", every)}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			show := printTop
			screen := term.IsTerminal(int(os.Stdout.Fd()))
			switch {
			case asJSON:
				show = func(w io.Writer, t topLook, _ int) error { return json.NewEncoder(terminal{w}).Encode(t) }
			case screen:
				show = redraw
			}
			return watchFlows(ctx, admin.Client{Socket: control}, every, rounds, func(t topLook) error {
				lines := 0 // all
				if _, height, err := term.GetSize(int(os.Stdout.Fd())); screen && err == nil {
					lines = max(height-3, 1)
				}
				if !asJSON {
					if err := printable(&t); err != nil {
						return err
					}
				}
				return show(cmd.OutOrStdout(), t, lines)
			})
		},
	}
	cmd.Flags().DurationVar(&every, "interval", time.Second, "time from one look to the next")
	cmd.Flags().IntVarP(&rounds, "rounds", "n", 0, "end after so many looks; 0 goes on")
	controlFlag(cmd, &control)
	jsonFlag(cmd, &asJSON)
	return cmd
}

// topFlow is a flow and the bytes a second that it moved since the last look.
type topFlow struct {
	flow.Snapshot
	UpRate   float64 `json:"up_rate"`
	DownRate float64 `json:"down_rate"`
}

// topLook is what `top --json` prints, one a line: rates are bytes a second.
type topLook struct {
	Time     time.Time `json:"time"`
	UpRate   float64   `json:"up_rate"`
	DownRate float64   `json:"down_rate"`
	Flows    []topFlow `json:"flows"` // the busiest first
}

// watchFlows looks every so often, and shows from the second look on, when
// there is something to compare with. It ends with ctx, without an error.
func watchFlows(ctx context.Context, c admin.Client, every time.Duration, rounds int, show func(topLook) error) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var last []flow.Snapshot
	var lastTime time.Time
	for shown := 0; ; {
		actx, cancel := context.WithTimeout(ctx, answerTimeout)
		var now []flow.Snapshot
		err := c.Get(actx, "flows", &now)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		at := time.Now()
		if !lastTime.IsZero() {
			if err := show(compareLooks(last, now, lastTime, at)); err != nil {
				return err
			}
			if shown++; shown == rounds {
				return nil
			}
		}
		last, lastTime = now, at
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// compareLooks gives the flows of now with their rates since last. What began in
// between counts from its beginning.
func compareLooks(last, now []flow.Snapshot, lastTime, at time.Time) topLook {
	// Two flows may share an id: both connections of a path that comes by this
	// node twice.
	type key struct {
		id, downstream string
		started        time.Time
	}
	before := make(map[key]flow.Snapshot, len(last))
	for _, f := range last {
		before[key{f.ID, f.Downstream, f.Started}] = f
	}
	t := topLook{Time: at, Flows: make([]topFlow, 0, len(now))}
	seconds := at.Sub(lastTime).Seconds()
	for _, f := range now {
		b := before[key{f.ID, f.Downstream, f.Started}]
		tf := topFlow{f, float64(f.BytesUp-b.BytesUp) / seconds, float64(f.BytesDown-b.BytesDown) / seconds}
		t.UpRate += tf.UpRate
		t.DownRate += tf.DownRate
		t.Flows = append(t.Flows, tf)
	}
	slices.SortStableFunc(t.Flows, func(a, b topFlow) int { return cmp.Compare(b.UpRate+b.DownRate, a.UpRate+a.DownRate) })
	return t
}

// printTop writes the first flows of a look, or all where lines is 0.
func printTop(w io.Writer, t topLook, lines int) error {
	fmt.Fprintf(w, "%s  %s, up %s/s, down %s/s\n", t.Time.Format(time.TimeOnly), plural(len(t.Flows), "flow"), bytes(int64(t.UpRate)), bytes(int64(t.DownRate)))
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "UP/S\tDOWN/S\tUP\tDOWN\tAGE\tDATAPATH\tNAME\tCLIENT\tUPSTREAM\tID")
	for i, f := range t.Flows {
		if lines > 0 && i == lines {
			break
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", bytes(int64(f.UpRate)), bytes(int64(f.DownRate)), bytes(f.BytesUp), bytes(f.BytesDown),
			age(f.Started, t.Time), f.Datapath, f.Name, f.Client, f.Target, f.ID)
	}
	return tw.Flush()
}

// redraw is printTop on a cleared screen.
func redraw(w io.Writer, t topLook, lines int) error {
	const home, clearBelow, cutLines, wrapLines = "\x1b[H", "\x1b[J", "\x1b[?7l", "\x1b[?7h"
	fmt.Fprint(w, cutLines, home, clearBelow)
	err := printTop(w, t, lines)
	fmt.Fprint(w, wrapLines)
	return err
}
