package system

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// userHZ is the unit of times in /proc: always 100 on Linux's ABI.
const userHZ = 100

// CPU is processor time in seconds, since some fixed time.
type CPU struct {
	// Machine is all time that is not idle, softirq and interrupts included, as /proc/stat has it.
	Machine float64
	// Proxy is what the kernel charges to the system's processes. A kernel without IRQ time accounting, as
	// most are, also charges to a process what softirqs do while it runs: its own packets leave through such,
	// and on a busy machine some of its neighbours' arrive through them.
	Proxy float64
	// Kernel is what kernel threads took: ksoftirqd when softirqs get too much for the processes they
	// interrupt, and kworkers.
	Kernel float64
}

// Since is the time between two readings.
func (c CPU) Since(before CPU) CPU {
	return CPU{c.Machine - before.Machine, c.Proxy - before.Proxy, c.Kernel - before.Kernel}
}

// ReadCPU reads the machine's, the system's and the kernel threads' time.
func (s *System) ReadCPU() (CPU, error) {
	busy, err := machineBusy()
	if err != nil {
		return CPU{}, err
	}
	c := CPU{Machine: busy}
	tree := map[int]bool{}
	for _, pid := range s.roots() {
		tree[pid] = true
	}
	for _, p := range processes() {
		// parents come before children but for wrapped ids: twice is enough for our depth
		if p.ppid == 2 {
			c.Kernel += p.cpu
		}
		if tree[p.ppid] {
			tree[p.pid] = true
		}
		if tree[p.pid] {
			c.Proxy += p.cpu
		}
	}
	return c, nil
}

func machineBusy() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	col := strings.Fields(string(line))
	if len(col) < 9 || col[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	busy := 0.0
	for i, v := range col[1:9] { // user nice system idle iowait irq softirq steal
		if n, err := strconv.ParseFloat(v, 64); err == nil && i != 3 && i != 4 && i != 7 {
			busy += n
		}
	}
	return busy / userHZ, nil
}

type process struct {
	pid, ppid int
	cpu       float64 // seconds, of all its threads and of its children that ended
}

// processes are all of the machine, by id.
func processes() []process {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	var all []process
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if state, ppid, cpu := stat(pid); state != "" {
			all = append(all, process{pid, ppid, cpu})
		}
	}
	return all
}

// stat reads /proc/PID/stat; state is "" if there is no such process.
func stat(pid int) (state string, ppid int, cpu float64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0, 0
	}
	// The name in parentheses may have anything in it.
	col := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(col) < 15 {
		return "", 0, 0
	}
	ppid, _ = strconv.Atoi(col[1])
	for _, v := range col[11:15] { // utime stime cutime cstime
		n, _ := strconv.ParseFloat(v, 64)
		cpu += n
	}
	return col[0], ppid, cpu / userHZ
}

// Tree is the system's processes.
func (s *System) Tree() []int {
	pids, tree := s.roots(), map[int]bool{}
	for _, pid := range pids {
		tree[pid] = true
	}
	for grown := len(pids) > 0; grown; {
		grown = false
		for _, p := range processes() {
			if tree[p.ppid] && !tree[p.pid] {
				tree[p.pid], grown = true, true
				pids = append(pids, p.pid)
			}
		}
	}
	return pids
}

// RunTimes is for how long each thread has run on a processor, by its file in /proc: the system's, and those
// of the kernel's that may work for connections. It is exact to the microsecond where ReadCPU counts ticks of
// 10 ms.
type RunTimes map[string]time.Duration

// Since is for how long they have run since before. Threads that have ended meanwhile are missing.
func (r RunTimes) Since(before RunTimes) (d time.Duration) {
	for thread, ran := range r {
		d += ran - before[thread]
	}
	return d
}

// RunTimes reads them.
func (s *System) RunTimes() RunTimes {
	all, pids := RunTimes{}, s.Tree()
	for _, p := range processes() {
		if p.ppid == 2 && worksForConnections(p.pid) {
			pids = append(pids, p.pid)
		}
	}
	for _, pid := range pids {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		for _, t := range tasks {
			b, _ := os.ReadFile(t)
			ran, _, _ := strings.Cut(string(b), " ")
			if ns, err := strconv.ParseInt(ran, 10, 64); err == nil {
				all[t] = time.Duration(ns)
			}
		}
	}
	return all
}

// worksForConnections reports whether a thread of the kernel may. Others move and count memory, whoever runs.
func worksForConnections(pid int) bool {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	for _, one := range []string{"kworker/", "ksoftirqd/", "napi/"} {
		if bytes.HasPrefix(name, []byte(one)) {
			return true
		}
	}
	return false
}
