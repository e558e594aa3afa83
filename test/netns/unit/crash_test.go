package unit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const crashConfig = `
listeners:
  - { name: web, listen: [":9100"], mode: tcp, default: { forward: "127.0.0.1:7000" } }
  - { name: moves, listen: [":9101"], mode: tcp, default: { forward: "127.0.0.1:7000" } }
  - { name: drained, listen: [":9103"], mode: tcp, default: { forward: "127.0.0.1:7001" } }
  - { name: plain, listen: [":9104"], mode: tcp, default: { forward: "127.0.0.1:7000", datapath: userspace } }
limits: { connections_per_source: 10000 }
control: { metrics: "127.0.0.1:9464", health: "127.0.0.1:9465" }
`

// TestCrash: while 150 connections a second come, the daemon is killed, upgraded, stopped by a signal, restarted and
// reloaded, and none is refused. Flows that last go on after each crash, or are reset where they talk. What an operator
// has said holds after a crash, and a configuration that was changed before one.
func TestCrash(t *testing.T) {
	typesAll(t)
	c := startCrash(t)
	m := c.machine
	stop := c.load(t)
	flows := c.lasts(t)

	flows.areKept(t)
	c.kills(t, "KILL")
	flows.goOn(t)
	m.run(t, "tailsplice", "drain", "drained")
	m.run(t, "tailsplice", "target", "disable", "127.0.0.1:7001")
	flows.areKept(t)
	c.kills(t, "KILL")
	flows.goOn(t)
	c.orders(t)
	t.Log(m.run(t, "tailsplice", "upgrade"))
	c.changes(t, "upgrade")
	c.orders(t)
	flows.areKept(t)
	c.kills(t, "KILL") // the process that had taken over
	flows.goOn(t)
	c.orders(t)
	m.run(t, "systemctl", "reload", service)

	m.write(t, "etc/tailsplice/tailsplice.yaml", strings.Replace(crashConfig, ":9101", ":9102", 1))
	flows.areKept(t)
	c.kills(t, "SEGV")
	flows.goOn(t)
	if err := c.exchange(t.Context(), 9102); err != nil {
		t.Errorf("an address that is new since the crash: %v", err)
	}
	if err := c.exchange(t.Context(), 9101); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("an address that the configuration has no more: %v, want a refusal", err)
	}
	c.orders(t)
	m.run(t, "tailsplice", "undrain", "drained")
	if err := c.exchange(t.Context(), 9103); errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a listener that is drained no more: %v", err)
	}
	m.run(t, "tailsplice", "drain", "drained")
	if err := c.exchange(t.Context(), 9103); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a listener that is drained again: %v, want a refusal", err)
	}

	flows.areKept(t)
	c.kills(t, "STOP")
	flows.goOn(t)
	flows.close()
	if n := c.says(t, "Watchdog timeout"); n != 1 {
		t.Errorf("systemd says %d times that the watchdog had it killed", n)
	}
	c.orders(t)

	c.restarts(t)
	if err := c.exchange(t.Context(), 9103); errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a drained listener after a restart: %v", err)
	}
	stop()
	if n := c.says(t, "has left its sockets"); n != 6 {
		t.Errorf("the daemon says %d times that it found sockets, want 5 crashes and a restart", n)
	}
	if n := c.says(t, "has left its flows"); n != 5 {
		t.Errorf("the daemon says %d times that it found flows, want 5 crashes", n)
	}
	if out := m.shell(t, "/", block(t, "journalctl")); !strings.Contains(out, "has left its sockets") {
		t.Errorf("the journal does not say what was found:\n%s", out)
	}
	for _, wrong := range []string{"is not used", "is kept: connections may be refused", "not all flows are kept", "Got notification message from PID"} {
		if n := c.says(t, wrong); n > 0 {
			t.Errorf("the journal says %q:\n%s", wrong, m.run(t, "journalctl", "--no-pager", "--grep="+wrong))
		}
	}
	c.stops(t)
}

// crash is a daemon to which it is done.
type crash struct {
	*machine
	world *lab.World
	pid   string // of the daemon, until now
}

// startCrash starts one, with an echo server as its target.
func startCrash(t *testing.T) *crash {
	t.Helper()
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "make", "nsenter", "pgrep")
	w := lab.Start(t, options)
	m := boot(t, w.EdgeA)
	m.write(t, "etc/tailsplice/tailsplice.yaml", crashConfig)
	// A busy machine may keep the daemon waiting for seconds.
	m.write(t, "etc/systemd/system/tailsplice.service.d/watchdog.conf", "[Service]\nWatchdogSec=15\n")
	target, err := w.EdgeA.Listen("tcp", "127.0.0.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	m.restart(t)
	c := &crash{machine: m, world: w}
	c.pid = c.main(t)
	return c
}

