package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

// errRounds ends a watch that has shown what was asked for.
var errRounds = errors.New("all rounds are shown")

func newTop() *cobra.Command {
	var a asker
	var every time.Duration
	var rounds int
	var f flowFilter
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch the live flows, the busiest first",
		Long: `Watch the live flows, the busiest first, with the bytes per second of each since
the last update. On a terminal the list fills the screen, and keys change it:

  q, ^C   quit
  s       sort by the next of rate, bytes, age, name, client, route
  r       reverse the order
  /       show only flows with a text in their name, client, route, target,
          listener, datapath or id: type it, then Enter; Esc shows all again

Elsewhere each update is printed below the one before.`,
		Example: `  tailsplice top
  tailsplice top --route '*.example.org' --sort age
  tailsplice top --json --rounds 1 --limit 1   # the busiest flow of one second`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < flow.MinInterval {
				return &usageError{fmt.Errorf("--interval %v is too short: %v at least", every, flow.MinInterval)}
			}
			q, err := f.query()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			w := watch{client: a.Client, every: every, rounds: rounds}
			if !a.asJSON && term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())) {
				return runScreen(ctx, w, q)
			}
			out := terminal{cmd.OutOrStdout()}
			return w.run(ctx, q, func(line []byte) error {
				if a.asJSON {
					_, err := out.Write(line)
					return err
				}
				l, err := readSample(line)
				if err != nil {
					return err
				}
				return printTop(cmd.OutOrStdout(), l)
			})
		},
	}
	cmd.Flags().DurationVar(&every, "interval", time.Second, "the `time` between updates, at least 100ms")
	cmd.Flags().IntVarP(&rounds, "rounds", "n", 0, "end after this `number` of updates; 0 means never")
	f.flags(cmd)
	cmd.Flags().StringVar(&f.sort, "sort", flow.Sorts[0], "the `order` of the flows: "+strings.Join(flow.Sorts, ", "))
	cmd.Flags().BoolVar(&f.Reverse, "reverse", false, "reverse the order")
	cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(flow.Sorts, cobra.ShellCompDirectiveNoFileComp))
	return a.flags(cmd)
}

// flowFilter is what the flags of flows and top choose.
type flowFilter struct {
	flow.Query
	client, sort string
}

func (f *flowFilter) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.Name, "name", "", "show only flows with this `text` in their server name or host")
	cmd.Flags().StringVar(&f.client, "client", "", "show only flows of this client: an `address`, or a range such as 192.0.2.0/24")
	cmd.Flags().StringVar(&f.Route, "route", "", "show only flows with this `text` in their route")
	cmd.Flags().IntVar(&f.Limit, "limit", 0, "show only the first flows, up to this `number`; 0 means all")
}

// query is what the flags say. The error is one of usage.
func (f *flowFilter) query() (flow.Query, error) {
	v := f.Values()
	if f.client != "" {
		v.Set("client", f.client)
	}
	if f.sort != "" {
		v.Set("sort", f.sort)
	}
	q, err := flow.ParseQuery(v)
	if err == nil && f.Limit < 0 {
		err = fmt.Errorf("limit %d: write 0, or how many", f.Limit)
	}
	if err != nil {
		return q, &usageError{fmt.Errorf("--%w", err)}
	}
	return q, nil
}

// watch is how the flows of a daemon are watched.
type watch struct {
	client admin.Client
	every  time.Duration
	rounds int // 0: until ctx ends
}

// run shows each sample, a line of JSON. It ends with ctx or after the last round, without an error.
func (w watch) run(ctx context.Context, q flow.Query, show func(line []byte) error) error {
	v := q.Values()
	v.Set("interval", w.every.String())
	shown := 0
	err := w.client.Lines(ctx, "top?"+v.Encode(), func(line []byte) error {
		err := show(line)
		if shown++; err == nil && shown == w.rounds {
			err = errRounds
		}
		return err
	})
	if ctx.Err() != nil || errors.Is(err, errRounds) {
		return nil
	}
	return err
}

// readSample reads a line. Its texts stay on their lines, and command no terminal.
func readSample(line []byte) (l flow.Sample, err error) {
	err = json.Unmarshal(line, &l)
	for i := range l.Flows {
		printableFlow(&l.Flows[i].Snapshot)
	}
	return l, err
}

// headline says what a sample is of.
func headline(l flow.Sample) string {
	of := plural(l.Live, "flow")
	if l.Matching != l.Live {
		of = fmt.Sprintf("%d of %s", l.Matching, of)
	}
	return fmt.Sprintf("%s  %s, up %s/s, down %s/s", l.Time.Local().Format(time.TimeOnly), of,
		bytes(int64(l.UpRate)), bytes(int64(l.DownRate)))
}

