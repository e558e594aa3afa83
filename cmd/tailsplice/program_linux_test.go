package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReloadUpgrades: a reload is an upgrade where another program is by now at the daemon's path. Where that one
// can't take over, or there is none, the daemon goes on as it was.
func TestReloadUpgrades(t *testing.T) {
	built, err := exec.LookPath("tailsplice")
	check(t, err)
	path := filepath.Join(t.TempDir(), "tailsplice")
	install := func(from io.Reader) {
		t.Helper()
		f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY, 0o755)
		check(t, err)
		_, err = io.Copy(f, from)
		check(t, err)
		check(t, f.Close())
		check(t, os.Rename(path+".new", path))
	}
	same := func() {
		t.Helper()
		f, err := os.Open(built)
		check(t, err)
		defer f.Close()
		install(f)
	}
	same()
	others := os.Getenv("PATH")
	t.Setenv("PATH", filepath.Dir(path)+":"+others)
	d := startUpgradable(t)
	t.Setenv("PATH", others)
	c, err := net.Dial("tcp", d.edge)
	check(t, err)
	defer c.Close()
	check(t, echo(c))
	// A configuration that is in force has the listener of this round.
	round := 0
	change := func() {
		t.Helper()
		text, err := os.ReadFile(d.config)
		check(t, err)
		was := fmt.Sprintf("name: edge%d,", round)
		if round == 0 {
			was = "name: edge,"
		}
		round++
		check(t, os.WriteFile(d.config, []byte(strings.Replace(string(text), was, fmt.Sprintf("name: edge%d,", round), 1)), 0o600))
	}
	isInForce := func() bool {
		for _, l := range d.status().Listeners {
			if l.Name == fmt.Sprintf("edge%d", round) {
				return true
			}
		}
		return false
	}
	goesOn := func(serving int) {
		t.Helper()
		if pid := d.newest(); pid != serving {
			t.Errorf("process %d serves, want %d", pid, serving)
		}
		check(t, echo(c))
		check(t, d.newFlow())
	}
	first := d.cmd.Process.Pid

	change()
	out, err := d.ask("reload")
	check(t, err)
	if !isInForce() {
		t.Errorf("a reload: %s", out)
	}
	goesOn(first)

	change()
	install(strings.NewReader("#!/bin/sh\necho I will not >&2\nexit 3\n"))
	if out, err := d.ask("reload"); err == nil || !strings.Contains(out, "I will not") {
		t.Errorf("a reload with a program that does not start: %v: %s", err, out)
	}
	if isInForce() {
		t.Error("it has changed something")
	}
	goesOn(first)
	check(t, d.cmd.Process.Signal(syscall.SIGHUP))
	wait(t, "HUP reads the configuration", func() error {
		if !isInForce() {
			return fmt.Errorf("status has %+v", d.status().Listeners)
		}
		return nil
	})
	goesOn(first)

	change()
	check(t, os.Remove(path))
	if out, err := d.ask("reload"); err != nil || !isInForce() {
		t.Errorf("a reload with no program: %v: %s", err, out)
	}
	goesOn(first)

	change()
	same()
	out, err = d.ask("reload")
	check(t, err)
	if !strings.Contains(out, fmt.Sprintf("has taken over from %d", first)) || !isInForce() {
		t.Errorf("a reload with another program: %s", out)
	}
	wait(t, "the older process has nothing left", func() error {
		if s := d.status(); len(s.Older) > 0 {
			return fmt.Errorf("status has %+v", s.Older)
		}
		return nil
	})
	second := d.newest()
	change()
	_, err = d.ask("reload")
	check(t, err)
	if !isInForce() {
		t.Error("a reload of the new process changes nothing")
	}
	goesOn(second)
}