// exchange connects to a port, and has bytes echoed.
func (c *crash) exchange(ctx context.Context, port int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := c.world.Client.Dial(ctx, "tcp4", net.JoinHostPort(c.host.IP4.String(), fmt.Sprint(port)))
	if err != nil {
		return &notConnected{err}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 5))
	return err
}

type notConnected struct{ error }

func (e *notConnected) Unwrap() error { return e.error }

// load makes connections until it is told to stop. None may be refused, nor wait for ever. Those that a process has in
// its hands when it is killed are cut.
func (c *crash) load(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var made, cut atomic.Int64
	all.Go(func() {
		tick := time.NewTicker(time.Second / 150)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			all.Go(func() {
				made.Add(1)
				err := c.exchange(t.Context(), 9100)
				if _, failed := errors.AsType[*notConnected](err); failed {
					t.Errorf("connection %d: %v", made.Load(), err)
				} else if errors.Is(err, context.DeadlineExceeded) || err != nil && !isCut(err) {
					t.Errorf("connection %d is stuck: %v", made.Load(), err)
				} else if err != nil {
					cut.Add(1)
				}
			})
		}
	})
	return func() {
		cancel()
		all.Wait()
		t.Logf("%d connections, %d of them cut by a crash", made.Load(), cut.Load())
		if cut.Load() > made.Load()/4 {
			t.Error("they are too many")
		}
	}
}

func isCut(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func (c *crash) main(t *testing.T) string {
	return c.run(t, "systemctl", "show", "--value", "--property=MainPID", service)
}

// kills sends the daemon a signal, and waits for the next one.
func (c *crash) kills(t *testing.T, signal string) {
	t.Helper()
	c.run(t, "kill", "-"+signal, c.pid)
	c.changes(t, signal)
}

// changes waits until another process than before is the daemon, and answers.
func (c *crash) changes(t *testing.T, what string) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		pid := c.main(t)
		if pid != "0" && pid != c.pid && c.run(t, "systemctl", "show", "--value", "--property=ActiveState", service) == "active" {
			c.pid = pid
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after %s no other process is the daemon:\n%s", what, c.journal(t))
		}
	}
	if err := c.exchange(t.Context(), 9100); err != nil {
		t.Errorf("after %s: %v", what, err)
	}
	c.run(t, "tailsplice", "status")
}

// open makes a connection that lasts, and a function that has bytes echoed by it.
func (c *crash) open(t *testing.T) (conn net.Conn, echo func()) {
	t.Helper()
	conn, err := c.world.Client.Dial(t.Context(), "tcp4", net.JoinHostPort(c.host.IP4.String(), "9100"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	echo = func() {
		t.Helper()
		_, err := conn.Write([]byte("hello"))
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 5))
		}
		if err != nil {
			t.Errorf("a connection that was open: %v", err)
		}
	}
	echo()
	return conn, echo
}

// lasting are flows that last: half of them are idle, and half talk.
type lasting struct {
	*crash
	idle    []net.Conn
	talking []*talking
}

// talking is a flow of messages that are echoed.
type talking struct {
	net.Conn
	port  int
	moved atomic.Int64
	ended chan error
}

// lasts makes some of each kind, by auto and by userspace.
func (c *crash) lasts(t *testing.T) *lasting {
	l := &lasting{crash: c}
	for _, port := range []int{9100, 9104} {
		for range 10 {
			conn := l.dial(t, port)
			if err := numbered(conn, 1); err != nil {
				t.Fatal(err)
			}
			l.idle = append(l.idle, conn)
			l.talking = append(l.talking, l.talk(t, port))
		}
	}
	t.Cleanup(l.close)
	return l
}

func (l *lasting) dial(t *testing.T, port int) net.Conn {
	t.Helper()
	conn, err := l.world.Client.Dial(t.Context(), "tcp4", net.JoinHostPort(l.host.IP4.String(), fmt.Sprint(port)))
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(10 * time.Minute))
	return conn
}

// numbered has a number echoed.
func numbered(c net.Conn, n int64) error {
	text := fmt.Sprintf("%020d", n)
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("%q comes back of %q", b, text)
	}
	return nil
}

