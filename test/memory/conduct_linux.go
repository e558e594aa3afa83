package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the network that is made.
const (
	hereAddr   = "10.77.0.1" // where the daemon is tried for scale
	edgeAddr   = "10.77.0.2" // the machine
	targetAddr = "10.77.1.1"
	clientAddr = "10.77.2.1"
	sourceNet  = "10.77.3." // and a number from 1
	edgePort   = ":443"
)

// The load, as it is for a machine of 256 MB with a processor of its own.
const (
	sources        = 4 // that do the same; what one does is not charged to those that do something else
	helloTimeout   = 5 * time.Second
	hellosFor      = 60 * time.Second
	helloShare     = 0.5                    // of the halves of hellos that the machine takes at most
	firstByteBound = 100 * time.Millisecond // of 99 of 100
	leastBulk      = 0.8                    // of the throughput without load

	// The line of the good client, in bytes a second: 1 Gbit/s, about what one processor here carries over
	// tailscale0. It is divided by how much slower the machine is. Without a line all that others cost the
	// processor is taken from the throughput: 5,000 connections a second are more than one processor accepts
	// in any program.
	goodLine = 125e6
)

// run makes namespaces of its own for conduct, which end with it, and bounds it in time.
func run(args []string) error {
	dir, err := os.MkdirTemp("", "test-memory")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, 15*time.Minute, errors.New("15 minutes have passed"))
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"conduct", "-dir", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// The first process of a PID namespace takes all others with it, a machine included.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.RemoveAll(dir)
		os.Exit(1) // conduct has said why
	}
	return err
}

// conductor runs the whole.
type conductor struct {
	dir, kernel, modules, daemon string
	console, memory, datapath    string
	parameters                   string
	mb                           int
	stopped, idle, hellos        int
	perSource                    int

	scale   float64
	able    float64 // halves of hellos that the machine takes, a second
	client  *visitor
	machine *machine
	before  sample
	phases  []phase
}

// A phase is what was measured in one.
type phase struct {
	name  string
	probe result
	most  sample  // of each, but Taken and Slab are those beyond before
	cpu   float64 // of the machine's: what the daemon has used
	// of the time: the kernel was short of memory for TCP; more than 1 if that began before the phase
	short float64
	got   float64 // of this machine's processors: what the other one's was given of what it could have used
	used  int64   // of the budget, as the daemon says at the end
	spare float64 // of the machine's processor: what others leave, by what it takes of them
}

func conduct(args []string) error {
	var c conductor
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	fs.StringVar(&c.dir, "dir", "", "where files may be put that are not kept")
	fs.StringVar(&c.kernel, "kernel", "", "the image of a kernel")
	fs.StringVar(&c.modules, "modules", "", "a folder with its modules, and a file order")
	fs.StringVar(&c.daemon, "daemon", "", "a static build of the daemon")
	fs.StringVar(&c.console, "console", "", "where the machine's console goes")
	fs.StringVar(&c.memory, "memory", "", "limits.memory; default: that of the daemon")
	fs.StringVar(&c.datapath, "datapath", "auto", "datapath")
	// limits.connections is lowered to about 11,000: four sources may not have all of them.
	fs.IntVar(&c.perSource, "per-source", 2000, "limits.connections_per_source")
	fs.StringVar(&c.parameters, "parameters", "", "more parameters of the kernel, such as sysctl.net.ipv4.tcp_rmem=\"4096 131072 262144\"")
	fs.IntVar(&c.mb, "mb", 320, "what the machine has, the kernel's own included, in MB")
	fs.IntVar(&c.stopped, "stopped", 1000, "flows that are kept open and whose ends send what they can and read nothing")
	fs.IntVar(&c.hellos, "hellos", 5000, "halves of hellos a second that are offered")
	fs.IntVar(&c.idle, "idle", 20000, "flows that do nothing, which are tried")
	if err := fs.Parse(args); err != nil {
		return err
	}
	raiseFiles()
	// Another mount of /proc, or nobody in here finds itself.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := c.makeNetwork(); err != nil {
		return err
	}
	c.client = newVisitor(clientAddr, edgeAddr+edgePort)
	for _, ports := range [][]string{{"9001", "9002"}, {"9003"}, {"9004", "9005"}, {"9006", "9007"}} {
		if _, err := startChild(append([]string{"targets"}, ports...)...); err != nil {
			return err
		}
	}
	if err := c.findScale(); err != nil {
		return fmt.Errorf("for scale: %w", err)
	}
	return c.tryMachine()
}

