package memory

import (
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const least = 16 << 20 // bytes of a budget, however little there is

const (
	procfs   = "/proc"
	cgroupfs = "/sys/fs/cgroup"
)

// Available is how much this process may have at most, in bytes; 0: it is not known.
func Available() int64 { return available(procfs, cgroupfs) }

// BudgetOf is the budget for flows where the configuration says that it is limit bytes: 5/8 of what is
// available where that is 0. 0: there is none, since nothing is known.
func BudgetOf(limit int64) int64 {
	if limit > 0 {
		return limit
	}
	if n := Available(); n > 0 {
		return max(least, n/8*5)
	}
	return 0
}

// available is Available: what the machine has, or one of the cgroups that the process is in may have.
func available(proc, cgroups string) int64 {
	least := int64(0)
	lower := func(n int64) {
		if n > 0 && (least == 0 || n < least) {
			least = n
		}
	}
	lower(memTotal(proc))
	for dir, version := range cgroupsOf(proc, cgroups) {
		file := "memory.max"
		if version == 1 {
			file = "memory.limit_in_bytes"
		}
		if text, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64) // "max" is none
			lower(n)
		}
	}
	return least
}

// memTotal is what the machine has, in bytes; 0: it is not known.
func memTotal(proc string) int64 {
	info, _ := os.ReadFile(filepath.Join(proc, "meminfo"))
	var total int64
	_, _ = fmt.Sscanf(string(info), "MemTotal: %d kB", &total)
	return total << 10
}

// cgroupsOf are the folders of the cgroups that bound this process's memory, its own first, and their
// version. In a container the path may be that of the host, and only the root is there.
func cgroupsOf(proc, cgroups string) iter.Seq2[string, int] {
	return func(yield func(string, int) bool) {
		groups, _ := os.ReadFile(filepath.Join(proc, "self/cgroup"))
		for line := range strings.Lines(string(groups)) {
			parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(parts) != 3 {
				continue
			}
			root, version := cgroups, 2
			switch {
			case parts[1] == "memory":
				root, version = filepath.Join(cgroups, "memory"), 1
			case parts[0] != "0":
				continue
			}
			for path := filepath.Clean("/" + parts[2]); ; path = filepath.Dir(path) {
				if !yield(filepath.Join(root, path), version) {
					return
				}
				if path == "/" {
					break
				}
			}
		}
	}
}

// cgroupSockets is what the sockets of this process's cgroup hold, in bytes. ok is false where no cgroup says
// it: those of version 1 do not; the root, which alone has no limit, is charged for no socket; and with the
// kernel's option cgroup.memory=nosocket none is charged.
func cgroupSockets(proc, cgroups string) (bytes int64, ok bool) {
	for dir, version := range cgroupsOf(proc, cgroups) {
		if version == 1 {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
		if err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "memory.max")); err != nil {
			return 0, false
		}
		for line := range strings.Lines(string(text)) {
			if _, err := fmt.Sscanf(line, "sock %d", &bytes); err == nil {
				return bytes, bytes > 0
			}
		}
		return 0, false
	}
	return 0, false
}