// printTop writes a sample where there is no screen to fill.
func printTop(w io.Writer, l flow.Sample) error {
	fmt.Fprintln(w, headline(l))
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var heads []string
	for _, c := range topColumns {
		heads = append(heads, c.head)
	}
	fmt.Fprintln(tw, strings.Join(heads, "\t"))
	cells := make([]string, len(topColumns))
	for i := range l.Flows {
		for j, c := range topColumns {
			cells[j] = c.cell(&l.Flows[i], l.Time)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	return tw.Flush()
}

// topColumn is a column of top. Numbers have a width; texts get what there is, width at least, and are cut.
type topColumn struct {
	head  string
	width int
	text  bool
	from  int // the screen's columns from which it is shown
	cell  func(f *flow.Rate, now time.Time) string
}

var topColumns = []topColumn{
	{"UP/S", 8, false, 0, func(f *flow.Rate, _ time.Time) string { return bytes(int64(f.UpRate)) }},
	{"DOWN/S", 8, false, 0, func(f *flow.Rate, _ time.Time) string { return bytes(int64(f.DownRate)) }},
	{"UP", 8, false, 120, func(f *flow.Rate, _ time.Time) string { return bytes(f.BytesUp) }},
	{"DOWN", 8, false, 120, func(f *flow.Rate, _ time.Time) string { return bytes(f.BytesDown) }},
	{"AGE", 6, false, 0, func(f *flow.Rate, now time.Time) string { return shortAge(now.Sub(f.Started)) }},
	{"DATAPATH", 9, true, 60, func(f *flow.Rate, _ time.Time) string { return f.Datapath }},
	{"NAME", 12, true, 0, func(f *flow.Rate, _ time.Time) string { return f.Name }},
	{"CLIENT", 15, true, 48, func(f *flow.Rate, _ time.Time) string { return f.Client }},
	{"TARGET", 20, true, 100, func(f *flow.Rate, _ time.Time) string { return f.Target }},
	{"ROUTE", 15, true, 140, func(f *flow.Rate, _ time.Time) string { return f.Route }},
	{"ID", 32, true, 180, func(f *flow.Rate, _ time.Time) string { return f.ID }},
}

// shortAge is d in six characters.
func shortAge(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

// layout is how wide each of topColumns is on a screen of so many columns; 0: not shown. The texts share what
// the numbers leave, in the measure of what they need.
func layout(screen int, flows []flow.Rate, now time.Time) []int {
	widths, needs := make([]int, len(topColumns)), make([]int, len(topColumns))
	left := screen + 1
	for i, c := range topColumns {
		if c.from > screen {
			continue
		}
		widths[i], needs[i] = c.width, c.width
		left -= c.width + 1
		if !c.text {
			continue
		}
		for j := range flows {
			needs[i] = max(needs[i], len([]rune(c.cell(&flows[j], now))))
		}
	}
	for grew := true; left > 0 && grew; {
		grew = false
		for i := range widths {
			if left > 0 && widths[i] < needs[i] {
				widths[i], left, grew = widths[i]+1, left-1, true
			}
		}
	}
	return widths
}

// fit makes s width wide, with numbers on the right.
func fit(s string, width int, right bool) string {
	r := []rune(s)
	if len(r) > width {
		return string(r[:max(width-1, 0)]) + "…"
	}
	pad := strings.Repeat(" ", width-len(r))
	if right {
		return pad + s
	}
	return s + pad
}

// The colours of a screen.
const (
	plain    = "\x1b[0m"
	reversed = "\x1b[7m"
	faint    = "\x1b[2m"
	green    = "\x1b[32m"
)

// screen is what top shows on a terminal.
type screen struct {
	query  flow.Query
	sample *flow.Sample // nil: none yet
	typing bool         // a filter
	typed  string
	colour bool
}

// draw is the screen's lines, none longer than width, colours aside.
func (s *screen) draw(width, height int) []string {
	paint := func(colour, text string) string {
		if !s.colour || text == "" || colour == "" {
			return text
		}
		return colour + text + plain
	}
	l := s.sample
	if l == nil {
		l = &flow.Sample{Time: time.Now()}
	}
	rows := l.Flows[:min(len(l.Flows), max(height-3, 0))]
	widths := layout(width, rows, l.Time)
	title := "looking ..."
	if s.sample != nil {
		title = headline(*l)
	}
	line := func(cell func(c topColumn) string, colour func(c topColumn) string) string {
		var parts []string
		for i, c := range topColumns {
			if widths[i] > 0 {
				parts = append(parts, paint(colour(c), fit(cell(c), widths[i], !c.text)))
			}
		}
		return strings.Join(parts, " ")
	}
	heads := line(func(c topColumn) string { return c.head }, func(topColumn) string { return "" })
	lines := []string{fit(title, width, false), paint(reversed, fit(heads, width, false))}
	for i := range rows {
		f := &rows[i]
		lines = append(lines, line(func(c topColumn) string { return c.cell(f, l.Time) }, func(c topColumn) string {
			switch {
			case f.UpRate+f.DownRate == 0:
				return faint
			case c.head == "DATAPATH" && f.Datapath != "userspace":
				return green
			}
			return plain
		}))
	}
	for len(lines) < height-1 {
		lines = append(lines, "")
	}
	order := s.query.Sort
	if s.query.Reverse {
		order += ", reversed"
	}
	foot := fmt.Sprintf("q quit  s sort: %s  r reverse  / filter: %s", order, s.query.Text)
	if s.typing {
		foot = "/" + s.typed + "_"
	}
	return append(lines[:max(height-1, 0)], fit(foot, width, false))
}

// What a key makes of the screen.
const (
	keyNothing = iota
	keyRedraw
	keyAsk // the daemon, with another query
	keyQuit
)

// key takes what was typed.
func (s *screen) key(b byte) int {
	const ctrlC, escape, backspace, del = 3, 27, 8, 127
	if s.typing {
		switch {
		case b == '\r' || b == '\n':
			s.typing, s.query.Text = false, s.typed
			return keyAsk
		case b == escape:
			s.typing = false
		case b == ctrlC:
			return keyQuit
		case b == backspace || b == del:
			s.typed = s.typed[:max(len(s.typed)-1, 0)]
		case b > ' ' && b < del:
			s.typed += string(b)
		default:
			return keyNothing
		}
		return keyRedraw
	}
	switch b {
	case 'q', 'Q', ctrlC:
		return keyQuit
	case 's':
		s.query.Sort = flow.Sorts[(slices.Index(flow.Sorts, s.query.Sort)+1)%len(flow.Sorts)]
		return keyAsk
	case 'r':
		s.query.Reverse = !s.query.Reverse
		return keyAsk
	case '/':
		s.typing, s.typed = true, s.query.Text
		return keyRedraw
	case escape:
		if s.query.Text == "" {
			return keyNothing
		}
		s.query.Text = ""
		return keyAsk
	}
	return keyNothing
}

// fewestRows is how many flows a screen asks for at least: it may grow.
const fewestRows = 100

// runScreen shows what w sees on the terminal, until somebody quits.
func runScreen(ctx context.Context, w watch, q flow.Query) error {
	in, out := int(os.Stdin.Fd()), int(os.Stdout.Fd())
	was, err := term.MakeRaw(in)
	if err != nil {
		return err
	}
	defer term.Restore(in, was)
	const enter, leave = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l" // another screen, no cursor
	os.Stdout.WriteString(enter)
	defer os.Stdout.WriteString(leave)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &screen{query: q, colour: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	if s.query.Sort == "" {
		s.query.Sort = flow.Sorts[0]
	}
	keys := make(chan byte)
	go func() { // ends with the process, or the terminal
		defer cancel()
		readKeys(ctx, keys)
	}()
	samples := make(chan seen)
	shown := 0
	stop := w.sample(ctx, s.query, samples)
	defer func() { stop() }()
	s.show(out)
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-samples:
			if l.err != nil {
				return l.err
			}
			if limit := q.Limit; limit > 0 {
				l.sample.Flows = l.sample.Flows[:min(len(l.sample.Flows), limit)]
			}
			s.sample = &l.sample
			s.show(out)
			if shown++; shown == w.rounds {
				return nil
			}
		case b := <-keys:
			switch s.key(b) {
			case keyQuit:
				return nil
			case keyAsk:
				stop()
				stop = w.sample(ctx, s.query, samples)
				s.show(out)
			case keyRedraw:
				s.show(out)
			}
		}
	}
}

// show draws the screen on a terminal.
func (s *screen) show(out int) {
	width, height, err := term.GetSize(out)
	if err != nil || width <= 0 || height <= 0 {
		width, height = 80, 24
	}
	const home, clearLine, wrapOff, wrapOn = "\x1b[H", "\x1b[K", "\x1b[?7l", "\x1b[?7h"
	lines := strings.Join(s.draw(width, height), clearLine+"\r\n")
	os.Stdout.WriteString(wrapOff + home + lines + clearLine + wrapOn)
}

// readKeys sends what is typed, until ctx ends or the terminal does.
func readKeys(ctx context.Context, keys chan<- byte) {
	b := make([]byte, 64)
	for {
		n, err := os.Stdin.Read(b)
		if err != nil {
			return
		}
		if n > 2 && b[0] == 27 { // an arrow or such: not an Esc
			continue
		}
		for _, c := range b[:n] {
			select {
			case keys <- c:
			case <-ctx.Done():
				return
			}
		}
	}
}

// seen is a sample, or why there will be none.
type seen struct {
	sample flow.Sample
	err    error
}

// sample sends what w sees to samples, until stop is called or ctx ends.
func (w watch) sample(ctx context.Context, q flow.Query, samples chan<- seen) (stop func()) {
	ctx, stop = context.WithCancel(ctx)
	q.Limit = max(q.Limit, fewestRows)
	w.rounds = 0
	send := func(l seen) {
		select {
		case samples <- l:
		case <-ctx.Done():
		}
	}
	go func() {
		err := w.run(ctx, q, func(line []byte) error {
			l, err := readSample(line)
			if err == nil {
				send(seen{sample: l})
			}
			return err
		})
		if ctx.Err() == nil {
			send(seen{err: err})
		}
	}()
	return stop
}
