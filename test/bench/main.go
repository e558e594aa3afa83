// Command bench compares tailsplice with what people would use instead, side by side on one machine: `make
// bench` runs it.
//
//	bench run [--mode quick|full]    measure: prints a table, writes build/bench.json, bench.txt (for
//	                                 benchstat) and bench.svg
//	bench compare OLD.json NEW.json  tell what changed between two runs; status 1 if something got worse
//	bench show RUN.json              print the table of a run again
//	bench publish                    write test/bench/recorded.json into README, docs and the charts there
//
// It needs root and Linux. Everything that it makes is in network namespaces and directories whose names
// begin with ts-bench- (the tailnet's with tsl-), and is removed however it ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/agent"
	"github.com/tailsplice/tailsplice/test/bench/conduct"
	"github.com/tailsplice/tailsplice/test/bench/report"
	"github.com/tailsplice/tailsplice/test/bench/topology"
)

func main() {
	os.Exit(command(os.Args[1:]))
}

func command(args []string) int {
	if len(args) == 0 {
		args = []string{"run"}
	}
	var err error
	switch verb, rest := args[0], args[1:]; verb {
	case "agent": // a process of the run itself
		debug.SetGCPercent(400)
		agent.Serve()
	case "run":
		err = run(rest)
	case "compare":
		return compare(rest)
	case "show":
		var r *report.Run
		if len(rest) != 1 {
			err = errors.New("usage: bench show RUN.json")
		} else if r, err = report.Read(rest[0]); err == nil {
			r.Table(os.Stdout)
		}
	case "publish":
		err = publish(".")
	default:
		err = fmt.Errorf("there is no command %q: run, compare, show, publish", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// maxTime ends every run, whatever hangs. A run that goes well needs less than 20 minutes.
const maxTime = 25 * time.Minute

func run(args []string) error {
	var o conduct.Options
	flags := flag.NewFlagSet("bench run", flag.ExitOnError)
	mode := flags.String("mode", "full", "quick (under 3 minutes) or full (under 20)")
	out := flags.String("out", "build", "`directory` for bench.json, bench.txt, bench.svg")
	flags.StringVar(&o.Tailsplice, "tailsplice", "build/tailsplice", "the daemon's binary")
	flags.StringVar(&o.Baseline, "baseline", "", "another build of the daemon, to compare with in the same rounds")
	flags.StringVar(&o.GoProxy, "goproxy", "build/bench-goproxy", "the plain Go proxy's binary")
	flags.StringVar(&o.Caddy, "caddy", "build/bench-caddy", "Caddy's binary; without it Caddy is left out")
	flags.IntVar(&o.Rounds, "rounds", 5, "rounds of each test")
	flags.DurationVar(&o.Time, "time", 0, "how long to measure (default: what the mode promises)")
	flags.DurationVar(&o.Cell, "cell", 0, "how long each cell has load (default: as it fits); for profiling")
	list := func(name, usage string) *string {
		return flags.String(name, "", usage+", separated by commas (default: all)")
	}
	topologies, tests := list("topologies", "veth, tailnet"), list("tests", "tests by the beginning of their names")
	systems, datapaths := list("systems", "systems by the beginning of their names; direct and haproxy always run"), list("datapaths", "our datapaths")
	flags.Parse(args)
	if flags.NArg() > 0 || *mode != "quick" && *mode != "full" {
		return errors.New("usage: bench run [--mode quick|full] (see --help)")
	}
	if lacks := topology.Lacks(); lacks != "" {
		return fmt.Errorf("this machine lacks %s", lacks)
	}
	o.Quick = *mode == "quick"
	o.Topologies, o.Tests, o.Systems, o.Datapaths = split(*topologies), split(*tests), split(*systems), split(*datapaths)
	if _, err := os.Stat(o.Caddy); err != nil {
		o.Caddy = ""
	}
	for _, p := range []*string{&o.Caddy, &o.Tailsplice, &o.Baseline, &o.GoProxy} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err == nil {
			_, err = os.Stat(abs)
		}
		if err != nil {
			return fmt.Errorf("%w (make bench builds it)", err)
		}
		*p = abs
	}
	begin := time.Now()
	o.Progress = func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%5.0fs  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	own, err := topology.NewRun()
	if err != nil {
		return err
	}
	defer own.Close()
	o.Dir = own.Dir
	r, err := conduct.Run(ctx, o)
	if err != nil {
		// What there is by now may still tell something.
		r.Fail("the run ended early: %v", err)
	}
	if err := write(r, *out); err != nil {
		return err
	}
	r.Table(os.Stdout)
	fmt.Printf("\nwritten: %s/bench.json, bench.txt (benchstat), bench.svg\n", *out)
	if n := len(r.Failures); n > 0 {
		return fmt.Errorf("%d failures: see FAILED above", n)
	}
	return nil
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

func write(r *report.Run, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := r.Write(filepath.Join(dir, "bench.json")); err != nil {
		return err
	}
	var text, chart strings.Builder
	r.Benchstat(&text)
	r.Chart(&chart)
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "bench.txt"), []byte(text.String()), 0o644),
		os.WriteFile(filepath.Join(dir, "bench.svg"), []byte(chart.String()), 0o644))
}

func compare(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: bench compare OLD.json NEW.json")
		return 2
	}
	was, err := report.Read(args[0])
	now, err2 := report.Read(args[1])
	if err := errors.Join(err, err2); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	if now.Compare(os.Stdout, was) > 0 {
		return 1
	}
	return 0
}
