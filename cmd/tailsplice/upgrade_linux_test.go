package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// upgradable is a daemon that is upgraded.
type upgradable struct {
	t                    *testing.T
	cmd                  *exec.Cmd
	dir, config, control string
	edge, web            string // addresses of a tcp and an http listener
}

// startUpgradable starts it, with an echo server behind one listener, and one that says hello behind the other.
func startUpgradable(t *testing.T, flags ...string) *upgradable {
	t.Helper()
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	hello := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	t.Cleanup(hello.Close)
	dir, err := os.MkdirTemp("", "ts-up-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	free := func() string {
		ln := listen(t, "127.0.0.77:0")
		defer ln.Close()
		return ln.Addr().String()
	}
	d := &upgradable{t: t, dir: dir, config: filepath.Join(dir, "edge.yaml"), control: filepath.Join(dir, "control.sock"),
		edge: free(), web: free()}
	check(t, os.WriteFile(d.config, fmt.Appendf(nil, `
listeners:
  - { name: edge, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: web, listen: [%q], mode: http, access_log: { file: %q }, default: { forward: %q } }
control: { socket: %q, metrics: %q, health: %q }
`, d.edge, target.Addr(), d.web, filepath.Join(dir, "access.log"), hello.Listener.Addr(), d.control, free(), free()), 0o600))
	log, err := os.Create(filepath.Join(dir, "log"))
	check(t, err)
	defer log.Close()
	d.cmd = exec.Command("tailsplice", append([]string{"run", "--config", d.config}, flags...)...)
	d.cmd.Stderr = log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, d.cmd.Start())
	t.Cleanup(func() {
		for _, pid := range d.processes() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if text, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("the log:\n%s", text)
		}
	})
	wait(t, "the daemon answers", func() error { _, err := d.ask("status"); return err })
	return d
}

func (d *upgradable) ask(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "tailsplice", append(args, "--control", d.control)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return string(out), err
}

func (d *upgradable) status() (s server.Status) {
	d.t.Helper()
	out, err := d.ask("status", "--json")
	check(d.t, err)
	check(d.t, json.Unmarshal([]byte(out), &s))
	return s
}

// processes are those of the daemon, whose command lines name its configuration.
func (d *upgradable) processes() (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range all {
		text, err := os.ReadFile(file)
		if err == nil && slices.Contains(strings.Split(string(text), "\x00"), d.config) {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// newest is the process that accepts at the control socket.
func (d *upgradable) newest() int {
	d.t.Helper()
	pids := d.processes()
	if len(pids) > 1 {
		pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == d.cmd.Process.Pid })
	}
	if len(pids) != 1 {
		d.t.Fatalf("the daemon has the processes %v", d.processes())
	}
	return pids[0]
}

// files counts the descriptors of a process that an upgrade may leave.
func files(pid int) (n int) {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range all {
		to, err := os.Readlink(fd)
		if err == nil && (strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "pipe:") || strings.Contains(to, "pidfd")) {
			n++
		}
	}
	return n
}

// stream is a flow of random bytes that have to come back as they were, until it is ended.
type stream struct {
	c      net.Conn
	end    chan struct{}
	failed chan error
	bytes  atomic.Int64
}

func startStream(t *testing.T, address string) *stream {
	t.Helper()
	c, err := net.Dial("tcp", address)
	check(t, err)
	s := &stream{c: c, end: make(chan struct{}), failed: make(chan error, 2)}
	t.Cleanup(func() { c.Close() })
	check(t, c.SetDeadline(time.Now().Add(5*time.Minute)))
	seed := rand.Uint64()
	bytes := func() io.Reader { return rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}) }
	go func() {
		from, b := bytes(), make([]byte, 20000)
		for {
			select {
			case <-s.end:
				s.failed <- c.(*net.TCPConn).CloseWrite()
				return
			case <-time.After(time.Millisecond):
			}
			n := 1 + rand.IntN(len(b))
			_, _ = io.ReadFull(from, b[:n])
			if _, err := c.Write(b[:n]); err != nil {
				s.failed <- err
				return
			}
			s.bytes.Add(int64(n))
		}
	}()
	go func() {
		from, b, want := bytes(), make([]byte, 32<<10), make([]byte, 32<<10)
		var came int64
		for {
			n, err := c.Read(b)
			_, _ = io.ReadFull(from, want[:n])
			if !slices.Equal(b[:n], want[:n]) {
				s.failed <- fmt.Errorf("bytes changed, after %d", came)
				return
			}
			if came += int64(n); err != nil {
				if err == io.EOF && came == s.bytes.Load() {
					err = nil
				}
				s.failed <- err
				return
			}
		}
	}()
	return s
}

