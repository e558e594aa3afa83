package conduct

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/agent"
	"github.com/tailsplice/tailsplice/test/bench/stream"
	"github.com/tailsplice/tailsplice/test/bench/topology"
)

// agents are the client and the server of a topology.
type agents struct {
	client, server agent.Remote
	procs          []*exec.Cmd
	cell           uint32
}

func startAgents(t *topology.Topology) (_ *agents, err error) {
	hello, err := stream.Hello()
	if err != nil {
		return nil, err
	}
	a := &agents{}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if a.server, err = a.start(t.Server, agent.Start{Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), topology.ServerPort), Hello: hello}); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if a.client, err = a.start(t.Client, agent.Start{Hello: hello}); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	return a, nil
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

// limit is how long flows may take to end after the time of a job is over.
const limit = 10 * time.Second

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
func (a *agents) run(ctx context.Context, j agent.Job) (agent.Report, error) {
	a.cell++
	j.Cell, j.Limit = a.cell, limit
	return bounded(ctx, j.Duration+limit, func() (agent.Report, error) { return a.client.Run(j) })
}

// broken is a system's fault: a byte or a flow was lost.
type broken struct{ error }

// settle compares what both ends saw of the latest job, and forgets it. An error of type broken is the system's fault.
func (a *agents) settle(ctx context.Context, near agent.Report) (far agent.Report, err error) {
	defer a.server.Forget(a.cell)
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		far, err = bounded(ctx, 0, func() (agent.Report, error) { return a.server.Report(a.cell) })
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
