package unit

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/handover"
)

// TestMain is also the program that daemons of tests are upgraded to.
func TestMain(m *testing.M) {
	if os.Getenv("TAILSPLICE_HANDOVER") != "" {
		succeed(filepath.Base(os.Args[0]))
	}
	os.Exit(m.Run())
}

// The names of a program that takes over, and ends as soon as it serves, or when it is the main process.
const servingExits, mainExits = "serving-exits", "main-exits"

func succeed(name string) {
	p, err := handover.Inherit(func(error) {})
	if err == nil {
		err = p.Ready()
	}
	if err == nil {
		err = p.Serve()
	}
	if err == nil && name == mainExits {
		err = p.Send(handover.Message{Step: handover.Newest, PID: os.Getpid()})
	}
	for isMain := name == servingExits; err == nil && !isMain; {
		var m *handover.Message
		if m, err = p.Receive(time.Time{}); err == nil {
			isMain = m.Step == handover.Main
		}
	}
	os.Exit(6)
}

// TestUpgradeCrashes: a new process that ends as soon as it serves changes nothing: systemd knows of no other main
// process, connections are accepted, and all flows go on, also after a crash that comes next. One that ends as the main
// process is a crash like any other: the daemon is started again.
func TestUpgradeCrashes(t *testing.T) {
	c := startCrash(t)
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{servingExits, mainExits} {
		if err := os.WriteFile(filepath.Join(c.root, "etc", name), program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	upgrade := func(name string) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		out, err := c.command(ctx, "tailsplice", "upgrade", "--binary", "/etc/"+name).CombinedOutput()
		t.Logf("%s: %v: %s", name, err, out)
		return err
	}
	stop := c.load(t)
	flows := c.lasts(t)
	flows.areKept(t)
	for range 3 {
		if upgrade(servingExits) == nil {
			t.Error("the upgrade succeeds")
		}
		if pid := c.main(t); pid != c.pid {
			t.Fatalf("the main process is %s, was %s\n%s", pid, c.pid, c.journal(t))
		}
		if err := c.exchange(t.Context(), 9100); err != nil {
			t.Errorf("a new connection: %v", err)
		}
		if cut := flows.goOn(t); cut > 0 {
			t.Errorf("%d flows were reset", cut)
		}
	}
	c.kills(t, "KILL")
	flows.goOn(t)
	_ = upgrade(mainExits)
	c.changes(t, mainExits)
	stop()
	if n := c.says(t, "has left its flows"); n != 1 {
		t.Errorf("the daemon says %d times that it found flows, want one crash", n)
	}
	if n := c.says(t, "Got notification message from PID"); n > 0 {
		t.Errorf("systemd refuses %d messages", n)
	}
}
