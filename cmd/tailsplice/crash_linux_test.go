package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
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

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/handover"
)

// manager stands in for the service manager: it keeps descriptors, and starts a daemon again.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	dir  string
	args []string
	env  []string // of the daemon, beside this process's
	cmd  *exec.Cmd
	log  *os.File

	isAbsent bool // the daemon knows of no manager

	mu sync.Mutex
	// +checklocks:mu
	kept []handover.Socket // Name is what it is called
	// +checklocks:mu
	main int // the process that was said to be the main one
}

func newManager(t *testing.T, args ...string) *manager {
	dir, err := os.MkdirTemp("", "ts-crash-")
	check(t, err)
	m := &manager{t: t, dir: dir, args: args}
	m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	check(t, err)
	m.log, err = os.Create(filepath.Join(dir, "log"))
	check(t, err)
	go m.listen()
	t.Cleanup(func() {
		if m.cmd != nil {
			m.cmd.Process.Kill()
			m.cmd.Wait()
		}
		m.conn.Close()
		m.mu.Lock()
		handover.Close(m.kept)
		m.mu.Unlock()
		if t.Failed() {
			t.Logf("the log:\n%s", m.said())
		}
		os.RemoveAll(dir)
	})
	return m
}

func (m *manager) said() string {
	b, _ := os.ReadFile(m.log.Name())
	return string(b)
}

func (m *manager) listen() {
	for {
		b, oob := make([]byte, 4096), make([]byte, 4096)
		n, oobn, _, _, err := m.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		said := map[string]string{}
		for line := range strings.Lines(string(b[:n])) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			said[key] = value
		}
		m.mu.Lock()
		if pid, err := strconv.Atoi(said["MAINPID"]); err == nil && lives(pid) {
			m.main = pid
		}
		if said["FDSTOREREMOVE"] == "1" {
			m.kept = slices.DeleteFunc(m.kept, func(s handover.Socket) bool {
				if s.Name == said["FDNAME"] {
					s.File.Close()
				}
				return s.Name == said["FDNAME"]
			})
		}
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, c := range messages {
			fds, _ := unix.ParseUnixRights(&c)
			for _, fd := range fds {
				if said["FDSTORE"] != "1" { // a barrier
					unix.Close(fd)
					continue
				}
				unix.CloseOnExec(fd)
				m.kept = append(m.kept, handover.Socket{Name: said["FDNAME"], File: os.NewFile(uintptr(fd), "kept")})
			}
		}
		m.mu.Unlock()
	}
}

