package front

import (
	"fmt"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

const (
	// A connection takes so many bytes of the kernel's while it does nothing, and so many in all, an upstream
	// one included: see docs/configuration.md.
	connectionKernel = 4 << 10
	connectionBytes  = 12 << 10

	leastMemory = 16 << 20 // bytes of a budget, however little there is
)

// memoryOf is the budget of cfg, in bytes: 5/8 of what this machine, or its cgroup, has where the
// configuration does not say it. 0: there is none, since nothing is known.
func memoryOf(cfg *config.Config) int64 {
	if cfg.Limits.Memory > 0 {
		return cfg.Limits.Memory
	}
	if n := machineMemory("/proc", "/sys/fs/cgroup"); n > 0 {
		return max(leastMemory, n/8*5)
	}
	return 0
}

// Memory is the budget in force, in bytes; 0: none.
func (f *Front) Memory() int64 { return f.memory.Load() }

// machineMemory is how much this process may have at most, in bytes: what the machine has, or one of the cgroups
// that it is in may have. 0: it is not known.
func machineMemory(proc, cgroups string) int64 {
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

// cgroupsOf are the folders of the cgroups that bound this process's memory, its own first, and their version. In a
// container the path may be that of the host, and only the root is there.
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

// cgroupSockets is what the sockets of this process's cgroup hold, in bytes. ok is false where no cgroup says it:
// those of version 1 do not; the root, which alone has no limit, is charged for no socket; and with the kernel's
// option cgroup.memory=nosocket none is charged.
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

// overMemory is the metric's word for what is refused, or ended, to save memory.
const overMemory = "memory"

// shared reports whether many clients may be behind in's: where a trusted hop does not say whom it speaks for, and
// where it comes from one that another listener trusts, or from a node of the tailnet, which strangers are not. What
// one of them holds must not be another's fault: then each connection counts for itself.
func (in *conn) shared() bool {
	if in.unknown != nil {
		return true
	}
	a := in.client.Addr()
	hop, _ := in.front.hops.Load().Contains(a, func(netip.Addr) (tailnet.Identity, error) { return tailnet.Identity{}, tailnet.ErrNotPeer })
	return hop || tailnet.Contains(a)
}

// hopsOf are all whom accept_proxy.from names.
func hopsOf(cfg *config.Config) *plan.Peers {
	var from []string
	for i := range cfg.Listeners {
		if a := cfg.Listeners[i].AcceptProxy; a != nil {
			from = append(from, a.From...)
		}
	}
	return plan.NewPeers(from)
}

// greedyError says that a source holds much of the memory, while that is short.
type greedyError struct{ source netip.Prefix }

func (e *greedyError) Error() string {
	return fmt.Sprintf("memory is short (limits.memory, net.ipv4.tcp_mem), and readers of %s that have stopped hold much of it", e.source)
}

// greedy is an error where source holds much of the memory while that is short.
func (f *Front) greedy(source netip.Addr) error {
	sources := f.greedySources.Load()
	if sources == nil || !source.IsValid() {
		return nil
	}
	p := limit.PrefixOf(source)
	if _, ok := (*sources)[p]; ok {
		return &greedyError{p}
	}
	return nil
}
