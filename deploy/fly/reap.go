package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// reap waits for children that have ended and that nobody here waits for: tailsplice starts who is to take
// over from it as a child of this process, which does not hear of one that fails. The others are waited for
// at once, so one that is found twice, a second apart, is of those. seen is what the last call has returned.
func reap(seen map[int]bool) (now map[int]bool) {
	now = map[int]bool{}
	for _, c := range children() {
		switch {
		case !c.hasEnded:
		case seen[c.pid]:
			syscall.Wait4(c.pid, nil, syscall.WNOHANG, nil)
		default:
			now[c.pid] = true
		}
	}
	return now
}

// endAll kills all children of a name, as systemd does with what is left of a service, and returns when they
// have ended, but after a second in any case.
func endAll(name string) {
	for until := time.Now().Add(time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		left := 0
		for _, c := range children() {
			if c.name == name && !c.hasEnded {
				syscall.Kill(c.pid, syscall.SIGKILL)
				left++
			}
		}
		if left == 0 {
			return
		}
	}
}

// child is a child of this process, which somebody may wait for.
type child struct {
	pid      int
	name     string
	hasEnded bool
}

func children() (all []child) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it is gone
		}
		head, tail, _ := strings.Cut(string(text), " (")
		end := strings.LastIndex(tail, ")")
		f := strings.Fields(tail[end+1:]) // behind the name: see proc_pid_stat(5)
		pid, err := strconv.Atoi(head)
		if err == nil && len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			all = append(all, child{pid, tail[:end], f[0] == "Z"})
		}
	}
	return all
}
