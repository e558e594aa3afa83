package conduct

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/report"
	"github.com/tailsplice/tailsplice/test/bench/system"
	"github.com/tailsplice/tailsplice/test/bench/topology"
)

// Options says what to run.
type Options struct {
	Quick      bool
	Rounds     int           // 0 = 5
	Time       time.Duration // that the measuring may take; 0 = what the mode promises
	Cell       time.Duration // of load in each cell, whatever the time that is left; 0 = as it fits
	Topologies []string      // nil = all
	Tests      []string      // names or beginnings of names; nil = all of the mode
	Systems    []string      // likewise; direct and haproxy are always there
	Datapaths  []string      // nil = all that the daemon says it has
	Dir        string        // of the run: configurations, logs
	Tailsplice string        // binary of the daemon
	Baseline   string        // binary of another build of the daemon to compare with, or ""
	GoProxy    string        // binary of the plain Go proxy
	Caddy      string        // binary of Caddy, or "": it is left out
	Progress   func(format string, args ...any)
}

// Budgets of the two modes, which leave room in 3 and 20 minutes for starting and ending.
const (
	quickTime = 140 * time.Second
	fullTime  = 19*time.Minute + 25*time.Second
)

// leastScale is the least part of a test's duration that is still worth to be run.
const leastScale = 0.25

// lateness is how far a test that has begun may go beyond the time that there is.
const lateness = 20 * time.Second

// conductor is a run in one topology.
type conductor struct {
	*Options
	topology *topology.Topology
	agents   *agents
	builder  *system.Builder
	systems  []*system.System
	// terminating are those that terminate TLS, if a test wants them.
	terminating []*system.System
	run         *report.Run
	deadline    time.Time
}

// Run runs everything and returns what was measured, also with an error.
func Run(ctx context.Context, o Options) (*report.Run, error) {
	if o.Rounds == 0 {
		o.Rounds = 5
	}
	if o.Time == 0 {
		o.Time = fullTime
		if o.Quick {
			o.Time = quickTime
		}
	}
	r := report.New(o.Quick, o.Rounds)
	begin := time.Now()
	defer func() {
		r.Seconds = math.Round(time.Since(begin).Seconds())
		r.Finish()
	}()
	if busy := idleMachine(); busy > 0.05 {
		r.Warn("the machine was %.0f%% busy before the run began: expect noise", busy*100)
		o.Progress("warning: %s", r.Warnings[len(r.Warnings)-1])
	}
	names := o.Topologies
	if names == nil {
		names = []string{"veth", "tailnet"}
	}
	// The tailnet has fewer tests on fewer systems.
	share := map[string]float64{"veth": 0.8, "tailnet": 0.2}
	for i, name := range names {
		left := o.Time - time.Since(begin)
		if i < len(names)-1 {
			left = time.Duration(float64(left) * share[name])
		}
		if err := o.in(ctx, name, r, left); err != nil {
			return r, fmt.Errorf("%s: %w", name, err)
		}
	}
	return r, nil
}

// idleMachine is the part of the machine that is busy while we are not.
func idleMachine() float64 {
	var s system.System
	from, err := s.ReadCPU()
	if err != nil {
		return 0
	}
	begin := time.Now()
	time.Sleep(time.Second)
	to, _ := s.ReadCPU()
	return to.Since(from).Machine / time.Since(begin).Seconds() / float64(system.CPUs())
}

