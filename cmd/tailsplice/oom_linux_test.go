package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestUpgradeWithoutMemory: a new process for which there is no memory is what the kernel kills, and not the daemon,
// though that one is larger.
func TestUpgradeWithoutMemory(t *testing.T) {
	needRoot(t)
	d := startUpgradable(t)
	c, err := net.Dial("tcp", d.edge)
	check(t, err)
	defer c.Close()
	check(t, echo(c))
	if out, err := d.ask("upgrade", "--binary", "/bin/true"); err == nil { // which takes memory, too
		t.Fatalf("upgrade: %s", out)
	}
	// What the daemon has counts for the kernel's choice, and not for the limit: it is the larger one.
	kills, lift := limitMemory(t, rss(t, d.cmd.Process.Pid)*9/10, d.cmd.Process.Pid)
	eats := filepath.Join(d.dir, "eats")
	check(t, os.WriteFile(eats, []byte("#!/bin/sh\nexec tail /dev/zero\n"), 0o755))
	out, err := d.ask("upgrade", "--binary", eats)
	if err == nil || !strings.Contains(out, "signal: killed") {
		t.Errorf("upgrade: %v: %s", err, out)
	}
	if kills() == 0 {
		t.Error("the kernel has killed nobody")
	}
	check(t, echo(c))
	check(t, d.newFlow())

	// One that serves is worth as much as any other.
	lift()
	was, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", d.cmd.Process.Pid))
	check(t, err)
	_, err = d.ask("upgrade")
	check(t, err)
	is, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", d.newest()))
	check(t, err)
	if string(is) != string(was) {
		t.Errorf("oom_score_adj of the new process is %s, want %s", is, was)
	}
}

// limitMemory has a process, and those that it starts, take no more memory than so many bytes from now on, until
// lift. kills is how many the kernel has killed for that.
func limitMemory(t *testing.T, bytes int, pid int) (kills func() int, lift func()) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(mounts)) {
		place, fs, _ := strings.Cut(strings.TrimSpace(line), " - ")
		root := strings.Fields(place)[4]
		enabled, _ := os.ReadFile(root + "/cgroup.subtree_control")
		names, none := []string{"memory.max", "memory.swap.max", "memory.events"}, "max"
		switch {
		case strings.HasPrefix(fs, "cgroup2 ") && strings.Contains(string(enabled), "memory"):
		case strings.HasPrefix(fs, "cgroup ") && strings.HasSuffix(fs, ",memory"):
			names, none = []string{"memory.limit_in_bytes", "memory.swappiness", "memory.oom_control"}, "-1"
		default:
			continue
		}
		dir := filepath.Join(root, fmt.Sprintf("tailsplice-test-%d", os.Getpid()))
		check(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() {
			wait(t, "the cgroup is left", func() error {
				all, _ := os.ReadFile(dir + "/cgroup.procs")
				for pid := range strings.Lines(string(all)) { // which end with the test
					_ = os.WriteFile(root+"/cgroup.procs", []byte(pid), 0)
				}
				return os.Remove(dir)
			})
		})
		check(t, os.WriteFile(filepath.Join(dir, names[0]), []byte(strconv.Itoa(bytes)), 0))
		_ = os.WriteFile(filepath.Join(dir, names[1]), []byte("0"), 0) // where there is swap
		check(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
		kills = func() (n int) {
			text, err := os.ReadFile(filepath.Join(dir, names[2]))
			check(t, err)
			for line := range strings.Lines(string(text)) {
				fmt.Sscanf(line, "oom_kill %d", &n)
			}
			return n
		}
		return kills, func() { check(t, os.WriteFile(filepath.Join(dir, names[0]), []byte(none), 0)) }
	}
	if os.Getenv("CI") != "" {
		t.Fatal("no cgroup can bound memory")
	}
	t.Skip("no cgroup can bound memory")
	return nil, nil
}

// rss is how much memory a process has, in bytes.
func rss(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	check(t, err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	check(t, err)
	return pages * os.Getpagesize()
}
