package conduct

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/agent"
	"github.com/tailsplice/tailsplice/test/bench/stream"
	"github.com/tailsplice/tailsplice/test/bench/system"
)

// A test is one kind of load, and the measures that it yields.
type test struct {
	name     string
	duration time.Duration // of one cell in a full run, before it is scaled to the time that there is
	fixed    time.Duration // what a cell takes besides
	quick    bool          // part of a quick run
	// the least run in which it is made over the tailnet, where tailscaled is the bottleneck
	tailnet mode
	far     bool          // over the path with a delay
	loss    float64       // of the packets between client and proxy
	least   time.Duration // of one cell, however little time there is
	flows   int           // that an instance of a system has to be fit to hold
	copies  int           // instances of each system, with a client and a server each; 0 = 1
	only    []string      // systems by the beginning of their names; nil = all
	https   bool          // a test of systems that terminate TLS
	remark  string        // what the reader of its results has to know
	rounds  int           // at most; 0 = as many as the run has
	fresh   bool          // on a process that has not done anything yet
	run     func(ctx context.Context, c *cellRun) error
	// beyond derives for each system what it took beyond direct, in one round.
	beyond [][2]string
}

// cellRun is one run of a test on one system.
type cellRun struct {
	*test
	conductor *conductor
	system    *system.System
	time      time.Duration
	values    []value
}

// value is what a cell yields of one measure.
type value struct {
	measure string
	value   float64
}

func (c *cellRun) set(measure string, v float64) { c.values = append(c.values, value{measure, v}) }

// get is 0 where there is no such value.
func get(values []value, measure string) (v float64, ok bool) {
	for _, x := range values {
		if x.measure == measure {
			return x.value, true
		}
	}
	return 0, false
}

func (c *cellRun) job(kind agent.Kind, flows, size int) agent.Job {
	addr := c.system.Addr
	if c.far {
		addr = c.system.FarAddr
	}
	return agent.Job{Kind: kind, Addr: addr, Flows: flows, Size: size, Duration: c.time}
}

// mode is a kind of run.
type mode int

const (
	never mode = iota
	inFull
	inQuick
)

// leastBulk is longer than TCP waits before it sends again (RTO_MIN is 200 ms), so that one lost packet is
// not all of a cell.
const leastBulk = 300 * time.Millisecond

// longPause is worth a warning where no packet is lost on purpose: TCP has waited for a timer.
const longPause = 150 * time.Millisecond

const (
	mib = 1 << 20
	gib = 1 << 30
)