func (c *conductor) makeNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "edge0", TxQLen: 10000}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE}
	if err := netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("make a tap: %w", err)
	}
	all := []string{hereAddr, targetAddr, clientAddr}
	for i := range 3 * sources {
		all = append(all, sourceAddr(i))
	}
	for _, a := range all {
		addr, err := netlink.ParseAddr(a + "/16")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(tap, addr); err != nil {
			return err
		}
	}
	for _, l := range []netlink.Link{lo, tap} {
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("10000 65535"), 0)
}

func sourceAddr(i int) string { return fmt.Sprint(sourceNet, i+1) }

// config is the daemon's, at addr. scale is how many times slower than here a machine is.
func (c *conductor) config(addr, dir string, scale float64) string {
	var routes strings.Builder
	for name, port := range map[string]int{"ping": pingPort, "bulk": bulkPort, "stop": stopPort, "idle0": idlePort, "idle1": idlePort + 1, "idle2": idlePort + 2, "idle3": idlePort + 3} {
		fmt.Fprintf(&routes, "      - { sni: [%s.test], forward: \"%s:%d\" }\n", name, targetAddr, port)
	}
	memory := ""
	if c.memory != "" {
		memory = ", memory: " + c.memory
	}
	return fmt.Sprintf(`node: edge
datapath: %s
listeners:
  - name: web
    listen: ["%s%s"]
    mode: sni
    routes:
%slimits: { connections_per_source: %d, hello_timeout: %ds%s }
control: { socket: %s/control.sock, metrics: "%s:9464" }
`, c.datapath, addr, edgePort, routes.String(), c.perSource, int(scale*helloTimeout.Seconds()), memory, dir, addr)
}

