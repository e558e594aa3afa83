// Package system starts and stops what is compared, and tells what it costs: processor time and memory.
package system

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
	Pid     int            // of its first process; 0: it is the kernel

	enter, leave func() error // around each of its turns, where it would disturb others
	cmd          *exec.Cmd
	log          string
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

	started []*System
	port    uint16
}

// Names of the systems that are not proxies.
const (
	Direct      = "direct"
	DirectAgain = "direct again" // the same, to learn how much two equal things differ
	DNAT        = "dnat"
	HAProxy     = "haproxy"

	HAProxySplice = "haproxy-splice"
)

// firstPort is the first system's port.
const firstPort = 8400

// Start starts a system by name; the caller stops all with Close. It returns when the system accepts connections.
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
	if b.port == 0 {
		b.port = firstPort
	}
	port := b.port
	b.port++
	s := &System{Name: name, Addr: netip.AddrPortFrom(t.Listen, port)}
	if t.Far.IsValid() {
		s.FarAddr = netip.AddrPortFrom(t.Far, port)
	}
	if name == DNAT {
		s.Version = kernel()
		s.enter = func() error { return topology.DNAT(t, port) }
		s.leave = func() error { return topology.NoDNAT(t) }
		return s, nil
	}
	if err := b.launch(s, port); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b.started = append(b.started, s)
	if err := s.waitListening(ctx, port); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// launch starts the system's program.
func (b *Builder) launch(s *System, port uint16) (err error) {
	dir := filepath.Join(b.Dir, strings.NewReplacer("/", "-", " ", "-").Replace(s.Name))
	// What an earlier process left, a socket above all, is in the way.
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	words := map[string]string{
		"PORT": strconv.Itoa(int(port)), "SERVER": b.Topology.Target.String(), "DIR": dir, "NAME": stream.ServerName,
		"REGEXP": strings.ReplaceAll(stream.ServerName, ".", `\.`), "CPUS": strconv.Itoa(runtime.NumCPU()),
		"FILES": strconv.Itoa(files()), "CONNECTIONS": strconv.Itoa(MaxFlows()),
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
		argv = []string{"haproxy", "-db", "-f", config(kind + ".cfg")}
		s.Version = version("haproxy", "-v")
	case "nginx":
		argv = []string{"nginx", "-p", dir, "-c", config("nginx.conf")}
		s.Version = version("nginx", "-v")
	case "sniproxy":
		argv = []string{"sniproxy", "-f", "-c", config("sniproxy.conf")}
		s.Version = version("sniproxy", "-V")
	case "socat":
		argv = []string{"socat", "-b", "262144", fmt.Sprintf("TCP-LISTEN:%d,fork,reuseaddr,backlog=4096,nodelay", port),
			"TCP:" + b.Topology.Target.String() + ",nodelay"}
		s.Version = version("socat", "-V")
		s.MaxFlows = 1000 // a process each
	case "goproxy":
		argv = []string{b.GoProxy, fmt.Sprintf(":%d", port), stream.ServerName, b.Topology.Target.String()}
		s.Version = runtime.Version()
		s.MaxFlows = files() / 8 // io.Copy holds a pipe each way even while it waits: six descriptors a flow
	case "tailsplice", "baseline":
		bin := b.Tailsplice
		if kind == "baseline" {
			bin = b.Baseline
		}
		words["DATAPATH"] = datapath
		argv = []string{bin, "run", "--log-level", "warn", "--config", config("tailsplice.yaml")}
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
	// In a process namespace of its own, so that all its children end with it.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if err := b.Topology.Proxy.Start(s.cmd); err != nil {
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

// Log is the end of what the system printed.
func (s *System) Log() string {
	b, _ := os.ReadFile(s.log)
	return strings.TrimSpace(string(b[max(0, len(b)-2000):]))
}

// Close stops all systems. A reader with half its streams open must not make that wait: they are killed.
func (b *Builder) Close() {
	for _, s := range b.started {
		s.cmd.Process.Kill()
		s.cmd.Wait()
	}
	b.started = nil
	// A daemon that was killed leaves its pins; the next one of that name would remove them, and there is none.
	pins, _ := filepath.Glob("/sys/fs/bpf/tailsplice/" + strings.ReplaceAll(strings.Trim(b.Dir, "/"), "/", "-") + "-*")
	for _, dir := range pins {
		os.RemoveAll(dir)
	}
}

// Datapaths lists which of our datapaths this machine has: a daemon that is told to use one that is not there refuses to
// start. auto is only listed where it has a choice.
func (b *Builder) Datapaths(ctx context.Context) ([]string, error) {
	defer b.Close()
	if _, err := b.Start(ctx, "tailsplice/userspace"); err != nil {
		return nil, err
	}
	b.Close()
	names := []string{"userspace"}
	for _, name := range []string{"sockmap", "tc"} {
		if _, err := b.Start(ctx, "tailsplice/"+name); err == nil {
			names = append(names, name)
		}
		b.Close()
	}
	if len(names) > 1 {
		names = append(names, "auto")
	}
	return names, nil
}

// files is how many file descriptors a process may have.
func files() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Max, 1<<20))
}

// MaxFlows is how many flows a proxy of one process, with two sockets for each and some pipes, can hold here.
func MaxFlows() int { return max(100, (files()-1000)/2) }

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
	s.cmd.Process.Kill()
	s.cmd.Wait()
	if err := b.launch(s, s.Addr.Port()); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	if err := s.waitListening(ctx, s.Addr.Port()); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}
