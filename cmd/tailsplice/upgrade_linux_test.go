package main

import (
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

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// upgradable is a daemon that is upgraded.
type upgradable struct {
	t                    testing.TB
	cmd                  *exec.Cmd
	dir, config, control string
	edge, web            string // addresses of a tcp and an http listener
	target               string // of the former
	half                 string // of one whose target answers when finish is closed, and the client has ended its stream
	finish               chan struct{}
}

// startUpgradable starts it, with an echo server behind one listener, and one that says hello behind the other.
func startUpgradable(t testing.TB, flags ...string) *upgradable {
	t.Helper()
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() {
				defer c.Close()
				_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // else it has a pipe
			}()
		}
	}()
	finish := make(chan struct{})
	late := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := late.Accept(); err == nil; c, err = late.Accept() {
			go func() {
				defer c.Close()
				said, _ := io.ReadAll(c)
				<-finish
				_, _ = c.Write(said)
			}()
		}
	}()
	hello := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	t.Cleanup(hello.Close)
	dir, err := os.MkdirTemp("", "ts-up-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	free := func() string { return freeaddr.Of(t, "127.0.0.77") }
	d := &upgradable{t: t, dir: dir, config: filepath.Join(dir, "edge.yaml"), control: filepath.Join(dir, "control.sock"),
		edge: free(), web: free(), half: free(), finish: finish, target: target.Addr().String()}
	check(t, os.WriteFile(d.config, fmt.Appendf(nil, `
listeners:
  - { name: edge, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: half, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: web, listen: [%q], mode: http, access_log: { file: %q }, default: { forward: %q } }
control: { socket: %q, metrics: %q, health: %q }
limits: { connections_per_source: 60000 } # who comes while nobody accepts is admitted at once
`, d.edge, target.Addr(), d.half, late.Addr(), d.web, filepath.Join(dir, "access.log"), hello.Listener.Addr(), d.control, free(), free()), 0o600))
	d.start(flags...)
	return d
}

