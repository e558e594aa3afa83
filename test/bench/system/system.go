// Package system starts and stops what is compared, and tells what it costs: processor time and memory.
package system

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/peers"
	"github.com/tailsplice/tailsplice/test/bench/stream"
	"github.com/tailsplice/tailsplice/test/bench/topology"
)

// System is one of those that are compared, in one topology.
type System struct {
	Name     string
	Version  string
	MaxFlows int // that it is fit to hold; 0 = no limit of its own

	Addr    netip.AddrPort // what the client dials
	FarAddr netip.AddrPort // the same over the path with a delay
	Proxied netip.AddrPort // where it wants a PROXY header first, if it can
	Pid     int            // of its first process; 0: it is the kernel

	enter, leave func() error // around each of its turns, where it would disturb others
	cmd          *exec.Cmd
	log          string
	config       string         // what its configuration in package peers begins with
	target       netip.AddrPort // where it sends flows or requests
	copies       []*System      // more instances of it: see Multiply
}

// Instance is what the client dials for the i-th of a system's instances.
func (s *System) Instance(i int) netip.AddrPort {
	switch {
	case i == 0:
		return s.Addr
	case s.Pid == 0: // the kernel forwards to every server
		return netip.AddrPortFrom(s.Addr.Addr(), s.Addr.Port()+uint16(i))
	}
	return s.copies[i-1].Addr
}

// roots are the first processes of all instances.
func (s *System) roots() (pids []int) {
	if s.Pid != 0 {
		pids = append(pids, s.Pid)
	}
	for _, c := range s.copies {
		pids = append(pids, c.Pid)
	}
	return pids
}

// Enter begins the system's turn.
func (s *System) Enter() error {
	if s.enter == nil {
		return nil
	}
	return s.enter()
}

// Leave ends the system's turn.
func (s *System) Leave() error {
	if s.leave == nil {
		return nil
	}
	return s.leave()
}

// Builder starts systems in a topology. Each gets a port of its own.
type Builder struct {
	Topology   *topology.Topology
	Dir        string // for rendered configurations, logs and sockets
	Tailsplice string // path of our daemon's binary
	Baseline   string // path of another build of our daemon to compare with, or ""
	GoProxy    string // path of the plain Go proxy's binary
	Caddy      string // path of Caddy's binary, or ""

	started []*System
	backend *System // of those that terminate TLS
	port    uint16
}

// Names of the systems that are not proxies.
const (
	Direct      = "direct"
	DirectAgain = "direct again" // the same, to learn how much two equal things differ
	DNAT        = "dnat"
	HAProxy     = "haproxy"

	HAProxySplice = "haproxy-splice"
	Caddy         = "caddy"
)

// firstPort is the first system's port, and proxiedPorts the distance to the one where it wants a PROXY
// header.
const (
	firstPort    = 8400
	proxiedPorts = 1000
)

// Start starts a system by name; the caller stops all with Close. It returns when the system accepts
// connections.
func (b *Builder) Start(ctx context.Context, name string) (*System, error) {
	t := b.Topology
	if name == Direct || name == DirectAgain {
		s := &System{Name: name, Version: kernel(), Addr: t.Direct, FarAddr: t.FarDirect}
		if t.SetDirect != nil {
			s.enter = func() error { return t.SetDirect(true) }
			s.leave = func() error { return t.SetDirect(false) }
		}
		return s, nil
	}
	port := b.nextPort()
	s := &System{Name: name, Addr: netip.AddrPortFrom(t.Listen, port), target: t.Target,
		Proxied: netip.AddrPortFrom(t.Listen, port+proxiedPorts)}
	if t.Far.IsValid() {
		s.FarAddr = netip.AddrPortFrom(t.Far, port)
	}
	if name == DNAT {
		s.Version = kernel()
		s.enter = func() error { return topology.DNAT(t, port) }
		s.leave = func() error { return topology.NoDNAT(t) }
		return s, nil
	}
	return s, b.begin(ctx, s)
}

func (b *Builder) nextPort() uint16 {
	b.port = max(b.port+1, firstPort)
	return b.port
}