// stop ends the stream, and checks that all of it came back.
func (s *stream) stop(t *testing.T) {
	t.Helper()
	close(s.end)
	for range 2 {
		if err := <-s.failed; err != nil {
			t.Errorf("a flow that had begun before: %v, after %d bytes", err, s.bytes.Load())
		}
	}
}

// newFlow opens a connection to the edge, and has a word echoed.
func (d *upgradable) newFlow() error {
	c, err := net.DialTimeout("tcp", d.edge, time.Minute)
	if err != nil {
		return err
	}
	defer c.Close()
	return echo(c)
}

func echo(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	word := make([]byte, 9)
	if _, err := c.Write([]byte("something")); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, word); err != nil {
		return err
	}
	if string(word) != "something" {
		return fmt.Errorf("got %q", word)
	}
	return nil
}

// request makes a request on a connection of its own.
func (d *upgradable) request() error {
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + d.web)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && string(body) != "hello" {
		err = fmt.Errorf("got %s: %s", res.Status, body)
	}
	return err
}

// TestUpgrade: 10 upgrades under 200 new connections a second, and reloads in between, refuse and break none, and
// cut no flow. Afterwards nothing is left of older processes but the first, for which the supervisor waits.
func TestUpgrade(t *testing.T) {
	d := startUpgradable(t)
	long := startStream(t, d.edge)
	stop := make(chan struct{})
	var workers sync.WaitGroup
	var begun atomic.Int64
	each := func(every time.Duration, f func() error) {
		workers.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				workers.Go(func() {
					begun.Add(1)
					if err := f(); err != nil {
						t.Errorf("during an upgrade: %v", err)
					}
				})
			}
		})
	}
	each(time.Second/150, d.newFlow)
	each(time.Second/50, d.request)
	each(700*time.Millisecond, func() error { _, err := d.ask("reload"); return err })
	upgrade := func(args ...string) {
		t.Helper()
		if out, err := d.ask(append([]string{"upgrade"}, args...)...); err != nil || !strings.Contains(out, "has taken over from") {
			t.Fatalf("upgrade: %v: %s", err, out)
		}
	}
	shows := func(pid int) {
		t.Helper()
		wait(t, "status shows an older process with its flow, for an hour", func() error {
			for _, o := range d.status().Older {
				if o.PID == pid && o.Flows > 0 && time.Until(o.Deadline) > 50*time.Minute {
					return nil
				}
			}
			return fmt.Errorf("status has %+v, want process %d", d.status().Older, pid)
		})
	}
	for range 3 {
		upgrade()
		shows(d.cmd.Process.Pid)
	}
	long.stop(t)
	settle := func() {
		t.Helper()
		wait(t, "no older process has anything left", func() error {
			if s, pids := d.status(), d.processes(); len(s.Older) > 0 || len(pids) != 2 {
				return fmt.Errorf("status has %+v, and the processes are %v", s.Older, pids)
			}
			return nil
		})
	}
	settle()
	second, newest := startStream(t, d.edge), d.newest()
	for range 7 {
		upgrade()
	}
	shows(newest)
	if text, err := d.ask("status"); err != nil || !strings.Contains(text, fmt.Sprintf("older process %d,", newest)) {
		t.Errorf("status does not show process %d (%v):\n%s", newest, err, text)
	}
	close(stop)
	workers.Wait()
	second.stop(t)
	settle()
	t.Logf("%d connections and reloads", begun.Load())
	if left := strings.Fields(generations(d)); len(left) > 1 {
		t.Errorf("pins are left: %v", left)
	}
	open := files(d.newest())
	for range 3 {
		upgrade()
		settle()
	}
	wait(t, "upgrades leave no descriptors", func() error {
		if now := files(d.newest()); now > open {
			return fmt.Errorf("%d are open, %d were before", now, open)
		}
		return nil
	})
}

func init() { fakes = successors }

