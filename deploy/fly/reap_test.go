package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestReap: a child that has ended and that nobody waits for is gone after it was found twice. One that lives, and
// one that somebody waits for, are left alone.
func TestReap(t *testing.T) {
	lives := exec.Command("sleep", "1000")
	if err := lives.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { lives.Process.Kill(); lives.Wait() }()
	nobodys := exec.Command("true")
	if err := nobodys.Start(); err != nil {
		t.Fatal(err)
	}
	pid := nobodys.Process.Pid
	state := func() string {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return ""
		}
		return strings.Fields(string(text))[2]
	}
	for end := time.Now().Add(time.Minute); state() != "Z"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the child does not end")
		}
	}
	seen := reap(nil)
	if !seen[pid] || seen[lives.Process.Pid] || state() != "Z" {
		t.Errorf("found at first: %v; the child is %q", seen, state())
	}
	if seen = reap(seen); len(seen) > 0 || state() != "" {
		t.Errorf("found after that: %v; the child is %q", seen, state())
	}
	if err := lives.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the child that lives: %v", err)
	}
}

// TestEndAll: all children of a name are ended, and no others.
func TestEndAll(t *testing.T) {
	script := filepath.Join(t.TempDir(), "some")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nread line\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var all [3]*exec.Cmd
	for i := range all {
		all[i] = exec.Command(script)
		if i == 0 {
			all[i] = exec.Command("sleep", "1000")
		}
		if _, err := all[i].StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := all[i].Start(); err != nil {
			t.Fatal(err)
		}
	}
	endAll("some")
	for _, c := range all[1:] {
		if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("a child of the name: %v", err)
		}
	}
	if err := all[0].Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("another child: %v", err)
	}
	all[0].Process.Kill()
	all[0].Wait()
}

// TestCrashes: tailsplice is started again each time that it has served, unless it crashes all the time, and a few
// times where it has not.
func TestCrashes(t *testing.T) {
	now := time.Unix(1e9, 0)
	for _, c := range []struct {
		name   string
		every  time.Duration
		served func(i int) bool
		most   int // how often it is started again; 0: for ever
	}{
		{"never served", 10 * time.Second, func(int) bool { return false }, mostFailed},
		{"served each time", crashesIn/mostCrashes + time.Second, func(int) bool { return true }, 0},
		{"served between", 10 * time.Second, func(i int) bool { return i%mostFailed == 0 }, 0},
		{"served, and crashes at once", time.Second, func(int) bool { return true }, mostCrashes},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all crashes
			for i := range 1000 {
				at := now.Add(time.Duration(i) * c.every)
				if all.tooOften(at, c.served(i)) {
					if i != c.most {
						t.Errorf("it is started again %d times, want %d", i, c.most)
					}
					return
				}
			}
			if c.most != 0 {
				t.Errorf("it is started again for ever, want %d times", c.most)
			}
		})
	}
}