// begin starts a system and waits until it accepts connections.
func (b *Builder) begin(ctx context.Context, s *System) error {
	if err := b.launch(s); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	b.started = append(b.started, s)
	if err := s.waitListening(ctx, s.Addr.Port()); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}

// Multiply starts instances of a system until there are n, each on a port and with a server of its own, so
// that they can hold more flows than one process may have files. stop ends them. What the kernel does needs
// no instances.
func (b *Builder) Multiply(ctx context.Context, s *System, n int) (stop func(), err error) {
	stop = func() {
		for _, c := range s.copies {
			c.kill()
			b.started = slices.DeleteFunc(b.started, func(o *System) bool { return o == c })
		}
		s.copies = nil
	}
	for i := 1; i < n && s.Pid != 0; i++ {
		c := &System{
			Name: s.Name, config: s.config, Addr: netip.AddrPortFrom(s.Addr.Addr(), b.nextPort()),
			target: netip.AddrPortFrom(s.target.Addr(), s.target.Port()+uint16(i)),
		}
		if err := b.begin(ctx, c); err != nil {
			if c.cmd != nil {
				c.kill()
			}
			stop()
			return nil, fmt.Errorf("instance %d: %w", i+1, err)
		}
		s.copies = append(s.copies, c)
	}
	return stop, nil
}

// launch starts the system's program.
func (b *Builder) launch(s *System) (err error) {
	port := s.Addr.Port()
	dir := filepath.Join(b.Dir, fmt.Sprintf("%s-%d", strings.NewReplacer("/", "-", " ", "-").Replace(s.config+s.Name), port))
	// What an earlier process left, a socket above all, is in the way.
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	words := map[string]string{
		"CERT": b.certificate(), "BODY": HTTPSBody, "HTTPSPORT": strconv.Itoa(httpsPort),

		"PORT": strconv.Itoa(int(port)), "PROXIED": strconv.Itoa(int(port + proxiedPorts)), "SERVER": s.target.String(), "DIR": dir, "NAME": stream.ServerName,
		"REGEXP": strings.ReplaceAll(stream.ServerName, ".", `\.`), "CPUS": strconv.Itoa(runtime.NumCPU()),
		"FILES": strconv.Itoa(Files()), "CONNECTIONS": strconv.Itoa(MaxFlows()),
	}
	config := func(name string) string {
		text, e := peers.Render(name, words)
		file := filepath.Join(dir, name)
		err = errors.Join(err, e, os.WriteFile(file, []byte(text), 0o644))
		return file
	}
	var argv []string
	kind, datapath, _ := strings.Cut(s.Name, "/")
	switch kind {
	case HAProxy, HAProxySplice:
		argv = []string{"haproxy", "-db", "-f", config(s.config + kind + ".cfg")}
		s.Version = version("haproxy", "-v")
	case "nginx":
		argv = []string{"nginx", "-p", dir, "-c", config(s.config + "nginx.conf")}
		s.Version = version("nginx", "-v")
	case "backend":
		argv = []string{"nginx", "-p", dir, "-c", config(s.config + "backend.conf")}
	case Caddy:
		argv = []string{b.Caddy, "run", "--adapter", "caddyfile", "--config", config(s.config + "caddy.conf")}
		s.Version = moduleVersion(b.Caddy)
	case "sniproxy":
		argv = []string{"sniproxy", "-f", "-c", config("sniproxy.conf")}
		s.Version = version("sniproxy", "-V")
	case "socat":
		argv = []string{"socat", "-b", "262144", fmt.Sprintf("TCP-LISTEN:%d,fork,reuseaddr,backlog=4096,nodelay", port),
			"TCP:" + s.target.String() + ",nodelay"}
		s.Version = version("socat", "-V")
		s.MaxFlows = 1000 // a process each
	case "goproxy":
		argv = []string{b.GoProxy, fmt.Sprintf(":%d", port), stream.ServerName, s.target.String()}
		s.Version = runtime.Version()
		s.MaxFlows = Files() / 8 // io.Copy holds a pipe each way even while it waits: six descriptors a flow
	case "tailsplice", "baseline":
		bin := b.Tailsplice
		if kind == "baseline" {
			bin = b.Baseline
		}
		words["DATAPATH"] = datapath
		argv = []string{bin, "run", "--log-level", "warn", "--config", config(s.config + "tailsplice.yaml")}
		s.Version = version(bin, "version")
	default:
		return errors.New("no such system")
	}
	if err != nil {
		return err
	}
	s.log = filepath.Join(dir, "log")
	log, err := os.Create(s.log)
	if err != nil {
		return err
	}
	defer log.Close()
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Stdout, s.cmd.Stderr, s.cmd.Dir = log, log, dir
	if kind == Caddy {
		s.cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	}
	// In a process namespace of its own, so that all its children end with it.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	host := b.Topology.Proxy
	if kind == "backend" {
		host = b.Topology.Server
	}
	if err := host.Start(s.cmd); err != nil {
		return err
	}
	s.Pid = s.cmd.Process.Pid
	return nil
}