// successors are programs that are no good ones.
var successors = map[string]func(){
	"fake-exits": func() { fmt.Fprintln(os.Stderr, "I will not"); os.Exit(3) },
	"fake-panics": func() {
		var nobody *handover.Message
		fmt.Fprintln(os.Stderr, nobody.Step)
	},
	"fake-hangs": func() { select {} },
	"fake-ignores": func() { // as a version that knows nothing of this
		os.Unsetenv("TAILSPLICE_HANDOVER")
		main()
	},
	"fake-garbage": func() {
		_, _ = unix.Write(3, []byte("garbage"))
		time.Sleep(time.Hour)
	},
	"fake-closes": func() {
		_ = unix.Close(3)
		time.Sleep(time.Hour)
	},
	"fake-ready-exits": func() {
		p := fakeSuccessor()
		must(p.Send(handover.Message{Step: handover.Ready}))
		os.Exit(4)
	},
	"fake-yours-exits": func() { must(fakeSuccessor().Ready()); os.Exit(5) },
	"fake-yours-hangs": func() { must(fakeSuccessor().Ready()); time.Sleep(time.Hour) },
	"fake-yours-garbage": func() {
		p := fakeSuccessor()
		must(p.Ready())
		f, err := p.File()
		must(err)
		_, _ = unix.Write(int(f.Fd()), []byte("garbage"))
		time.Sleep(time.Hour)
	},
}

