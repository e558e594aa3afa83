package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// reap waits for children that have ended and that nobody here waits for: tailsplice starts who is to take over from
// it as a child of this process, which does not hear of one that fails. The others are waited for at once, so one
// that is found twice, a second apart, is of those. seen is what the last call has returned.
func reap(seen map[int]bool) (now map[int]bool) {
	now = map[int]bool{}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range all {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it is gone
		}
		head, tail, _ := strings.Cut(string(text), " (")
		f := strings.Fields(tail[strings.LastIndex(tail, ")")+1:]) // behind the name: see proc_pid_stat(5)
		pid, err := strconv.Atoi(head)
		if err != nil || len(f) < 2 || f[0] != "Z" || f[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		if seen[pid] {
			syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		} else {
			now[pid] = true
		}
	}
	return now
}
