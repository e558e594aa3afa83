package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestControlSocketGone: where the file of the control socket was removed, or another one is in its place, the
// daemon binds it again, and so does the process that takes over meanwhile. That of another daemon stays.
func TestControlSocketGone(t *testing.T) {
	d := startUpgradable(t)
	answers := func(what string) {
		t.Helper()
		wait(t, what, func() error { _, err := d.ask("status"); return err })
	}
	check(t, os.Remove(d.control))
	answers("removed")
	_, err := d.ask("reload")
	check(t, err)
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.control + ".stale", Net: "unix"})
	check(t, err)
	stale.SetUnlinkOnClose(false)
	check(t, stale.Close())
	check(t, os.Rename(d.control+".stale", d.control))
	answers("replaced by one that nobody answers")

	// Removed while an upgrade is under way.
	begun, slow := filepath.Join(d.dir, "begun"), filepath.Join(d.dir, "slow")
	check(t, os.WriteFile(slow, []byte("#!/bin/sh\n: >"+begun+"\nwhile [ -e "+begun+" ]; do sleep 0.02; done\nexec tailsplice \"$@\"\n"), 0o755))
	upgraded := make(chan error, 1)
	go func() {
		out, err := d.ask("upgrade", "--binary", slow)
		if err == nil && !strings.Contains(out, "has taken over") {
			t.Errorf("upgrade: %s", out)
		}
		upgraded <- err
	}()
	wait(t, "the upgrade has begun", func() error { _, err := os.Stat(begun); return err })
	check(t, os.Remove(d.control))
	check(t, os.Remove(begun))
	check(t, <-upgraded)
	answers("removed during an upgrade")

	// Another daemon's stays, also at the end of this one.
	there := filepath.Join(d.dir, "other.sock")
	other, err := net.ListenUnix("unix", &net.UnixAddr{Name: there, Net: "unix"})
	check(t, err)
	defer other.Close()
	check(t, os.Rename(there, d.control))
	check(t, other.SetDeadline(time.Now().Add(time.Minute)))
	c, err := other.Accept() // which asks whether somebody is there
	check(t, err)
	c.Close()
	check(t, d.cmd.Process.Signal(syscall.SIGTERM))
	check(t, d.cmd.Wait())
	if _, err := os.Stat(d.control); err != nil {
		t.Errorf("the socket of another daemon: %v", err)
	}
}