func fakeSuccessor() *handover.Predecessor {
	p, err := handover.Inherit(func(error) {})
	must(err)
	return p
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// TestUpgradeFails: whatever the new process does, and at whatever step, the daemon goes on as it was, its flows
// live, the command says why, and nothing of the new process is left.
func TestUpgradeFails(t *testing.T) {
	d := startUpgradable(t)
	c, err := net.Dial("tcp", d.edge)
	check(t, err)
	defer c.Close()
	check(t, echo(c))
	notExecutable := filepath.Join(d.dir, "not-executable")
	check(t, os.WriteFile(notExecutable, nil, 0o600))
	good, err := os.ReadFile(d.config)
	check(t, err)
	path := func(name string) string {
		p, err := exec.LookPath(name)
		check(t, err)
		return p
	}
	open := 0
	for _, f := range []struct {
		name  string
		args  []string
		yaml  string // a change of the configuration
		wants string
	}{
		{"no such file", []string{"--binary", filepath.Join(d.dir, "nothing")}, "", "no such file"},
		{"not executable", []string{"--binary", notExecutable}, "", "permission denied"},
		{"a folder", []string{"--binary", d.dir}, "", "permission denied"},
		{"knows nothing of this", []string{"--binary", "/bin/true"}, "", "it ended: exit status 0"},
		{"ignores it", []string{"--binary", path("fake-ignores")}, "", "another daemon answers there"},
		{"exits", []string{"--binary", path("fake-exits")}, "", "I will not"},
		{"crashes", []string{"--binary", path("fake-panics")}, "", "nil pointer"},
		{"hangs", []string{"--binary", path("fake-hangs"), "--timeout", "1s"}, "", "not ready after 1s"},
		{"sends garbage", []string{"--binary", path("fake-garbage")}, "", "makes no sense"},
		{"closes its end", []string{"--binary", path("fake-closes")}, "", "closed its connection"},
		{"exits when it is ready", []string{"--binary", path("fake-ready-exits")}, "", "exit status 4"},
		{"exits when it should serve", []string{"--binary", path("fake-yours-exits")}, "", "exit status 5"},
		{"hangs when it should serve", []string{"--binary", path("fake-yours-hangs")}, "", "not serving after"},
		{"sends garbage when it should serve", []string{"--binary", path("fake-yours-garbage")}, "", "makes no sense"},
		{"broken configuration", nil, "listeners: [ { mode: nonsense } ]\n", "nonsense"},
		{"no time", []string{"--timeout", "0s"}, "", "--timeout must be more than 0"},
	} {
		t.Run(f.name, func(t *testing.T) {
			if f.yaml != "" {
				check(t, os.WriteFile(d.config, []byte(f.yaml), 0o600))
				defer os.WriteFile(d.config, good, 0o600)
			}
			out, err := d.ask(append([]string{"upgrade"}, f.args...)...)
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.ExitCode() == 0 || !strings.Contains(out, f.wants) {
				t.Errorf("the command says (%v), want a failure that has %q", err, f.wants)
			}
			if err := echo(c); err != nil {
				t.Errorf("the flow: %v", err)
			}
			if err := errors.Join(d.newFlow(), d.request()); err != nil {
				t.Errorf("a new connection: %v", err)
			}
			if pids := d.processes(); len(pids) != 1 || pids[0] != d.cmd.Process.Pid {
				t.Errorf("the processes are %v, want %d alone", pids, d.cmd.Process.Pid)
			}
			if s := d.status(); len(s.Older) > 0 {
				t.Errorf("status has %+v", s.Older)
			}
			if open == 0 {
				open = files(d.cmd.Process.Pid)
			}
			wait(t, "its descriptors are closed", func() error {
				if now := files(d.cmd.Process.Pid); now > open {
					return fmt.Errorf("%d are open, %d were before", now, open)
				}
				return nil
			})
			if left := strings.Count(generations(d), "\n"); left > 1 {
				t.Errorf("pins are left:\n%s", generations(d))
			}
		})
	}
	if out, err := d.ask("reload"); err != nil {
		t.Errorf("reload: %v: %s", err, out)
	}
	if out, err := d.ask("upgrade"); err != nil {
		t.Errorf("an upgrade that nothing keeps from success: %v: %s", err, out)
	}
	check(t, echo(c))
	check(t, d.newFlow())
}

// generations are those of pinned maps of the daemon, a line each.
func generations(d *upgradable) string {
	all, _ := filepath.Glob("/sys/fs/bpf/tailsplice/*" + filepath.Base(d.dir) + "*/[0-9]*")
	return strings.Join(all, "\n") + "\n"
}

// TestUpgradeGivenUp: the command ends before the new process is ready, and a second upgrade is refused while
// one is under way.
func TestUpgradeGivenUp(t *testing.T) {
	d := startUpgradable(t)
	hangs, err := exec.LookPath("fake-hangs")
	check(t, err)
	cmd := exec.Command("tailsplice", "upgrade", "--binary", hangs, "--control", d.control)
	check(t, cmd.Start())
	wait(t, "the new process is there", func() error {
		if n := len(d.processes()); n != 2 {
			return fmt.Errorf("%d processes", n)
		}
		return nil
	})
	if out, err := d.ask("upgrade"); err == nil || !strings.Contains(out, "another upgrade is under way") {
		t.Errorf("a second upgrade: %v: %s", err, out)
	}
	check(t, d.newFlow())
	check(t, cmd.Process.Kill())
	_ = cmd.Wait()
	wait(t, "the new process is ended", func() error {
		if n := len(d.processes()); n != 1 {
			return fmt.Errorf("%d processes", n)
		}
		return nil
	})
	check(t, d.newFlow())
	if out, err := d.ask("upgrade"); err != nil {
		t.Errorf("the next upgrade: %v: %s", err, out)
	}
}

// TestUpgradeEnds: TERM to the first process, which a supervisor knows, ends the newest and all in between
// within --drain-timeout, and the first with the status of the newest.
func TestUpgradeEnds(t *testing.T) {
	const soon = "2s"
	for _, c := range []struct {
		name     string
		upgrades int
		flow     bool
		end      func(d *upgradable, newest int)
		wants    int
	}{
		{"no flow", 1, false, func(d *upgradable, _ int) { check(t, d.cmd.Process.Signal(syscall.SIGTERM)) }, 0},
		{"no flow, and the first had none when there was a third", 2, false,
			func(d *upgradable, _ int) { check(t, d.cmd.Process.Signal(syscall.SIGTERM)) }, 0},
		{"flows", 3, true, func(d *upgradable, _ int) { check(t, d.cmd.Process.Signal(syscall.SIGTERM)) }, 0},
		{"the newest", 2, true, func(_ *upgradable, newest int) { check(t, syscall.Kill(newest, syscall.SIGTERM)) }, 0},
		{"a crash", 2, true, func(_ *upgradable, newest int) { check(t, syscall.Kill(newest, syscall.SIGKILL)) }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			within := soon
			if !c.flow {
				within = "10m" // nobody has to wait for it
			}
			d := startUpgradable(t, "--drain-timeout", within)
			var flows []net.Conn
			newest := d.cmd.Process.Pid
			for range c.upgrades {
				if c.flow {
					f, err := net.Dial("tcp", d.edge)
					check(t, err)
					defer f.Close()
					check(t, echo(f))
					flows = append(flows, f)
				}
				before := d.processes()
				out, err := d.ask("upgrade")
				check(t, err)
				_, err = fmt.Sscanf(out, "process %d has taken over", &newest)
				check(t, err)
				if slices.Contains(before, newest) {
					t.Fatalf("%s, but that is an old one", out)
				}
				if !c.flow {
					wait(t, "the older process is empty", func() error {
						if s := d.status(); len(s.Older) > 0 {
							return fmt.Errorf("status has %+v", s.Older)
						}
						return nil
					})
				}
			}
			for _, f := range flows {
				check(t, echo(f))
			}
			c.end(d, newest)
			ended := make(chan error, 1)
			go func() { ended <- d.cmd.Wait() }()
			select {
			case <-ended:
				if code := d.cmd.ProcessState.ExitCode(); code != c.wants {
					t.Errorf("the first process ends with %d, want %d", code, c.wants)
				}
			case <-time.After(time.Minute):
				t.Error("the first process does not end")
			}
			wait(t, "all processes end", func() error {
				if pids := d.processes(); len(pids) > 0 {
					return fmt.Errorf("%v are left", pids)
				}
				return nil
			})
			if c.wants == 0 {
				if _, err := os.Stat(d.control); err == nil {
					t.Error("the control socket's file is left")
				}
			}
		})
	}
}