// tests in the order of their weight: when time gets short, the last ones are left out.
func tests(maxFlows int, quick bool) []*test {
	const bulkFlows = 4
	list := []*test{
		bulk("bulk_down", agent.Down, bulkFlows, test{duration: time.Second, quick: true, tailnet: inQuick}),
		bulk("bulk_up", agent.Up, bulkFlows, test{duration: time.Second, quick: true, tailnet: inFull}),
		requests("c32", 32, 200, test{quick: true, tailnet: inQuick}),
		requests("c1", 1, 200, test{quick: true, tailnet: inFull}),
		connects(),
		firstByte(),
		proxied(),
	}
	n := min(10_000, maxFlows)
	if quick {
		n = min(2000, maxFlows)
	}
	list = append(list,
		idle("idle_bytes", n, 1, test{quick: true, fixed: 2500 * time.Millisecond * time.Duration(n) / 10_000}),
		requests("c256", 256, 200, test{}),
		requests("c4", 4, 200, test{}),
		https("c32", 32, test{quick: true}),
		bulk("loss1_down", agent.Down, bulkFlows, test{duration: time.Second, loss: 0.01}),
		bulk("loss1_up", agent.Up, bulkFlows, test{duration: time.Second, loss: 0.01}),
		bulk("delay60_down", agent.Down, bulkFlows, test{duration: 2 * time.Second, far: true}),
		bulk("delay60_up", agent.Up, bulkFlows, test{duration: 2 * time.Second, far: true}),
		stopped("stopped", "stopped_bytes", "stopped_cpu", agent.Stall, min(1000, maxFlows), test{rounds: 3,
			only: []string{system.Direct, system.HAProxy + "$", "nginx", "goproxy", "tailsplice/", "baseline/"}}),
		stopped("stopped_target", "stopped_target_bytes", "stopped_target_cpu", agent.Fill, min(1000, maxFlows),
			test{rounds: 2, only: []string{system.Direct, system.HAProxy + "$", "tailsplice/", "baseline/"}}),
		// As many flows take too long for all systems and rounds.
		idle("idle_bytes_50k", 50_000, (50_000+maxFlows-1)/maxFlows, test{fixed: 16 * time.Second, rounds: 2,
			only: []string{system.Direct, system.HAProxy + "$", "nginx", "tailsplice/userspace", "tailsplice/sockmap", "baseline/"}}),
		https("c256", 256, test{}),
		bulk("bulk1_down", agent.Down, 1, test{duration: 600 * time.Millisecond}),
		bulk("bulk1_up", agent.Up, 1, test{duration: 600 * time.Millisecond}),
	)
	for _, size := range []struct {
		name  string
		bytes int
	}{{"64", 64}, {"16k", 16 << 10}} {
		for _, flows := range []int{1, 32, 256} {
			list = append(list, requests(fmt.Sprintf("c%d", flows), flows, size.bytes, test{name: size.name}))
		}
	}
	return list
}

// bulk is throughput: flows that send, or receive, as fast as they can.
func bulk(name string, kind agent.Kind, flows int, t test) *test {
	t.name, t.least = name, leastBulk
	way := "down"
	if kind == agent.Up {
		way = "up"
	}
	withCPU := name == "bulk_"+way
	if withCPU {
		t.beyond = [][2]string{{"cpu_per_gib_" + way, "added_cpu_per_gib_" + way}}
	}
	t.run = func(ctx context.Context, c *cellRun) error {
		j := c.job(kind, flows, 0)
		j.Warm = j.Duration / 8
		if c.far {
			j.Warm = j.Duration / 2 // slow start takes 10 to 14 round trips
		}
		a := c.conductor.agents
		before, err := c.system.ReadCPU()
		if err != nil {
			return err
		}
		near, err := a.run(ctx, j)
		if err != nil {
			return err
		}
		after, err := c.system.ReadCPU()
		if err != nil {
			return err
		}
		far, err := a.settle(ctx, near)
		if err != nil {
			return err
		}
		rate, bytes := near.Rate, float64(near.Received)
		if kind == agent.Up {
			rate, bytes = far.Rate, float64(near.Sent)
		}
		if rate == 0 {
			return broken{fmt.Errorf("no throughput in %v: %.0f bytes", j.Duration, bytes)}
		}
		if pause := max(near.Pause, far.Pause); pause > longPause && t.loss == 0 && !t.far {
			c.conductor.run.Warn("%s %s %s: nothing arrived for %v", c.conductor.topology.Name, name, c.system.Name, pause.Round(time.Millisecond))
		}
		c.set(name, rate/mib)
		if cpu := after.Since(before); withCPU {
			c.set("cpu_per_gib_"+way, cpu.Machine/bytes*gib)
			if c.system.Pid != 0 {
				c.set("proxy_cpu_per_gib_"+way, cpu.Proxy/bytes*gib)
			}
			c.set("kernel_cpu_per_gib_"+way, cpu.Kernel/bytes*gib)
		}
		return nil
	}
	return &t
}