// start starts the daemon that d describes.
func (d *upgradable) start(flags ...string) {
	t := d.t
	t.Helper()
	log, err := os.Create(filepath.Join(d.dir, "log"))
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
func (d *upgradable) processes() (pids []int) { return processesOf(d.config) }

// processesOf are those whose command lines name a configuration.
func processesOf(config string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range all {
		text, err := os.ReadFile(file)
		if err == nil && slices.Contains(strings.Split(string(text), "\x00"), config) {
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
func (d *upgradable) request() error { return getHello("http://" + d.web) }

// getHello makes a request, on a connection of its own, of a target that says hello.
func getHello(url string) error {
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get(url)
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

// chatter has small messages echoed until it is stopped. longest is how long one of them took at most.
func chatter(t *testing.T, address string) (stop func() (longest time.Duration)) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	check(t, err)
	end, ended := make(chan struct{}), make(chan struct{})
	var longest time.Duration
	go func() {
		defer close(ended)
		defer c.Close()
		for {
			select {
			case <-end:
				return
			default:
			}
			began := time.Now()
			if err := echo(c); err != nil {
				t.Errorf("a flow of small messages: %v", err)
				return
			}
			longest = max(longest, time.Since(began))
		}
	}()
	return func() time.Duration {
		close(end)
		<-ended
		return longest
	}
}

// TestUpgrade: 10 upgrades under 200 new connections a second, and reloads in between, refuse and break none, and
// cut no flow: idle ones, small messages, bulk both ways, and those of which half has ended, all of which go over
// to the new process. Nothing is left of older processes but the first, for which the supervisor waits.
func TestUpgrade(t *testing.T) {
	d := startUpgradable(t)
	streams := []*stream{startStream(t, d.edge), startStream(t, d.edge)}
	var chats []func() time.Duration
	for range 3 {
		chats = append(chats, chatter(t, d.edge))
	}
	var idle []net.Conn
	for range 50 {
		c, err := net.Dial("tcp", d.edge)
		check(t, err)
		defer c.Close()
		check(t, echo(c))
		idle = append(idle, c)
	}
	half, err := net.Dial("tcp", d.half)
	check(t, err)
	defer half.Close()
	_, err = io.WriteString(half, "said")
	check(t, err)
	check(t, half.(*net.TCPConn).CloseWrite())
	var shown []flow.Snapshot
	wait(t, "all flows are shown", func() error {
		if shown = d.flows(); len(shown) != 56 {
			return fmt.Errorf("%d are, want 56", len(shown))
		}
		return nil
	})
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
	settle := func() {
		t.Helper()
		began := time.Now()
		wait(t, "no older process has anything left", func() error {
			if s, pids := d.status(), d.processes(); len(s.Older) > 0 || len(pids) != 2 {
				return fmt.Errorf("status has %+v, and the processes are %v", s.Older, pids)
			}
			return nil
		})
		t.Logf("the older processes had ended %v after an upgrade", time.Since(began).Round(time.Millisecond))
	}
	for range 3 {
		upgrade()
		settle()
	}
	for range 7 { // also while flows go over
		upgrade()
	}
	settle()
	close(stop)
	workers.Wait()
	now := map[string]flow.Snapshot{}
	for _, f := range d.flows() {
		now[f.ID] = f
	}
	for _, was := range shown {
		f, isThere := now[was.ID]
		if !isThere || !f.Started.Equal(was.Started) || f.BytesUp < was.BytesUp || f.Upstream != was.Upstream {
			t.Errorf("a flow that was shown as %+v is shown as %+v", was, f)
		}
	}
	for _, c := range idle {
		check(t, echo(c))
	}
	close(d.finish)
	check(t, half.SetReadDeadline(time.Now().Add(time.Minute)))
	if said, err := io.ReadAll(half); err != nil || string(said) != "said" {
		t.Errorf("a flow of which half had ended: %q, %v", said, err)
	}
	for _, s := range streams {
		s.stop(t)
	}
	for _, stop := range chats {
		t.Logf("the longest of small messages took %v", stop())
	}
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

// flows are those that the newest process shows.
func (d *upgradable) flows() (all []flow.Snapshot) {
	d.t.Helper()
	out, err := d.ask("flows", "--json")
	check(d.t, err)
	check(d.t, json.Unmarshal([]byte(out), &all))
	return all
}

// TestUpgradeAfterHook: what is withdrawn since a reload is so before the new process announces: both may be of the
// same.
func TestUpgradeAfterHook(t *testing.T) {
	d := startUpgradable(t)
	plain, err := os.ReadFile(d.config)
	check(t, err)
	said, may := filepath.Join(d.dir, "said"), filepath.Join(d.dir, "may")
	configure := func(announce string) {
		t.Helper()
		check(t, os.WriteFile(d.config, []byte(strings.Replace(string(plain), "name: edge,", "name: edge, "+announce, 1)), 0o600))
	}
	reload := func() {
		t.Helper()
		_, err := d.ask("reload")
		check(t, err)
	}
	tells := func() string { b, _ := os.ReadFile(said); return strings.Join(strings.Fields(string(b)), " ") }
	told := func(want string) {
		t.Helper()
		wait(t, "others are told", func() error {
			if is := tells(); is != want {
				return fmt.Errorf("%q, want %q", is, want)
			}
			return nil
		})
	}
	down := fmt.Sprintf("echo a withdraws >>%s; while [ ! -e %s ]; do sleep 0.01; done; echo a down >>%s", said, may, said)
	configure(fmt.Sprintf(`announce: { timeout: 1m, up: [sh, -c, "echo a up >>%s"], down: [sh, -c, %q] },`, said, down))
	reload()
	told("a up")
	configure("")
	reload()
	told("a up a withdraws")
	configure(fmt.Sprintf(`announce: { up: [sh, -c, "echo b up >>%s"], down: ["true"] },`, said))
	upgraded := make(chan error, 1)
	go func() {
		_, err := d.ask("upgrade")
		upgraded <- err
	}()
	// What must not come has a while to come.
	for end := time.Now().Add(2 * time.Second); len(upgraded) == 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	check(t, os.WriteFile(may, nil, 0o600))
	check(t, <-upgraded)
	told("a up a withdraws a down b up")
}

// TestUpgradeKilled: one of both processes is killed while flows go over, or just after. Each flow is one's that
// lives, and goes on whole, or is reset: none is stuck. Those that the other had are not lost.
func TestUpgradeKilled(t *testing.T) {
	const flows = 100
	for _, c := range []struct {
		name    string
		old     bool          // the old one is killed
		settled bool          // all flows have gone by then
		after   time.Duration // else
		least   int           // flows that live on
	}{
		{"old, when it has nothing left", true, true, 0, flows},
		{"old, at once", true, false, 0, 0},
		{"old, a little later", true, false, 60 * time.Millisecond, 0},
		{"new, when it has all", false, true, 0, 0},
		{"new, at once", false, false, 0, 0},
		{"new, a little later", false, false, 60 * time.Millisecond, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := startUpgradable(t, "--drain-timeout", "10m")
			var all []net.Conn
			for range flows {
				f, err := net.Dial("tcp", d.edge)
				check(t, err)
				defer f.Close()
				check(t, echo(f))
				all = append(all, f)
			}
			out, err := d.ask("upgrade")
			check(t, err)
			var newest int
			_, err = fmt.Sscanf(out, "process %d has taken over", &newest)
			check(t, err)
			if c.settled {
				wait(t, "all flows have gone", func() error {
					if n := len(d.flows()); n != flows {
						return fmt.Errorf("%d have", n)
					}
					return nil
				})
				wait(t, "the old process has nothing left", func() error {
					if s := d.status(); len(s.Older) > 0 {
						return fmt.Errorf("status has %+v", s.Older)
					}
					return nil
				})
			} else {
				time.Sleep(c.after)
			}
			victim := newest
			if c.old {
				victim = d.cmd.Process.Pid
			}
			check(t, syscall.Kill(victim, syscall.SIGKILL))
			lives := 0
			for i, f := range all {
				switch err := echo(f); {
				case err == nil:
					lives++
				case errors.Is(err, os.ErrDeadlineExceeded):
					t.Errorf("flow %d is stuck", i)
				case !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE):
					t.Errorf("flow %d: %v", i, err)
				}
			}
			t.Logf("%d of %d flows live on", lives, flows)
			if lives < c.least {
				t.Errorf("%d flows live on, want %d", lives, c.least)
			}
			if c.old {
				check(t, d.newFlow())
			}
		})
	}
}

// TestUpgradeFlowsFail: whatever the new process does when it is to take flows, a flow that it was not told to
// begin goes on in the old one.
func TestUpgradeFlowsFail(t *testing.T) {
	for _, c := range []struct {
		name, binary string
		isLost       bool
	}{
		{"takes no flows", "fake-flows-none", false},
		{"exits when it is to take them", "fake-flows-exits", false},
		{"exits when it has read one", "fake-flows-reads", false},
		{"hangs when it has read one", "fake-flows-hangs", false},
		{"sends garbage", "fake-flows-garbage", false},
		{"refuses", "fake-flows-refuses", false},
		{"exits when it has to begin", "fake-flows-begins", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := startUpgradable(t, "--drain-timeout", "10m")
			f, err := net.Dial("tcp", d.edge)
			check(t, err)
			defer f.Close()
			check(t, echo(f))
			path, err := exec.LookPath(c.binary)
			check(t, err)
			out, err := d.ask("upgrade", "--binary", path)
			check(t, err)
			done := filepath.Join(d.dir, "done") // written when it has come so far
			wait(t, out, func() error { _, err := os.Stat(done); return err })
			for range 3 {
				err = echo(f)
				if c.isLost {
					break
				}
				check(t, err)
			}
			if c.isLost && (err == nil || errors.Is(err, os.ErrDeadlineExceeded)) {
				t.Errorf("the process that had the flow has ended, and the flow: %v", err)
			}
		})
	}
}

func init() { fakes = successors }

// successors are programs that are no good ones.
var successors = map[string]func(){
	"tailsplice": mortal,
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
	"fake-serving-exits": func() {
		p := fakeSuccessor()
		must(p.Ready())
		must(p.Serve())
		os.Exit(6)
	},
	"fake-main-exits": func() { // when it is the main one
		p := fakeSuccessor()
		must(p.Ready())
		must(p.Serve())
		must(p.Send(handover.Message{Step: handover.Newest, PID: os.Getpid()}))
		for {
			m, err := p.Receive(time.Time{})
			must(err)
			if m.Step == handover.Main {
				os.Exit(7)
			}
		}
	},
	"fake-kills-old": func() { // once the one that it starts in its place serves
		p := fakeSuccessor()
		f, err := p.File()
		must(err)
		old, err := unix.GetsockoptUcred(int(f.Fd()), unix.SOL_SOCKET, unix.SO_PEERCRED)
		must(err)
		path, err := exec.LookPath("tailsplice")
		must(err)
		s, err := handover.Start(handover.Program{Path: path, Args: os.Args[1:], Sibling: true, Stderr: p.Output(),
			Lines: func([]byte) {}})
		must(err)
		must(s.SendSockets(p.All(), p.State(), p.Flows(), p.More()...))
		_, err = s.Await(context.Background(), handover.Ready, time.Minute)
		must(err)
		must(p.Ready())
		var flows []handover.Socket
		for _, k := range p.All() {
			if handover.IsOfFlows(k) {
				flows = append(flows, k)
			}
		}
		must(s.Send(handover.Message{Step: handover.Yours, Sockets: flows}))
		_, err = s.Await(context.Background(), handover.Serving, time.Minute)
		must(err)
		must(unix.Kill(int(old.Pid), unix.SIGKILL))
	},
	"fake-flows-none":    func() { fakeNewest(false); fakeDone(); time.Sleep(time.Hour) },
	"fake-flows-exits":   func() { fakeNewest(true); fakeDone() },
	"fake-flows-reads":   func() { fakeNewest(true).read(); fakeDone() },
	"fake-flows-hangs":   func() { fakeNewest(true).read(); fakeDone(); time.Sleep(time.Hour) },
	"fake-flows-garbage": func() { fakeNewest(true).say("garbage"); fakeDone(); time.Sleep(time.Hour) },
	"fake-flows-refuses": func() {
		l := fakeNewest(true)
		l.say(`{"version":1,"step":"refused","reason":"no","numbers":[%d]}`, l.read())
		l.read() // it is asked again
		fakeDone()
		time.Sleep(time.Hour)
	},
	"fake-flows-begins": func() {
		l := fakeNewest(true)
		l.say(`{"version":1,"step":"taken","numbers":[%d]}`, l.read())
		l.read()
		fakeDone()
	},
}

// fakeLink is the end of a connection by which flows come.
type fakeLink struct{ f *os.File }

// fakeNewest takes over, and listens to what the old process says, until flows are to come.
func fakeNewest(takesFlows bool) (l fakeLink) {
	p := fakeSuccessor()
	must(p.Ready())
	must(p.Serve())
	must(p.Send(handover.Message{Step: handover.Newest, PID: os.Getpid(), TakesFlows: takesFlows}))
	for takesFlows {
		m, err := p.Receive(time.Time{})
		must(err)
		if m.Step == handover.Flows {
			return fakeLink{m.Sockets[0].File}
		}
	}
	return l
}

// read reads a message, and returns the number of its first flow; the descriptors are closed.
func (l fakeLink) read() (number uint64) {
	b := make([]byte, 1<<20)
	n, err := l.f.Read(b)
	must(err)
	m := struct{ Flows []struct{ Number uint64 } }{}
	must(json.Unmarshal(b[:n], &m))
	if len(m.Flows) > 0 {
		number = m.Flows[0].Number
	}
	return number
}

func (l fakeLink) say(text string, args ...any) {
	_, err := fmt.Fprintf(l.f, text, args...)
	must(err)
}

// fakeDone tells the test that this process has come as far as it goes, by a file beside its configuration.
func fakeDone() {
	i := slices.Index(os.Args, "--config")
	must(os.WriteFile(filepath.Join(filepath.Dir(os.Args[i+1]), "done"), nil, 0o600))
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
		{"exits when it serves", []string{"--binary", path("fake-serving-exits")}, "", "exit status 6"},
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

// TestUpgradeAtOnce: a drain timeout of 0 leaves live flows the time to go over.
func TestUpgradeAtOnce(t *testing.T) {
	d := startUpgradable(t)
	f, err := net.Dial("tcp", d.edge)
	check(t, err)
	defer f.Close()
	check(t, echo(f))
	if out, err := d.ask("upgrade", "--drain-timeout", "0s"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wait(t, "the older process is empty", func() error {
		if s := d.status(); len(s.Older) > 0 {
			return fmt.Errorf("status has %+v", s.Older)
		}
		return nil
	})
	check(t, echo(f))
}

// TestUpgradeDeadline: what an older process can't hand over is cut when its --drain-timeout is over, and not sooner.
// The log says how many that were, the process is gone, and the flow that had gone over lives on.
func TestUpgradeDeadline(t *testing.T) {
	t.Parallel() // it waits for leastDrain
	d := startUpgradable(t)
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		check(t, http.NewResponseController(w).Flush())
		<-r.Context().Done()
	}))
	t.Cleanup(endless.Close)
	requests := freeaddr.Of(t, "127.0.0.77")
	text, err := os.ReadFile(d.config)
	check(t, err)
	check(t, os.WriteFile(d.config, []byte(strings.Replace(string(text), "listeners:\n", fmt.Sprintf(`listeners:
  - { listen: [%q], mode: http, default: { forward: %q } }
`, requests, endless.Listener.Addr()), 1)), 0o600))
	// The first process stays for the others, so it is the second that has to go.
	_, err = d.ask("upgrade")
	check(t, err)
	second := d.newest()
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	res, err := client.Get("http://" + requests)
	check(t, err)
	defer res.Body.Close()
	moved, err := net.Dial("tcp", d.edge)
	check(t, err)
	defer moved.Close()
	check(t, echo(moved))

	_, err = d.ask("upgrade", "--drain-timeout", "1s") // which is less than leastDrain
	check(t, err)
	after := time.Now()
	var remains handover.Remains
	wait(t, "only the request is left", func() error {
		older := d.status().Older
		if len(older) != 1 || older[0].PID != second || older[0].Connections != 1 || older[0].Flows != 1 {
			return fmt.Errorf("status has %+v, want process %d", older, second)
		}
		remains = older[0]
		return nil
	})
	if most := after.Add(leastDrain); remains.Deadline.After(most) {
		t.Errorf("it may go on until %v, want %v at most", remains.Deadline, most)
	}
	check(t, echo(moved))
	_, err = io.ReadAll(res.Body)
	if late := time.Since(remains.Deadline); err == nil || late < 0 || late > 5*time.Second {
		t.Errorf("the request ends %v after the deadline: %v", late, err)
	}
	wait(t, "the process is gone", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", second)); err == nil {
			return errors.New("it is there")
		}
		if s := d.status(); len(s.Older) > 0 {
			return fmt.Errorf("status has %+v", s.Older)
		}
		return nil
	})
	log, err := os.ReadFile(filepath.Join(d.dir, "log"))
	check(t, err)
	if want := "connections cut before their end: 1"; !strings.Contains(string(log), want) {
		t.Errorf("the log does not say %q", want)
	}
	check(t, echo(moved))
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

