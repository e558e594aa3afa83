package conduct

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/agent"
	"github.com/tailsplice/tailsplice/test/bench/stream"
	"github.com/tailsplice/tailsplice/test/bench/topology"
)

// agents are the clients and the servers of a topology. All tests but those with more flows than a process
// may have files use the first pair.
type agents struct {
	*pair
	pairs    []*pair
	procs    []*exec.Cmd
	topology *topology.Topology
	hello    []byte
}

// pair is a client and its server.
type pair struct {
	client, server agent.Remote
	cell           uint32 // the latest
}

func startAgents(t *topology.Topology) (_ *agents, err error) {
	hello, err := stream.Hello()
	if err != nil {
		return nil, err
	}
	a := &agents{topology: t, hello: hello}
	if err := a.grow(1); err != nil {
		a.close()
		return nil, err
	}
	a.pair = a.pairs[0]
	return a, nil
}

// grow starts pairs until there are n. The server of the i-th listens on ServerPort+i.
func (a *agents) grow(n int) (err error) {
	for i := len(a.pairs); i < n; i++ {
		p := &pair{}
		listen := netip.AddrPortFrom(netip.IPv4Unspecified(), topology.ServerPort+uint16(i))
		if p.server, err = a.start(a.topology.Server, agent.Start{Listen: listen, Hello: a.hello}); err != nil {
			return fmt.Errorf("server: %w", err)
		}
		if p.client, err = a.start(a.topology.Client, agent.Start{Hello: a.hello}); err != nil {
			return fmt.Errorf("client: %w", err)
		}
		a.pairs = append(a.pairs, p)
	}
	return nil
}

// all runs f on the first n pairs at once, and returns the sum of what they report.
func (a *agents) all(n int, f func(i int, p *pair) (agent.Report, error)) (sum agent.Report, err error) {
	reports, errs := make([]agent.Report, n), make([]error, n)
	var wg sync.WaitGroup
	for i, p := range a.pairs[:n] {
		wg.Go(func() { reports[i], errs[i] = f(i, p) })
	}
	wg.Wait()
	for _, r := range reports {
		sum.Faults += r.Faults
	}
	return sum, errors.Join(errs...)
}

func (a *agents) start(on topology.Host, s agent.Start) (r agent.Remote, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	c := exec.Command(self, "agent")
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return r, err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := on.Start(c); err != nil {
		return r, err
	}
	a.procs = append(a.procs, c)
	r = agent.NewRemote(in, out)
	return r, r.Start(s)
}

func (a *agents) close() {
	for _, c := range a.procs {
		c.Process.Kill()
		c.Wait()
	}
}

// hung is how long an agent may take beyond its own limits before the whole run is given up.
const hung = 60 * time.Second

// limit is how long flows may take to end after the time of a job is over, or to be there if it has none.
const limit = 10 * time.Second

// each more than 1000 flows at once is given this in addition.
const limitPerThousand = 3 * time.Second

// bounded calls an agent; one that doesn't answer is an error of the run.
func bounded[T any](ctx context.Context, d time.Duration, f func() (T, error)) (v T, err error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		return v, ctx.Err()
	case <-time.After(d + hung):
		return v, errors.New("an agent doesn't answer")
	}
}

// run does a job.
func (p *pair) run(ctx context.Context, j agent.Job) (agent.Report, error) {
	p.cell++
	j.Cell, j.Limit = p.cell, limit+limitPerThousand*time.Duration(j.Flows/1000)
	return bounded(ctx, j.Duration+j.Limit, func() (agent.Report, error) { return p.client.Run(j) })
}

// broken is a system's fault: a byte or a flow was lost.
type broken struct{ error }

// settle compares what both ends saw of the latest job, and forgets it. An error of type broken is the
// system's fault.
func (p *pair) settle(ctx context.Context, near agent.Report) (far agent.Report, err error) {
	defer p.server.Forget(p.cell)
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		far, err = bounded(ctx, 0, func() (agent.Report, error) { return p.server.Report(p.cell) })
		if err != nil || far.Done >= near.Done || time.Now().After(deadline) {
			break
		}
	}
	switch {
	case err != nil:
	case near.Faults+far.Faults > 0:
		err = broken{fmt.Errorf("%d flows broke at the client %q, %d at the server %q", near.Faults, near.FaultTexts, far.Faults, far.FaultTexts)}
	case near.Done != near.Flows || far.Done != near.Done || far.Flows != near.Flows:
		err = broken{fmt.Errorf("of %d flows %d ended at the client; of %d, %d at the server", near.Flows, near.Done, far.Flows, far.Done)}
	case near.Sent != far.Received || near.Received != far.Sent:
		err = broken{fmt.Errorf("bytes up: %d sent, %d received; down: %d sent, %d received", near.Sent, far.Received, far.Sent, near.Received)}
	}
	return far, err
}