// TestUpgradeOldKilled: the old process is killed at each step. Before it has said yours the new one ends, and
// after that it serves.
func TestUpgradeOldKilled(t *testing.T) {
	path, err := exec.LookPath("tailsplice")
	check(t, err)
	for _, step := range []string{"start", handover.Sockets, handover.Ready, handover.Yours} {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			run, err := os.MkdirTemp("", "ts-up-")
			check(t, err)
			defer os.RemoveAll(run)
			config, control := filepath.Join(dir, "edge.yaml"), filepath.Join(run, "control.sock")
			ln := listen(t, "127.0.0.77:0")
			defer ln.Close()
			check(t, os.WriteFile(config, fmt.Appendf(nil, "listeners: [{ name: edge, listen: [%q], mode: tcp, default: { forward: %q } }]\ncontrol: { socket: %q }\n",
				ln.Addr(), "127.0.0.1:1", control), 0o600))
			log, err := os.Create(filepath.Join(dir, "log"))
			check(t, err)
			defer log.Close()
			var said []string
			lines := make(chan string, 1000)
			s, err := handover.Start(handover.Program{Path: path, Args: []string{"run", "--config", config}, Stderr: log,
				Lines: func(b []byte) { lines <- string(b) }})
			check(t, err)
			defer s.Kill()
			f, err := ln.(*net.TCPListener).File()
			check(t, err)
			defer f.Close()
			ctx := t.Context()
			steps := []func(){
				func() {
					check(t, s.SendSockets([]handover.Socket{{Kind: handover.KindListener, Name: "edge", Address: ln.Addr().String(), File: f}}, nil))
				},
				func() { _, err := s.Await(ctx, handover.Ready, time.Minute); check(t, err) },
				func() { check(t, s.Send(handover.Message{Step: handover.Yours})) },
			}
			for i := range slices.Index([]string{"start", handover.Sockets, handover.Ready, handover.Yours}, step) {
				steps[i]()
			}
			if step == handover.Yours {
				ln.Close()
			}
			s.Close()
			if step != handover.Yours {
				select {
				case <-s.Gone():
				case <-time.After(time.Minute):
					t.Error("the new process goes on")
				}
				wait(t, "it says why", func() error {
					for len(lines) > 0 {
						said = append(said, <-lines)
					}
					if text := strings.Join(said, ""); !strings.Contains(text, "has ended, or goes on by itself") {
						return fmt.Errorf("it says %q", text)
					}
					return nil
				})
				return
			}
			wait(t, "the new process serves", func() error {
				return exec.Command("tailsplice", "status", "--control", control).Run()
			})
			c, err := net.Dial("tcp", ln.Addr().String())
			check(t, err)
			defer c.Close()
			check(t, c.SetDeadline(time.Now().Add(time.Minute)))
			if _, err := bufio.NewReader(c).ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("nobody has taken the connection: %v", err) // whose target refuses
			}
			check(t, s.Signal(syscall.SIGTERM))
			<-s.Gone()
			if s.State() == nil || !s.State().Success() {
				t.Errorf("TERM: %v", s.State())
			}
		})
	}
}