// sick is a web server whose health checks fail, and which counts the other requests that it gets; well is one that
// works.
func sick(t *testing.T) (address, well string, n *atomic.Int64) {
	t.Helper()
	n = new(atomic.Int64)
	bad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			n.Add(1)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	good := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	t.Cleanup(bad.Close)
	t.Cleanup(good.Close)
	return bad.Listener.Addr().String(), good.Listener.Addr().String(), n
}

// sickListener is one that has both as targets.
func sickListener(address, bad, good string) string {
	return fmt.Sprintf(`  - { listen: [%q], mode: http, default: { forward: [ { to: %q, weight: 1000 }, { to: %q, backup: true } ], health: { check: http, path: /healthz, every: 1s } } }`,
		address, bad, good)
}

// strangers make requests, all of which have to be answered well.
func strangers(t *testing.T, address string) {
	t.Helper()
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	for range 50 {
		res, err := client.Get("http://" + address)
		check(t, err)
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(body) != "hello" {
			t.Fatalf("a stranger gets %s, %q, %v", res.Status, body, err)
		}
	}
}

// TestUpgradeHealth: a process that takes over, and the one after it, send nobody to a target that was found down.
func TestUpgradeHealth(t *testing.T) {
	bad, good, n := sick(t)
	address := freeaddr.Get(t)
	d := startVerbs(t, sickListener(address, bad, good))
	wait(t, "it is down", func() error {
		if !strings.Contains(d.logged(), "a target is down") {
			return errors.New("it is up")
		}
		return nil
	})
	n.Store(0)
	for range 2 {
		d.says(true, "has taken over", "upgrade")
		strangers(t, address)
	}
	if n.Load() > 0 {
		t.Errorf("it has got %d requests", n.Load())
	}
	if times := strings.Count(d.logged(), "a target is down"); times != 1 {
		t.Errorf("it was found down %d times", times)
	}
}