// in runs one topology.
func (o *Options) in(ctx context.Context, name string, r *report.Run, left time.Duration) (err error) {
	c := &conductor{Options: o, run: r, deadline: time.Now().Add(left)}
	switch name {
	case "veth":
		c.topology, err = topology.NewVeth()
	case "tailnet":
		c.topology, err = topology.NewTailnet(ctx, o.Progress)
	default:
		err = errors.New("no such topology: veth, tailnet")
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.topology.Close()) }()
	if c.agents, err = startAgents(c.topology); err != nil {
		return err
	}
	defer c.agents.close()
	c.builder = &system.Builder{
		Topology: c.topology, Dir: filepath.Join(o.Dir, name),
		Tailsplice: o.Tailsplice, GoProxy: o.GoProxy, Baseline: o.Baseline, Caddy: o.Caddy,
	}
	defer c.builder.Close()
	if err := c.start(ctx); err != nil {
		return err
	}
	r.Notes = append(r.Notes, fmt.Sprintf("%s: direct is: %s", name, c.topology.Note))
	return c.measure(ctx)
}

// start starts the systems of the topology and the mode, in the order of their turns.
func (c *conductor) start(ctx context.Context) error {
	datapaths := c.Datapaths
	if datapaths == nil {
		var err error
		if datapaths, err = c.builder.Datapaths(ctx); err != nil {
			return err
		}
	}
	var ours []string
	for _, d := range datapaths {
		if c.Baseline != "" {
			ours = append(ours, "baseline/"+d)
		}
		ours = append(ours, "tailsplice/"+d)
	}
	others := []string{"dnat", system.HAProxySplice, "nginx", "sniproxy", "socat", "goproxy"}
	switch {
	case c.topology.Name == "tailnet" && c.Quick:
		others = nil
	case c.topology.Name == "tailnet":
		others = []string{"nginx", "goproxy"}
	case c.Quick:
		others = []string{system.HAProxySplice, "nginx"}
	}
	names := append([]string{system.Direct, system.HAProxy}, slices.DeleteFunc(slices.Concat(others, ours), func(n string) bool {
		return !chosen(c.Systems, n)
	})...)
	names = append(names, system.DirectAgain)
	for _, n := range names {
		s, err := c.builder.Start(ctx, n)
		if err != nil {
			return err
		}
		c.systems = append(c.systems, s)
		if n != system.DirectAgain {
			c.run.Versions[n] = s.Version
		}
	}
	return nil
}

// takingPart are the systems of a test.
func (c *conductor) takingPart(t *test) []*system.System {
	all := c.systems
	if t.https {
		all = c.terminating
	}
	if t.only == nil {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(s *system.System) bool { return !chosen(t.only, s.Name+"$") })
}

// chosen says whether the name, or the beginning of it, is in the list; nil has all.
func chosen(list []string, name string) bool {
	return list == nil || slices.ContainsFunc(list, func(l string) bool { return strings.HasPrefix(name, l) })
}

