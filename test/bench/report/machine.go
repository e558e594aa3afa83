package report

import (
	"os"
	"runtime"
	"strconv"
	"strings"
)

// Machine is where the run ran.
type Machine struct {
	CPUs        int    `json:"cpus"`
	Model       string `json:"model"`
	MemoryBytes int64  `json:"memory_bytes"`
	Kernel      string `json:"kernel"`
	OS          string `json:"os"`
	Go          string `json:"go"`
}

func machine() Machine {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	kb, _ := strconv.ParseInt(strings.Fields(value("/proc/meminfo", "MemTotal", ":") + " 0")[0], 10, 64)
	return Machine{
		CPUs: runtime.NumCPU(), Model: value("/proc/cpuinfo", "model name", ":"), MemoryBytes: kb << 10,
		Kernel: strings.TrimSpace(string(kernel)), OS: strings.Trim(value("/etc/os-release", "PRETTY_NAME", "="), `"`),
		Go: runtime.Version(),
	}
}

// value is what follows a key in a file of lines.
func value(file, key, separator string) string {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, separator); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