// waitListening waits until the port is bound in the process's network namespace.
func (s *System) waitListening(ctx context.Context, port uint16) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	want := fmt.Sprintf(":%04X ", port)
	for {
		for _, f := range []string{"tcp", "tcp6"} {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", s.Pid, f))
			for line := range strings.Lines(string(b)) {
				if col := strings.Fields(line); len(col) > 3 && col[3] == "0A" && strings.HasSuffix(col[1]+" ", want) {
					return nil
				}
			}
		}
		if !s.Alive() {
			return fmt.Errorf("it ended at once: %s", s.Log())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it doesn't listen: %s", s.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Alive says whether the system's first process still runs.
func (s *System) Alive() bool {
	if s.Pid == 0 {
		return true
	}
	state, _, _ := stat(s.Pid)
	return state != "" && state != "Z"
}

func (s *System) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// Log is the end of what the system printed.
func (s *System) Log() string {
	b, _ := os.ReadFile(s.log)
	return strings.TrimSpace(string(b[max(0, len(b)-2000):]))
}

// Close stops all systems. A reader with half its streams open must not make that wait: they are killed.
func (b *Builder) Close() {
	for _, s := range b.started {
		s.kill()
	}
	b.started, b.backend = nil, nil
	// A daemon that was killed leaves its pins; the next one of that name would remove them, and there is
	// none.
	pins, _ := filepath.Glob("/sys/fs/bpf/tailsplice/" + strings.ReplaceAll(strings.Trim(b.Dir, "/"), "/", "-") + "-*")
	for _, dir := range pins {
		os.RemoveAll(dir)
	}
}

// Datapaths lists which of our datapaths this machine has: a daemon that is told to use one that is not there
// refuses to start. auto is only listed where it has a choice.
func (b *Builder) Datapaths(ctx context.Context) ([]string, error) {
	defer b.Close()
	if _, err := b.Start(ctx, "tailsplice/userspace"); err != nil {
		return nil, err
	}
	b.Close()
	if _, err := b.Start(ctx, "tailsplice/sockmap"); err != nil {
		return []string{"userspace"}, nil
	}
	return []string{"userspace", "sockmap", "auto"}, nil
}

// Files is how many file descriptors a process may have.
func Files() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Max, 1<<20))
}

// MaxFlows is how many flows a proxy of one process, with two sockets for each and some pipes, can hold here.
func MaxFlows() int { return max(100, (Files()-1000)/2) }

// version is the first line with a digit in it that the program prints.
func version(name string, arg ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, name, arg...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.ContainsAny(line, "0123456789") {
			return strings.TrimSpace(line)
		}
	}
	return "unknown"
}

// moduleVersion is the version of the module that a Go program was installed from.
func moduleVersion(bin string) string {
	info, err := buildinfo.ReadFile(bin)
	if err != nil {
		return "unknown"
	}
	return info.Main.Version
}

func kernel() string {
	b, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return "Linux " + strings.TrimSpace(string(b))
}

// CPUs is how many this machine has.
func CPUs() int { return runtime.NumCPU() }

// Restart ends a system's processes and starts it again on the same port.
func (b *Builder) Restart(ctx context.Context, s *System) error {
	if s.cmd == nil {
		return nil
	}
	s.kill()
	if err := b.launch(s); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	if err := s.waitListening(ctx, s.Addr.Port()); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}