// lives reports whether a process has not ended, which nobody may have waited for.
func lives(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// flows are the ids of the flows that are kept now.
func (m *manager) flows() (ids []string) {
	var ends []handover.Socket
	m.mu.Lock()
	for _, s := range m.kept {
		kind, query, _ := strings.Cut(s.Name, "?")
		v, err := url.ParseQuery(query)
		if k := (handover.Socket{Kind: kind, Address: v.Get("address")}); err == nil && handover.IsOfFlows(k) {
			fd, err := unix.FcntlInt(s.File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			check(m.t, err)
			k.File = os.NewFile(uintptr(fd), "copy")
			ends = append(ends, k)
		}
	}
	m.mu.Unlock()
	handover.OpenQueue(ends, nil).Flows(m.t.Context(), func(k *handover.KeptFlow) {
		ids = append(ids, k.Flow.Client)
		k.Close()
	})
	handover.Close(ends)
	return ids
}

// start starts the daemon with what is kept.
func (m *manager) start() {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec tailsplice "$@"`, "sh"}, m.args...)...)
	for _, s := range m.kept {
		names = append(names, s.Name)
		c.ExtraFiles = append(c.ExtraFiles, s.File)
	}
	c.Env = append(os.Environ(), m.env...)
	if !m.isAbsent {
		c.Env = append(c.Env, "NOTIFY_SOCKET="+m.conn.LocalAddr().String(),
			fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	c.Stderr = m.log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(m.t, c.Start())
	m.cmd = c
}

// mainProcess is the daemon's main process, as far as the manager knows.
func (m *manager) mainProcess() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Or(m.main, m.cmd.Process.Pid)
}

// supervise has all processes of the daemon killed, and another started, whenever the main one has ended.
func (m *manager) supervise() (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if lives(m.mainProcess()) {
				continue
			}
			m.killAll()
			m.mu.Lock()
			m.main = 0
			m.mu.Unlock()
			m.start()
		}
	}()
	return func() {
		close(end)
		<-done
	}
}

// killAll kills all processes of the daemon.
func (m *manager) killAll() {
	for _, pid := range m.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = m.cmd.Wait()
	wait(m.t, "all processes have ended", func() error {
		if pids := m.processes(); len(pids) > 0 {
			return fmt.Errorf("%v live", pids)
		}
		return nil
	})
}

// processes are those of the daemon that live.
func (m *manager) processes() []int { return processesOf(m.args[2]) }

// kill kills the daemon.
func (m *manager) kill() {
	m.cmd.Process.Kill()
	m.cmd.Wait()
	m.cmd = nil
}

// left is what the last daemon has said of the flows of the one before it.
func (m *manager) left(times int) (found struct {
	Flows    int
	GoOn     int     `json:"go_on"`
	Half     int     `json:"half_ended"`
	Lost     int     `json:"lost_bytes"`
	Failed   int     `json:"unusable"`
	Duration float64 `json:"duration"`
}) {
	m.t.Helper()
	wait(m.t, "the flows are seen to", func() error {
		var lines []string
		for line := range strings.Lines(m.said()) {
			if strings.Contains(line, "has left its flows") {
				lines = append(lines, line)
			}
		}
		if len(lines) < times {
			return fmt.Errorf("it is said %d times, want %d", len(lines), times)
		}
		return json.Unmarshal([]byte(lines[len(lines)-1]), &found)
	})
	return found
}

// crashing is a flow that is echoed.
type crashing struct {
	net.Conn
	moved atomic.Int64
	ended chan struct{}
	err   error
}

// talk sends n bytes at a time, and reads them back before it sends more; where isBulk it does not wait for that. It
// pauses before it sends.
func talk(c net.Conn, n int, isBulk bool, pause time.Duration) *crashing {
	f := &crashing{Conn: c, ended: make(chan struct{})}
	seed := [32]byte{byte(rand.Uint32()), byte(rand.Uint32())}
	from, to := rand.NewChaCha8(seed), rand.NewChaCha8(seed)
	send := func() error {
		b := make([]byte, n)
		from.Read(b)
		_, err := c.Write(b)
		return err
	}
	sent := make(chan error, 1)
	if isBulk {
		go func() {
			for {
				if err := send(); err != nil {
					sent <- err
					return
				}
			}
		}()
	}
	go func() {
		defer close(f.ended)
		got, want := make([]byte, n), make([]byte, n)
		for f.err == nil {
			if !isBulk {
				time.Sleep(pause)
				f.err = send()
			}
			if f.err == nil {
				_, f.err = io.ReadFull(c, got)
			}
			if to.Read(want); f.err == nil && !slices.Equal(got, want) {
				f.err = errors.New("other bytes came back")
			}
			f.moved.Add(int64(n))
		}
		if isBulk && (f.err == io.EOF || f.err == io.ErrUnexpectedEOF) {
			f.err = <-sent // TCP tells an error once
		}
	}()
	return f
}

// TestCrashFlows: the daemon is killed while flows live, three times. Those that are idle go on, and so do all others
// or they are reset; none is stuck, and no byte is lost. After a proper end none is kept.
func TestCrashFlows(t *testing.T) {
	t.Run("userspace", func(t *testing.T) { testCrashFlows(t, "userspace", 0) })
	t.Run("sockmap", func(t *testing.T) {
		needRoot(t)
		testCrashFlows(t, "sockmap", 50)
	})
}

// testCrashFlows has flows of a datapath, with so many of them in the kernel at least.
func testCrashFlows(t *testing.T, datapath string, least int) {
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, struct{ io.Reader }{c}) }()
		}
	}()
	address := freeaddr.Get(t)
	m := newManager(t)
	control, file := filepath.Join(m.dir, "control.sock"), filepath.Join(m.dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, `
datapath: %s
listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]
limits: { connections_per_source: 1000 }
control: { socket: %q }
`, datapath, address, target.Addr(), control), 0o600))
	m.args = []string{"run", "--config", file, "--log-format", "json"}
	m.start()
	answers := func() {
		t.Helper()
		wait(t, "the daemon answers", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			return exec.CommandContext(ctx, "tailsplice", "status", "--control", control).Run()
		})
	}
	answers()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", address)
		check(t, err)
		t.Cleanup(func() { c.Close() })
		check(t, c.SetDeadline(time.Now().Add(5*time.Minute)))
		return c
	}
	var idle []net.Conn
	for range 50 {
		c := dial()
		check(t, echo(c))
		check(t, c.SetDeadline(time.Now().Add(5*time.Minute)))
		idle = append(idle, c)
	}
	var busy []*crashing
	for times := 1; times <= 3; times++ {
		for len(busy) < 24 {
			switch len(busy) % 8 {
			case 7:
				busy = append(busy, talk(dial(), 50_000, true, 0))
			case 6: // which auto gives to the kernel
				busy = append(busy, talk(dial(), 100, false, 0))
			default:
				busy = append(busy, talk(dial(), 100, false, time.Millisecond))
			}
		}
		wait(t, "all flows are kept", func() error {
			kept := m.flows()
			for _, c := range idle {
				if !slices.Contains(kept, c.LocalAddr().String()) {
					return fmt.Errorf("an idle one is not, and %d are", len(kept))
				}
			}
			for _, f := range busy {
				if !slices.Contains(kept, f.LocalAddr().String()) {
					return fmt.Errorf("a busy one is not, and %d are", len(kept))
				}
			}
			return nil
		})
		inKernel := 0
		wait(t, "flows are in the kernel", func() error {
			out, err := exec.CommandContext(t.Context(), "tailsplice", "flows", "--json", "--control", control).Output()
			inKernel = strings.Count(string(out), `"datapath": "sockmap"`)
			if err == nil && inKernel < least {
				err = fmt.Errorf("%d are", inKernel)
			}
			return err
		})
		m.kill()
		m.start()
		answers()
		found := m.left(times)
		if found.Flows != len(idle)+len(busy) || found.Failed > 0 || found.GoOn+found.Half+found.Lost != found.Flows {
			t.Errorf("the daemon says of them: %+v", found)
		}
		goOn := 0
		busy = slices.DeleteFunc(busy, func(f *crashing) bool {
			moved := f.moved.Load()
			for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
				select {
				case <-f.ended:
					if !errors.Is(f.err, syscall.ECONNRESET) && !errors.Is(f.err, syscall.EPIPE) {
						t.Errorf("a flow has ended, and not by a reset: %v", f.err)
					}
					return true
				default:
				}
				if f.moved.Load() > moved+400_000 || f.moved.Load() > moved+400 && f.moved.Load()%50_000 != 0 {
					goOn++
					return false
				}
				if time.Now().After(end) {
					t.Error("a flow is stuck")
					return true
				}
			}
		})
		for _, c := range idle {
			if err := echo(c); err != nil {
				t.Errorf("an idle flow: %v", err)
			}
		}
		t.Logf("%d flows were in the kernel, %d that moved bytes go on; the daemon says %+v", inKernel, goOn, found)
		if goOn < 10 {
			t.Errorf("%d of 24 flows that moved bytes go on", goOn)
		}
	}
	for _, f := range busy {
		f.Close()
	}
	check(t, m.cmd.Process.Signal(syscall.SIGTERM))
	wait(t, "no flow is kept", func() error {
		if kept := m.flows(); len(kept) > 0 {
			return fmt.Errorf("%d are", len(kept))
		}
		return nil
	})
	if err := echo(idle[0]); err != nil { // it drains
		t.Error(err)
	}
	for _, c := range idle {
		c.Close()
	}
	check(t, m.cmd.Wait())
	m.cmd = nil
}

// TestCrashEnd: a daemon that is told to end as soon as it runs ends flows of the one before it with a reset. A proper
// end would say that all had come.
func TestCrashEnd(t *testing.T) {
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, struct{ io.Reader }{c}) }()
		}
	}()
	address := freeaddr.Get(t)
	m := newManager(t)
	file := filepath.Join(m.dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, `
datapath: userspace
listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]
limits: { connections_per_source: 1000 }
control: { socket: %q }
`, address, target.Addr(), filepath.Join(m.dir, "control.sock")), 0o600))
	m.args = []string{"run", "--config", file, "--log-format", "json", "--drain-timeout", "0s"}
	m.start()
	const flows = 200
	var idle []net.Conn
	for range flows {
		var c net.Conn
		wait(t, "the daemon accepts", func() (err error) { c, err = net.Dial("tcp", address); return err })
		defer c.Close()
		check(t, echo(c))
		idle = append(idle, c)
	}
	wait(t, "all flows are kept", func() error {
		if kept := m.flows(); len(kept) != flows {
			return fmt.Errorf("%d are", len(kept))
		}
		return nil
	})
	m.kill()
	m.start()
	wait(t, "the next one runs", func() error {
		if n := strings.Count(m.said(), "tailsplice runs"); n != 2 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	check(t, m.cmd.Process.Signal(syscall.SIGTERM))
	check(t, m.cmd.Wait())
	m.cmd = nil
	for _, c := range idle {
		check(t, c.SetDeadline(time.Now().Add(time.Minute)))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("a flow ends with %v, want a reset", err)
		}
	}
}

// TestCrashBeforeMain: the process that is upgraded is killed when the new one serves, and before it could
// say that this is the main one. It is: the manager hears of it, and keeps what it has. Flows go on there, as
// after a crash.
func TestCrashBeforeMain(t *testing.T) {
	m, address, control := newEcho(t)
	m.start()
	const flows = 20
	var idle []net.Conn
	dial := func() net.Conn {
		t.Helper()
		var c net.Conn
		wait(t, "the daemon accepts", func() (err error) { c, err = net.Dial("tcp", address); return err })
		t.Cleanup(func() { c.Close() })
		check(t, echo(c))
		return c
	}
	keptAre := func(n int) {
		t.Helper()
		wait(t, "all flows are kept", func() error {
			if kept := m.flows(); len(kept) != n {
				return fmt.Errorf("%d are", len(kept))
			}
			return nil
		})
	}
	for range flows {
		idle = append(idle, dial())
	}
	keptAre(flows)
	path, err := exec.LookPath("fake-kills-old")
	check(t, err)
	_ = exec.CommandContext(t.Context(), "tailsplice", "upgrade", "--binary", path, "--control", control).Run()
	var killed *exec.ExitError
	if err := m.cmd.Wait(); !errors.As(err, &killed) {
		t.Fatalf("the old process ends with %v", err)
	}
	m.cmd = nil
	next := 0
	wait(t, "the new process is the main one", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if next = m.main; next == 0 {
			return errors.New("the manager knows nothing of it")
		}
		return nil
	})
	defer func() { syscall.Kill(next, syscall.SIGKILL) }() // or of the one after it
	for i, c := range idle {
		if err := echo(c); err != nil {
			t.Errorf("flow %d: %v", i, err)
		}
	}
	idle = append(idle, dial())
	keptAre(flows + 1)
	check(t, syscall.Kill(next, syscall.SIGKILL))
	m.start() // and after a crash of that one
	m.left(2)
	for i, c := range idle {
		if err := echo(c); err != nil {
			t.Errorf("flow %d, after another crash: %v", i, err)
		}
	}
	out, err := exec.CommandContext(t.Context(), "tailsplice", "upgrade", "--control", control).CombinedOutput()
	if err != nil {
		t.Errorf("an upgrade later: %v: %s", err, out)
	}
	wait(t, "that is known", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.main == next {
			return errors.New("it is not")
		}
		next = m.main
		return nil
	})
}

// TestCrashServing: a new process that ends as soon as it serves leaves all as it was: the old one is the
// main one, accepts, has its flows, and they are kept. One that ends as the main one has the old one end,
// too, so that another is started.
func TestCrashServing(t *testing.T) {
	m, address, control := newEcho(t)
	m.start()
	var c net.Conn
	wait(t, "the daemon accepts", func() (err error) { c, err = net.Dial("tcp", address); return err })
	defer c.Close()
	check(t, echo(c))
	upgrade := func(fake string) error {
		path, err := exec.LookPath(fake)
		check(t, err)
		args := []string{"upgrade", "--binary", path, "--control", control}
		return exec.CommandContext(t.Context(), "tailsplice", args...).Run()
	}
	isKept := func() {
		t.Helper()
		wait(t, "the flow is kept", func() error {
			if kept := m.flows(); len(kept) != 1 {
				return fmt.Errorf("%d are", len(kept))
			}
			return nil
		})
	}
	isKept()
	for range 2 {
		if err := upgrade("fake-serving-exits"); err == nil {
			t.Error("the upgrade succeeds")
		}
		check(t, echo(c))
		fresh, err := net.Dial("tcp", address)
		check(t, err)
		check(t, echo(fresh))
		fresh.Close()
		m.mu.Lock()
		if m.main != 0 && m.main != m.cmd.Process.Pid {
			t.Errorf("the main process is %d, want %d", m.main, m.cmd.Process.Pid)
		}
		m.mu.Unlock()
		isKept()
	}
	m.kill()
	m.start()
	m.left(1)
	check(t, echo(c))

	check(t, upgrade("fake-main-exits"))
	if err := m.cmd.Wait(); err == nil {
		t.Error("the daemon, which serves no more, ends as if it were to")
	}
	m.start()
	fresh, err := net.Dial("tcp", address)
	check(t, err)
	defer fresh.Close()
	check(t, echo(fresh))
}

// newEcho is a manager of a daemon that has an echo server behind its listener at address.
func newEcho(t *testing.T) (m *manager, address, control string) {
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, struct{ io.Reader }{c}) }()
		}
	}()
	address = freeaddr.Get(t)
	m = newManager(t)
	control = filepath.Join(m.dir, "control.sock")
	file := filepath.Join(m.dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, `
listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]
control: { socket: %q }
`, address, target.Addr(), control), 0o600))
	m.args = []string{"run", "--config", file, "--log-format", "json"}
	return m, address, control
}

// state is what is kept beside the sockets.
func (m *manager) state() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.kept {
		if strings.HasPrefix(s.Name, "state?") {
			b := make([]byte, 1<<20)
			n, err := s.File.ReadAt(b, 0)
			if err != io.EOF {
				check(m.t, err)
			}
			return string(b[:n])
		}
	}
	return ""
}

// TestCrashHealth: the process after a crash sends nobody to a target that was found down.
func TestCrashHealth(t *testing.T) {
	bad, good, n := sick(t)
	address := freeaddr.Get(t)
	m := newManager(t)
	file := filepath.Join(m.dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, "listeners:\n%s\ncontrol: { socket: %q }\n", sickListener(address, bad, good),
		filepath.Join(m.dir, "control.sock")), 0o600))
	m.args = []string{"run", "--config", file, "--log-format", "json"}
	m.start()
	for range 2 {
		wait(t, "it is kept that the target is down", func() error {
			if s := m.state(); !strings.Contains(s, `"down":true`) {
				return fmt.Errorf("kept is %q", s)
			}
			return nil
		})
		n.Store(0)
		m.kill()
		m.start()
		strangers(t, address)
		if n.Load() > 0 {
			t.Errorf("it has got %d requests", n.Load())
		}
	}
	if times := strings.Count(m.said(), "a target is down"); times != 1 {
		t.Errorf("it was found down %d times", times)
	}
}