// measure runs the tests.
func (c *conductor) measure(ctx context.Context) error {
	var plan []*test
	cost, fixed := time.Duration(0), time.Duration(0)
	for _, t := range tests(system.MaxFlows(), c.Quick) {
		switch {
		case c.Quick && !t.quick, !chosen(c.Tests, t.name):
			continue
		case t.https && c.topology.Name != "veth",
			c.topology.Name == "tailnet" && (t.tailnet == never || c.Quick && t.tailnet != inQuick), t.loss > 0 && c.topology.SetLoss == nil, t.far && !c.topology.Far.IsValid():
			continue
		}
		if t.https && c.terminating == nil {
			if err := c.startTerminating(ctx); err != nil {
				return err
			}
		}
		plan = append(plan, t)
		cells := time.Duration(c.rounds(t) * len(c.takingPart(t)))
		cost += t.duration * cells
		fixed += (t.fixed + 60*time.Millisecond) * cells
	}
	scale := min(1, float64(time.Until(c.deadline)-fixed)/float64(cost))
	if c.Quick {
		scale = min(scale, 0.5)
	}
	if c.Cell > 0 {
		for _, t := range plan {
			t.duration = c.Cell
		}
		scale = 1
	}
	if scale < leastScale {
		c.run.Warn("%s: there is too little time for all %d systems: what doesn't fit is left out", c.topology.Name, len(c.systems))
		scale = leastScale
	}
	for i, t := range plan {
		if time.Now().After(c.deadline) {
			c.run.LeftOut = append(c.run.LeftOut, fmt.Sprintf("%s %s: no time left", c.topology.Name, t.name))
			continue
		}
		c.Progress("%s %d/%d %s: %d rounds of %d systems, %s left", c.topology.Name, i+1, len(plan), t.name, c.rounds(t),
			len(c.takingPart(t)), time.Until(c.deadline).Round(time.Second))
		if t.remark != "" {
			c.run.Notes = append(c.run.Notes, fmt.Sprintf("%s %s: %s", c.topology.Name, t.name, t.remark))
		}
		if err := c.test(ctx, t, max(t.least, time.Duration(scale*float64(t.duration)).Round(time.Millisecond))); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	return nil
}

func (o *Options) rounds(t *test) int {
	if t.rounds > 0 {
		return min(o.Rounds, t.rounds)
	}
	return o.Rounds
}

// test runs all rounds of a test.
func (c *conductor) test(ctx context.Context, t *test, d time.Duration) error {
	if t.loss > 0 {
		if err := c.topology.SetLoss(t.loss); err != nil {
			return err
		}
		defer c.topology.SetLoss(0)
	}
	for round := range c.rounds(t) {
		if over := time.Since(c.deadline); over > lateness {
			c.run.LeftOut = append(c.run.LeftOut, fmt.Sprintf("%s %s: no time for more than %d rounds", c.topology.Name, t.name, round))
			return nil
		}
		values := map[string][]value{}
		systems := c.takingPart(t)
		for _, s := range systems {
			if s.MaxFlows > 0 && t.flows > s.MaxFlows {
				if round == 0 {
					c.run.LeftOut = append(c.run.LeftOut, fmt.Sprintf("%s %s: %s is not made for %d flows", c.topology.Name, t.name, s.Name, t.flows))
				}
				continue
			}
			v, err := c.turn(ctx, t, s, d)
			var fault broken
			if errors.As(err, &fault) {
				c.run.Fail("%s %s %s, round %d: %v", c.topology.Name, t.name, s.Name, round+1, err)
				c.Progress("FAILED: %s", c.run.Failures[len(c.run.Failures)-1])
			} else if err != nil {
				return fmt.Errorf("%s: %w", s.Name, err)
			}
			values[s.Name] = v
		}
		direct := values[system.Direct]
		for _, s := range systems {
			for _, b := range t.beyond {
				all, ok := get(values[s.Name], b[0])
				if plain, has := get(direct, b[0]); ok && has {
					values[s.Name] = append(values[s.Name], value{b[1], all - plain})
				}
			}
			for _, v := range values[s.Name] {
				c.run.Add(c.topology.Name, s.Name, v.measure, round, v.value)
				if t.remark != "" {
					c.run.Remark(c.topology.Name, v.measure, t.remark)
				}
			}
		}
	}
	return nil
}

// turn is one cell.
func (c *conductor) turn(ctx context.Context, t *test, s *system.System, d time.Duration) (values []value, err error) {
	if !s.Alive() || t.fresh {
		crashed := !s.Alive()
		log := s.Log()
		if err := c.builder.Restart(ctx, s); err != nil {
			return nil, err
		}
		if crashed {
			return nil, broken{fmt.Errorf("it has ended: %s", log)}
		}
	}
	if t.copies > 1 {
		if err := c.agents.grow(t.copies); err != nil {
			return nil, err
		}
		stop, err := c.builder.Multiply(ctx, s, t.copies)
		if err != nil {
			return nil, err
		}
		defer stop()
	}
	if err := s.Enter(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Leave()) }()
	run := &cellRun{test: t, conductor: c, system: s, time: d}
	if err := t.run(ctx, run); err != nil {
		if !s.Alive() {
			err = broken{fmt.Errorf("%w; it has ended: %s", err, s.Log())}
		}
		return nil, err
	}
	return run.values, nil
}
