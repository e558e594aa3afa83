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
	sources        = 4
	helloTimeout   = 5 * time.Second
	hellosFor      = 60 * time.Second
	firstByteBound = 100 * time.Millisecond // of 99 of 100
	leastBulk      = 0.8                    // of the throughput without load

	// The line of the good client, in bytes a second: 1 Gbit/s, about what one processor here carries over
	// tailscale0. It is divided as the load is. Without a line all that others cost the processor is taken
	// from the throughput: 5,000 connections a second are more than one processor accepts in any program.
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
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, errors.New("10 minutes have passed"))
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
	client  *visitor
	machine *machine
	sources []*child
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
	fs.IntVar(&c.hellos, "hellos", 5000, "halves of hellos a second, before they are divided")
	fs.IntVar(&c.idle, "idle", 20000, "flows that do nothing")
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
	for i := range sources {
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
	for i := range sources {
		s, err := startChild("source", sourceAddr(i), fmt.Sprint(i), edgeAddr+edgePort)
		if err != nil {
			return err
		}
		c.sources = append(c.sources, s)
	}
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
	budget := c.before.Total / 8 * 5
	fmt.Printf("the machine  %s MB, %s MB free before the daemon; %.0f flows begin a second, so it is %.1f times as slow as here\n",
		mb(c.before.Total), mb(c.before.Free), in, c.scale)
	rate := float64(c.hellos) / c.scale
	hellosWait := helloTimeout.Seconds() * 10 * rate
	fmt.Printf("             so %.0f halves of hellos a second; they may wait for 50 s, which makes %.0f at a time\n", rate, hellosWait)

	c.client.line = goodLine / c.scale
	const each = 8 * time.Second // of measuring one thing
	c.phase("unloaded", each)

	if c.stopped > 0 {
		c.tell("again %g", c.scale)
		c.tell("stopped %d", c.stopped/sources)
		c.wait(60*time.Second, func(n sourceCount) bool { return n.Stopped+n.StoppedReset >= int64(c.stopped) })
		c.phase("stopped", each)
	}
	began := time.Now()
	if c.hellos > 0 {
		c.tell("hellos %g", rate/sources)
		time.Sleep(10 * time.Second)
		c.phase("+ hellos", each)
	}
	idled := true
	if c.idle > 0 {
		c.tell("idle %d", c.idle/sources)
		idled = c.wait(240*time.Second, func(n sourceCount) bool { return n.Idle+n.IdleRefused >= int64(c.idle) })
		c.phase("+ idle", each)
	}
	if c.hellos > 0 {
		time.Sleep(hellosFor - time.Since(began))
	}
	took := time.Since(began)
	n := c.count()
	reached := float64(n.Hellos) / took.Seconds()
	c.tell("hellos 0")
	metrics := c.metrics()
	for _, s := range c.sources {
		s.end()
	}
	for deadline := time.Now().Add(time.Minute); c.machine.last().Socket > 100 && time.Now().Before(deadline); {
		time.Sleep(time.Second)
	}
	c.phase("afterwards", each)

	fmt.Printf("\noffered: stopped %d kept open (now %d; %d were reset, %d refused), idle %d (%d began, %d refused; %d are open),\n",
		c.stopped, n.Stopped, n.StoppedReset, n.StoppedRefuse, c.idle, n.Idle, n.IdleRefused, n.IdleAlive)
	fmt.Printf("         hellos %.0f/s for %.0f s (%.0f/s reached; %d failed, %d ended by the edge, %d not tried)\n",
		rate, took.Seconds(), reached, n.HellosFailed, n.HellosEnded, n.HellosSkipped)
	fmt.Printf("the daemon says: %s\n\n", metrics)
	c.table(budget)
	return c.judge(budget, idled, rate, reached)
}

// phase measures, and notes what took memory meanwhile.
func (c *conductor) phase(name string, each time.Duration) {
	c.machine.mostSince(true)
	began, first, waited := time.Now(), c.machine.last(), c.machine.waited()
	p := phase{name: name, probe: c.client.measure(each)}
	took := time.Since(began)
	p.got = 1 - float64(c.machine.waited()-waited)/float64(took)
	last := c.machine.last()
	p.cpu = float64(last.CPU-first.CPU) / float64(took.Milliseconds())
	p.short = float64(last.Short-first.Short) / float64(took.Milliseconds())
	p.most = c.machine.mostSince(false)
	p.most.Taken -= c.before.Taken
	p.most.Slab -= c.before.Slab
	c.phases = append(c.phases, p)
	fmt.Printf("%-12s %s; %s MB taken: RSS %s, TCP %s, slab %s\n", p.name, p.probe, mb(p.most.Taken), mb(p.most.RSS), mb(p.most.TCP), mb(p.most.Slab))
}