func (l *lasting) talk(t *testing.T, port int) *talking {
	f := &talking{Conn: l.dial(t, port), port: port, ended: make(chan error, 1)}
	go func() {
		for {
			if err := numbered(f.Conn, f.moved.Load()); err != nil {
				f.ended <- err
				return
			}
			f.moved.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return f
}

// areKept waits until the service manager has a queue of flows. Those that are a second old are in it soon.
func (l *lasting) areKept(t *testing.T) {
	t.Helper()
	const least = 3 + 3 + 1 + 2 // of listeners, but for a drained one; of control; what was said; of flows
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		n, err := strconv.Atoi(l.run(t, "systemctl", "show", "--value", "--property=NFileDescriptorStore", service))
		if err == nil && n >= least {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("systemd keeps %d descriptors (%v)", n, err)
		}
	}
	time.Sleep(5 * time.Second)
}

// goOn checks that all idle flows do after a crash, and that others do or are reset. New ones take the place of
// those; it says how many there are.
func (l *lasting) goOn(t *testing.T) (cut int) {
	t.Helper()
	for _, c := range l.idle {
		if err := numbered(c, 2); err != nil {
			t.Errorf("an idle flow: %v", err)
		}
	}
	for i, f := range l.talking {
		moved := f.moved.Load()
		for end := time.Now().Add(time.Minute); f.moved.Load() < moved+2; time.Sleep(time.Millisecond) {
			var err error
			select {
			case err = <-f.ended:
			default:
			}
			if err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("a flow that talks has ended, and not by a reset: %v", err)
			}
			if err != nil {
				cut++
				f.Close()
				l.talking[i] = l.talk(t, f.port)
				break
			}
			if time.Now().After(end) {
				t.Fatal("a flow that talks is stuck")
			}
		}
	}
	t.Logf("%d of %d flows that talk were reset", cut, len(l.talking))
	if cut > len(l.talking)/2 {
		t.Error("they are too many")
	}
	return cut
}

func (l *lasting) close() {
	for _, c := range l.idle {
		c.Close()
	}
	for _, f := range l.talking {
		f.Close()
	}
}

// becomes waits until the unit is in a state.
func (c *crash) becomes(t *testing.T, state string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		now := c.run(t, "systemctl", "show", "--value", "--property=ActiveState", service)
		if now == state {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the unit is %s, want %s\n%s", now, state, c.journal(t))
		}
	}
}

// restarts restarts the unit while a connection is open: another one that comes meanwhile waits for the next process.
func (c *crash) restarts(t *testing.T) {
	t.Helper()
	conn, echo := c.open(t)
	c.run(t, "systemctl", "restart", "--no-block", service)
	c.becomes(t, "deactivating")
	served := make(chan error, 1)
	go func() { served <- c.exchange(t.Context(), 9100) }()
	echo()
	conn.Close()
	if err := <-served; err != nil {
		t.Errorf("a connection that came during a restart: %v", err)
	}
	c.changes(t, "restart")
}

// stops stops the unit while a connection is open: that goes on, and no other is taken.
func (c *crash) stops(t *testing.T) {
	t.Helper()
	conn, echo := c.open(t)
	c.run(t, "systemctl", "stop", "--no-block", service)
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := c.exchange(t.Context(), 9100)
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the unit is being stopped: %v, want a refusal", err)
		}
	}
	c.becomes(t, "deactivating")
	echo()
	conn.Close()
	c.becomes(t, "inactive")
	if err := c.exchange(t.Context(), 9100); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the unit is stopped: %v, want a refusal", err)
	}
}

// says counts the lines of the journal that have a text.
func (c *crash) says(t *testing.T, text string) int {
	t.Helper()
	out, err := c.command(t.Context(), "journalctl", "--no-pager", "--output=cat", "--grep="+text).Output()
	if _, none := errors.AsType[*exec.ExitError](err); err != nil && !none {
		t.Fatal(err)
	}
	return strings.Count(string(out), "\n")
}

func (c *crash) journal(t *testing.T) string {
	return last(c.run(t, "journalctl", "--no-pager", "--output=cat", "--unit="+service, "--lines=400"), 20000)
}

// orders checks that what an operator has said still holds.
func (c *crash) orders(t *testing.T) {
	t.Helper()
	var status struct {
		Listeners []struct {
			Name    string
			Drained time.Time
		}
		Disabled []struct{ Target string }
	}
	if err := json.Unmarshal([]byte(c.run(t, "tailsplice", "status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	for _, l := range status.Listeners {
		if l.Drained.IsZero() != (l.Name != "drained") {
			t.Errorf("listener %s is drained since %v", l.Name, l.Drained)
		}
	}
	if d := status.Disabled; len(d) != 1 || d[0].Target != "127.0.0.1:7001" {
		t.Errorf("disabled are %v", d)
	}
	if err := c.exchange(t.Context(), 9103); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a drained listener: %v, want a refusal", err)
	}
}