// requests is request and response, each flow one at a time.
func requests(flowsName string, flows, size int, t test) *test {
	prefix := "rr" + t.name
	t.name = prefix + "_" + flowsName
	t.duration = 600 * time.Millisecond
	t.flows = flows
	t.run = func(ctx context.Context, c *cellRun) error {
		a := c.conductor.agents
		r, err := a.run(ctx, c.job(agent.Requests, flows, size))
		if err != nil {
			return err
		}
		if _, err := a.settle(ctx, r); err != nil {
			return err
		}
		c.set(prefix+"_rate_"+flowsName, float64(r.Count)/r.Seconds)
		c.set(prefix+"_p50_"+flowsName, micros(r.P50))
		c.set(prefix+"_p99_"+flowsName, micros(r.P99))
		c.set(prefix+"_p999_"+flowsName, micros(r.P999))
		return nil
	}
	return &t
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// connects is whole flows one after the other, 32 at a time: connect, hello, 64 bytes each way, end.
func connects() *test {
	return &test{name: "new_flows", duration: 800 * time.Millisecond, quick: true, tailnet: inQuick, flows: 32,
		run: func(ctx context.Context, c *cellRun) error {
			a := c.conductor.agents
			r, err := a.run(ctx, c.job(agent.Connects, 32, 64))
			if err != nil {
				return err
			}
			if _, err := a.settle(ctx, r); err != nil {
				return err
			}
			c.set("new_flows", float64(r.Count)/r.Seconds)
			c.set("new_flows_p99", micros(r.P99))
			return nil
		}}
}

// proxied is the same with a PROXY header before the hello, at a listener that wants one, and between that
// without, at the one of all other tests, so that neither has the machine's better moments. Header and hello
// come in one segment.
func proxied() *test {
	return &test{name: "proxied_flows", duration: 1600 * time.Millisecond, quick: true, flows: 32,
		only: []string{system.HAProxy + "$", "tailsplice/", "baseline/"},
		run: func(ctx context.Context, c *cellRun) error {
			a := c.conductor.agents
			c.time /= 4
			header, plain := c.job(agent.Connects, 32, 64), c.job(agent.Connects, 32, 64)
			header.Addr, header.Preface = c.system.Proxied, stream.ProxyHeader()
			var count, seconds, cpu [2]float64
			for _, with := range []int{0, 1, 1, 0} {
				before := c.system.RunTimes()
				r, err := a.run(ctx, [2]agent.Job{plain, header}[with])
				if err != nil {
					return err
				}
				if _, err := a.settle(ctx, r); err != nil {
					return err
				}
				count[with] += float64(r.Count)
				seconds[with] += r.Seconds
				cpu[with] += micros(c.system.RunTimes().Since(before))
			}
			rate := count[1] / seconds[1]
			c.set("proxied_flows", rate)
			c.set("proxied_flows_ratio", rate/(count[0]/seconds[0]))
			c.set("cpu_per_flow", cpu[0]/count[0])
			c.set("proxied_cpu_per_flow", cpu[1]/count[1])
			return nil
		}}
}

// firstByte is new_flows, one at a time: from the connect to the first byte of the answer.
func firstByte() *test {
	return &test{name: "first_byte", duration: 300 * time.Millisecond, quick: true, tailnet: inFull,
		run: func(ctx context.Context, c *cellRun) error {
			a := c.conductor.agents
			r, err := a.run(ctx, c.job(agent.Connects, 1, 64))
			if err != nil {
				return err
			}
			if _, err := a.settle(ctx, r); err != nil {
				return err
			}
			c.set("first_byte_p50", micros(r.P50))
			c.set("first_byte_p99", micros(r.P99))
			return nil
		}}
}

// idle is the memory of flows that do nothing, without what the client's and the server's sockets take. They
// are spread over so many instances of the system.
func idle(name string, flows, copies int, t test) *test {
	t.name, t.copies, t.fresh = name, copies, true
	t.flows = (flows + copies - 1) / copies
	flows = t.flows * copies
	t.beyond = [][2]string{{"all_" + name, name}}
	t.remark = fmt.Sprintf("%d flows on one process of each system", flows)
	if copies > 1 {
		t.remark = fmt.Sprintf("%d flows on %d instances of each system, with a client and a server for each: RLIMIT_NOFILE lets a process have %d files, so at most %d flows",
			flows, copies, system.Files(), system.MaxFlows())
	} else if flows == system.MaxFlows() {
		t.remark += fmt.Sprintf(", the most that RLIMIT_NOFILE (%d files) lets it hold", system.Files())
	}
	t.run = func(ctx context.Context, c *cellRun) error {
		a := c.conductor.agents
		before, err := c.system.ReadMemory()
		if err != nil {
			return err
		}
		r, err := a.all(copies, func(i int, p *pair) (agent.Report, error) {
			j := c.job(agent.Hold, t.flows, 64)
			j.Addr, j.Duration = c.system.Instance(i), 0
			return p.run(ctx, j)
		})
		if err != nil {
			return err
		}
		if r.Faults == 0 {
			time.Sleep(300 * time.Millisecond)
			after, err := c.system.ReadMemory()
			if err != nil {
				return err
			}
			m := after.Since(before)
			c.set("all_"+name, float64(m.All())/float64(flows))
			if c.system.Pid != 0 {
				c.set("proxy_"+name, float64(m.Process+m.BPF)/float64(flows))
			}
			// That each flow is still there is part of the measure.
			if _, err = a.all(copies, func(_ int, p *pair) (agent.Report, error) { return bounded(ctx, 2*limit, p.client.Check) }); err != nil {
				return err
			}
		}
		_, err = a.all(copies, func(_ int, p *pair) (agent.Report, error) {
			r, err := bounded(ctx, 2*limit, p.client.Resume)
			if err != nil {
				return r, err
			}
			return p.settle(ctx, r)
		})
		return err
	}
	return &t
}

// stopped is what flows cost whose client (agent.Stall) or target (agent.Fill) has stopped reading: memory
// once all buffers are full, and time, both beyond what direct takes. The client's and the server's own
// buffers are small. It takes too long for all systems and rounds. memory and cpu name what
// is measured.
func stopped(name, memory, cpu string, kind agent.Kind, flows int, t test) *test {
	t.name, t.fixed, t.flows, t.fresh = name, 12*time.Second, flows, true
	t.beyond = [][2]string{{"all_" + name + "_bytes", memory}, {"all_" + name + "_cpu", cpu}}
	t.run = func(ctx context.Context, c *cellRun) error {
		a := c.conductor.agents
		j := c.job(kind, flows, 0)
		j.Duration = 0
		before := c.system.Used()
		r, err := a.run(ctx, j)
		if err != nil {
			return err
		}
		if r.Faults == 0 {
			sender := func() (agent.Report, error) { return a.server.Report(a.cell) }
			if kind == agent.Fill {
				sender = a.client.Look
			}
			err = c.standstill(ctx, before, sender)
		}
		a.server.Stop(a.cell)
		r, e := bounded(ctx, limit, a.client.Resume)
		if e != nil {
			return e
		}
		_, e = a.settle(ctx, r)
		return errors.Join(e, err)
	}
	return &t
}

// standstill waits until all buffers are full and sender sends no more, and measures. A system may do
// something once when flows stop; what they cost while they stand still is measured after that.
func (c *cellRun) standstill(ctx context.Context, before int64, sender func() (agent.Report, error)) error {
	const quiet, most, once, watch = 300 * time.Millisecond, 8 * time.Second, time.Second, 6 * time.Second
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		r, err := bounded(ctx, 0, sender)
		if err != nil {
			return err
		}
		if r.Quiet > quiet {
			break
		}
		if time.Since(begin) > most {
			return broken{fmt.Errorf("it still takes bytes for readers that stopped %v ago: %d MiB so far", most, r.Held>>20)}
		}
	}
	used := c.system.Used() - before
	c.set("all_"+c.name+"_bytes", float64(used)/float64(c.flows))
	time.Sleep(once)
	from := c.system.RunTimes()
	time.Sleep(watch)
	c.set("all_"+c.name+"_cpu", c.system.RunTimes().Since(from).Seconds()/watch.Seconds())
	return nil
}