// bulk is the throughput without a line that there would have been, had others left the machine's processor
// alone.
func (p *phase) bulk() float64 { return p.probe.bulk / p.got }

// table shows all phases. "CPU" is what the daemon has used of the machine's, "got" is how much of the time
// that the machine's processor had something to do it was not kept waiting by others here: throughput is
// compared without that.
func (c *conductor) table(budget int64) {
	fmt.Printf("%-12s %10s %10s %7s %8s %10s %6s %6s %6s | most at once, MB: %6s %6s %6s %6s %8s  of %s\n", "", "p50 ms", "p99 ms", "failed", "paced", "MB/s", "CPU", "got", "short", "taken", "RSS", "TCP", "slab", "sockets", mb(budget))
	for _, p := range c.phases {
		fmt.Printf("%-12s %10.1f %10.1f %7d %8.2f %10.2f %6.2f %6.2f %6.2f | %18s %6s %6s %6s %6s %8d\n", p.name, ms(p.probe.p50), ms(p.probe.p99), p.probe.failed, p.probe.paced, p.probe.bulk, max(0, p.cpu), p.got, p.short, "",
			mb(p.most.Taken), mb(p.most.RSS), mb(p.most.TCP), mb(p.most.Slab), p.most.Socket)
	}
	fmt.Println()
}

// judge says what held. The error is that something did not.
func (c *conductor) judge(budget int64, idled bool, rate, reached float64) error {
	ok := true
	say := func(good bool, format string, a ...any) {
		verdict := "ok  "
		if !good {
			verdict, ok = "FAIL", false
		}
		fmt.Println(verdict, fmt.Sprintf(format, a...))
	}
	trouble := c.machine.trouble()
	say(len(trouble) == 0, "alive: %s", orElse(strings.Join(trouble, "; "), "the daemon runs, and the kernel has not been short of memory"))
	say(idled && reached >= 0.8*rate, "the load was there: %.0f of %.0f hellos a second, all idle flows tried: %v", reached, rate, idled)
	whole := c.machine.mostOfAll()
	taken, parts := whole.Taken-c.before.Taken, whole.RSS+whole.TCP+whole.Slab-c.before.Slab
	say(taken <= budget, "within the budget: %s MB more taken than before the daemon began, of %s", mb(taken), mb(budget))
	say(parts <= budget, "within the budget: RSS %s + TCP %s + slab %s = %s MB, of %s", mb(whole.RSS), mb(whole.TCP), mb(whole.Slab-c.before.Slab), mb(parts), mb(budget))
	unloaded := c.phases[0]
	bound := time.Duration(float64(firstByteBound) * c.scale)
	for _, p := range c.phases[1:] {
		say(p.probe.failed == 0 && p.probe.p99 <= bound, "%s: first byte p99 %.0f ms, at most %.0f (100 ms, %.1f times as slow); %d of %d failed",
			p.name, ms(p.probe.p99), ms(bound), c.scale, p.probe.failed, p.probe.tried)
		say(p.probe.paced >= leastBulk*unloaded.probe.paced, "%s: throughput of a client with a line of %.1f MB/s %.2f of unloaded, at least %.1f; without a line %.2f; %d transfers failed%s",
			p.name, c.client.line/(1<<20), p.probe.paced/unloaded.probe.paced, leastBulk, p.bulk()/unloaded.bulk(), p.probe.bulkFailed, p.probe.fault)
	}
	if after := c.phases[len(c.phases)-1].bulk(); after < leastBulk*unloaded.bulk() {
		fmt.Printf("note: afterwards it is %.2f as fast as before: the daemon has not recovered, or others keep this machine busy, and no throughput can be compared\n", after/unloaded.bulk())
	}
	if !ok {
		return errors.New("something did not hold: see FAIL above")
	}
	return nil
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func mb(n int64) string          { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// tell says the same to all sources.
func (c *conductor) tell(format string, a ...any) {
	for _, s := range c.sources {
		fmt.Fprintf(s.in, format+"\n", a...)
	}
}

// count is what all sources together have seen.
func (c *conductor) count() (sum sourceCount) {
	c.tell("count")
	for _, s := range c.sources {
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

// wait waits until the sources have come so far, and says whether they have.
func (c *conductor) wait(most time.Duration, done func(sourceCount) bool) bool {
	for deadline := time.Now().Add(most); time.Now().Before(deadline); time.Sleep(time.Second) {
		if done(c.count()) {
			return true
		}
	}
	return false
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
