package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	_ "unsafe" // for go:linkname
)

//go:linkname atStep github.com/tailsplice/tailsplice/userspace/handover.atStep
var atStep func(when, what string)

// deathEnv names a file, and after a colon a step of an upgrade, as "old sends yours", at which a process
// kills itself when it has written its process id there.
const deathEnv = "TAILSPLICE_TEST_DEATH"

// mortal is the daemon, which may kill itself.
func mortal() {
	if file, death, ok := strings.Cut(os.Getenv(deathEnv), ":"); ok {
		who := "old "
		if os.Getenv("TAILSPLICE_HANDOVER") != "" {
			who = "new "
		}
		atStep = func(when, what string) {
			if who+when+" "+what == death {
				must(os.WriteFile(file, strconv.AppendInt(nil, int64(os.Getpid()), 10), 0o600))
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
	}
	main()
}

// TestUpgradeWalk: the old or the new process is killed at each step of an upgrade, with a service manager
// and without one. Who lives serves, or another one is started; only where there is no manager may nobody
// serve. No flow is stuck, and until the old process has handed over none of those is lost that are idle and
// that the other process or the manager can have.
func TestUpgradeWalk(t *testing.T) {
	for _, c := range []struct {
		who   string
		steps []string // in their order
		// From which one on the new process has what is bound, and when the manager has been told, flows may
		// be lost.
		bound, over string
	}{
		{"old", []string{
			"sends sockets", "has sent sockets", "has ready", "sends yours", "has sent yours", "has serving",
			"has newest", "sends MAINPID", "has sent MAINPID", "sends BARRIER", "has sent BARRIER", "sends main",
			"has sent main", "sends flow", "has sent flow", "has taken", "sends begin", "has sent begin",
		}, "has sent yours", "has sent main"},
		{"new", []string{
			"has sockets", "sends ready", "has sent ready", "has yours", "sends serving", "has sent serving",
			"sends newest", "has sent newest", "has main", "has flow", "sends taken", "has sent taken", "has begin",
		}, "has main", "has main"},
	} {
		for i, step := range c.steps {
			isBound, isOver := i >= slices.Index(c.steps, c.bound), i >= slices.Index(c.steps, c.over)
			death, isNew := c.who+" "+step, c.who == "new"
			t.Run(death+", managed", func(t *testing.T) { walk(t, death, true, true, !isOver) })
			if !strings.Contains(step, "MAINPID") && !strings.Contains(step, "BARRIER") {
				t.Run(death, func(t *testing.T) { walk(t, death, false, isNew != isBound, isNew && !isBound) })
			}
		}
	}
}

// walk has an upgrade at a step of which a process is killed. goesOn: connections are served then. live: all
// idle flows do.
func walk(t *testing.T, death string, isManaged, goesOn, live bool) {
	t.Parallel()
	m, address, control := newEcho(t)
	m.args = append(m.args, "--drain-timeout", "1s")
	file := filepath.Join(m.dir, "death")
	m.env = []string{deathEnv + "=" + file + ":" + death}
	m.isAbsent = !isManaged
	m.start()
	m.env = nil
	t.Cleanup(m.killAll)
	dial := func() net.Conn {
		t.Helper()
		var c net.Conn
		wait(t, "the daemon accepts", func() (err error) { c, err = net.Dial("tcp", address); return err })
		t.Cleanup(func() { c.Close() })
		check(t, echo(c))
		check(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
		return c
	}
	var idle []net.Conn
	for range 20 {
		idle = append(idle, dial())
	}
	var talking []*crashing
	for range 5 {
		talking = append(talking, talk(dial(), 100, false, time.Millisecond))
	}
	if isManaged {
		wait(t, "all flows are kept", func() error {
			if kept := m.flows(); len(kept) < 25 {
				return fmt.Errorf("%d are", len(kept))
			}
			return nil
		})
	}
	_ = exec.CommandContext(t.Context(), "tailsplice", "upgrade", "--control", control).Run()
	wait(t, "a process is killed", func() error {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if pid, err := strconv.Atoi(string(text)); err != nil || lives(pid) {
			return fmt.Errorf("process %q lives", text)
		}
		return nil
	})
	if isManaged {
		t.Cleanup(m.supervise())
		wait(t, "one process is left", func() error {
			if pids := m.processes(); len(pids) != 1 || !lives(m.mainProcess()) {
				return fmt.Errorf("%v live", pids)
			}
			return nil
		})
	}
	if goesOn {
		c := dial()
		c.Close()
	}
	lost := 0
	for _, c := range idle {
		check(t, c.SetDeadline(time.Now().Add(time.Minute)))
		if err := echo(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("an idle flow is stuck")
		} else if err != nil {
			lost++
		}
	}
	if live && lost > 0 {
		t.Errorf("%d idle flows are lost", lost)
	}
	cut := 0
	for _, f := range talking {
		moved := f.moved.Load()
		wait(t, "a flow that talks goes on, or is reset", func() error {
			select {
			case <-f.ended:
				if cut++; !errors.Is(f.err, syscall.ECONNRESET) && !errors.Is(f.err, syscall.EPIPE) &&
					!errors.Is(f.err, io.EOF) && !errors.Is(f.err, io.ErrUnexpectedEOF) {
					t.Errorf("a flow that talks has ended otherwise: %v", f.err)
				}
				return nil
			default:
			}
			if f.moved.Load() < moved+300 {
				return errors.New("it is stuck")
			}
			return nil
		})
	}
	t.Logf("of the idle flows %d are lost, and of those that talk %d", lost, cut)
}