// findScale tries the daemon on a processor of this machine.
func (c *conductor) findScale() error {
	file := filepath.Join(c.dir, "config.yaml")
	if err := os.WriteFile(file, []byte(c.config(hereAddr, c.dir, 1)), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(c.dir, "daemon.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	daemon := exec.Command("taskset", "-c", "0", c.daemon, "run", "--config", file)
	daemon.Stdout, daemon.Stderr = log, log
	if err := daemon.Start(); err != nil {
		return err
	}
	defer daemon.Wait()
	defer daemon.Process.Kill()
	here := newVisitor(clientAddr, hereAddr+edgePort)
	if err := here.untilServed(30 * time.Second); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w\n%s", err, text)
	}
	c.scale = here.flowsASecond(3 * time.Second) // until the machine's is known
	r := here.measure(3 * time.Second)
	fmt.Printf("here         %s, %.0f flows begin a second\n", r, c.scale)
	return nil
}

// tryMachine does it all in the machine, and judges.
func (c *conductor) tryMachine() (err error) {
	// How long a hello may take is in the configuration, which must be there before the machine can be
	// measured: it is what a scale of ten makes of it.
	config := c.config(edgeAddr, "/run", 10)
	if c.machine, err = c.boot(config); err != nil {
		return err
	}
	var all []*child
	for i := range 3 * sources {
		s, err := startChild("source", sourceAddr(i), fmt.Sprint(i%sources), edgeAddr+edgePort)
		if err != nil {
			return err
		}
		all = append(all, s)
	}
	idlers, readers, hellos := group(all[:sources]), group(all[sources:2*sources]), group(all[2*sources:])
	if err := c.client.untilServed(90 * time.Second); err != nil {
		return fmt.Errorf("the machine does not serve: %w; its console: %s", err, c.console)
	}
	time.Sleep(5 * time.Second) // what starts has started
	in := c.client.flowsASecond(5 * time.Second)
	if in == 0 {
		return errors.New("no flow begins in the machine")
	}
	c.scale = max(1, c.scale/in)
	c.before = c.machine.before()
	o := outcome{scale: c.scale, budget: c.before.Total / 8 * 5, before: c.before, line: goodLine / c.scale,
		wanted: load{idle: c.idle, stopped: c.stopped, hellos: float64(c.hellos)}, mostIdle: min(c.idle, sources*c.perSource)}
	fmt.Printf("the machine  %s MB, %s MB free before the daemon; %.0f flows begin a second, so it is %.1f times as slow as here\n",
		mb(c.before.Total), mb(c.before.Free), in, c.scale)

	c.client.line = o.line
	const each = 8 * time.Second // of measuring one thing
	if err := c.phase("unloaded", each); err != nil {
		return err
	}
	// Halves of hellos are not ended by the daemon within this time.
	if c.able, err = c.takes(hellos, 8*time.Second); err != nil {
		return err
	}
	o.able = c.able
	o.rate = min(o.wanted.hellos, o.able*helloShare)
	fmt.Printf("             offered %d halves of hellos a second, it takes %.0f: the load is %.0f, which may wait for 50 s\n", c.hellos, o.able, o.rate)

	if c.idle > 0 {
		idlers.tell("idle %d", c.idle/sources)
		idlers.wait(300*time.Second, func(n sourceCount) bool { return n.Idle+n.IdleRefused >= int64(c.idle) })
		if err := c.phase("idle", each); err != nil {
			return err
		}
	}
	if c.stopped > 0 {
		readers.tell("again %g", c.scale)
		readers.tell("stopped %d", c.stopped/sources)
		readers.wait(60*time.Second, func(n sourceCount) bool { return n.Stopped+n.StoppedReset+n.StoppedRefuse >= int64(c.stopped) })
		if err := c.phase("+ stopped", each); err != nil {
			return err
		}
	}
	if c.hellos > 0 {
		first, began := hellos.count(), time.Now()
		hellos.tell("hellos %g", o.rate/sources)
		time.Sleep(10 * time.Second)
		if err := c.phase("+ hellos", each); err != nil {
			return err
		}
		o.reached = float64(hellos.count().Hellos-first.Hellos) / time.Since(began).Seconds()

		first, began = hellos.count(), time.Now()
		hellos.tell("hellos %g", o.wanted.hellos/sources)
		if err := c.phase(flood, each); err != nil {
			return err
		}
		time.Sleep(hellosFor - time.Since(began))
		last := hellos.count()
		o.flooded = time.Since(began)
		o.flood = float64(last.Hellos+last.HellosFailed-first.Hellos-first.HellosFailed) / o.flooded.Seconds()
	}
	o.seen = idlers.count()
	n := readers.count()
	o.seen.Stopped, o.seen.StoppedReset, o.seen.StoppedRefuse = n.Stopped, n.StoppedReset, n.StoppedRefuse
	fmt.Printf("\nthe daemon says: %s\n", refusals())
	for _, s := range all {
		s.end()
	}
	for deadline := time.Now().Add(time.Minute); c.machine.last().Socket > 100 && time.Now().Before(deadline); {
		time.Sleep(time.Second)
	}
	if err := c.phase("afterwards", each); err != nil {
		return err
	}
	fmt.Println()
	c.table(o.budget)
	o.trouble, o.most, o.phases = c.machine.trouble(), c.machine.mostOfAll(), c.phases
	return o.judge(os.Stdout)
}

// takes is how many of the halves of hellos that are offered the machine takes a second.
func (c *conductor) takes(hellos group, d time.Duration) (float64, error) {
	if c.hellos == 0 {
		return 0, nil
	}
	hellos.tell("hellos %g", float64(c.hellos)/sources)
	defer hellos.tell("hellos 0")
	time.Sleep(2 * time.Second)
	before, err := readAccounts()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	time.Sleep(d)
	after, err := readAccounts()
	if err == nil && after.accepted == before.accepted {
		err = errors.New("the machine takes no halves of hellos")
	}
	return (after.accepted - before.accepted) / time.Since(began).Seconds(), err
}

// phase measures, and notes what took memory meanwhile.
func (c *conductor) phase(name string, each time.Duration) error {
	c.machine.mostSince(true)
	before, err := readAccounts()
	if err != nil {
		return err
	}
	began, first, waited := time.Now(), c.machine.last(), c.machine.waited()
	p := phase{name: name, probe: c.client.measure(each)}
	took := time.Since(began)
	p.got = 1 - float64(c.machine.waited()-waited)/float64(took)
	after, err := readAccounts()
	if err != nil {
		return err
	}
	p.used = int64(after.used)
	if p.spare = 1; c.able > 0 {
		p.spare = max(0, 1-(after.accepted-before.accepted-float64(p.probe.opened))/time.Since(began).Seconds()/c.able)
	}
	last := c.machine.last()
	p.cpu = float64(last.CPU-first.CPU) / float64(took.Milliseconds())
	p.short = float64(last.Short-first.Short) / float64(took.Milliseconds())
	p.most = c.machine.mostSince(false)
	p.most.Taken -= c.before.Taken
	p.most.Slab -= c.before.Slab
	c.phases = append(c.phases, p)
	fmt.Printf("%-12s %s; %s MB taken: RSS %s, TCP %s, slab %s; %s by the daemon's account\n", p.name, p.probe,
		mb(p.most.Taken), mb(p.most.RSS), mb(p.most.TCP), mb(p.most.Slab), mb(p.used))
	return nil
}

// bulk is the throughput without a line that there would have been, had others left the machine's processor
// alone.
func (p *phase) bulk() float64 { return p.probe.bulk / p.got }

// table shows all phases. "CPU" is what the daemon has used of the machine's, "got" is how much of the time
// that the machine's processor had something to do it was not kept waiting by others here: throughput is
// compared without that. "spare" is what of the processor the connections of others leave.
func (c *conductor) table(budget int64) {
	fmt.Printf("%-12s %10s %10s %7s %8s %10s %6s %6s %6s %6s | most at once, MB: %6s %6s %6s %6s %8s  of %s\n", "", "p50 ms", "p99 ms", "failed", "paced", "MB/s", "CPU", "got", "spare", "short", "taken", "RSS", "TCP", "slab", "sockets", mb(budget))
	for _, p := range c.phases {
		fmt.Printf("%-12s %10.1f %10.1f %7d %8.2f %10.2f %6.2f %6.2f %6.2f %6.2f | %18s %6s %6s %6s %6s %8d\n", p.name, ms(p.probe.p50), ms(p.probe.p99), p.probe.failed, p.probe.paced, p.probe.bulk, max(0, p.cpu), p.got, p.spare, p.short, "",
			mb(p.most.Taken), mb(p.most.RSS), mb(p.most.TCP), mb(p.most.Slab), p.most.Socket)
	}
	fmt.Println()
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func mb(n int64) string          { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// A group are sources that do the same.
type group []*child

// tell says the same to all sources.
func (g group) tell(format string, a ...any) {
	for _, s := range g {
		fmt.Fprintf(s.in, format+"\n", a...)
	}
}

// count is what all sources together have seen.
func (g group) count() (sum sourceCount) {
	g.tell("count")
	for _, s := range g {
		var n sourceCount
		json.Unmarshal([]byte(<-s.lines), &n)
		sum.Stopped += n.Stopped
		sum.StoppedReset += n.StoppedReset
		sum.StoppedRefuse += n.StoppedRefuse
		sum.Idle += n.Idle
		sum.IdleRefused += n.IdleRefused
		sum.IdleAlive += n.IdleAlive
		sum.Hellos += n.Hellos
		sum.HellosFailed += n.HellosFailed
		sum.HellosEnded += n.HellosEnded
		sum.HellosSkipped += n.HellosSkipped
	}
	return sum
}

// wait waits until the sources have come so far.
func (g group) wait(most time.Duration, done func(sourceCount) bool) {
	for deadline := time.Now().Add(most); time.Now().Before(deadline) && !done(g.count()); time.Sleep(time.Second) {
	}
}

// A child is another process of this command.
type child struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // of standard output, after "ready"
}

func startChild(args ...string) (*child, error) {
	c := &child{cmd: exec.Command("/proc/self/exe", args...), lines: make(chan string)}
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	scan := bufio.NewScanner(out)
	if !scan.Scan() || scan.Text() != "ready" {
		return nil, fmt.Errorf("%s did not begin", strings.Join(args, " "))
	}
	go func() {
		for scan.Scan() {
			c.lines <- scan.Text()
		}
		close(c.lines)
	}()
	return c, nil
}

// end kills the process, and closes its connections with it.
func (c *child) end() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
}
