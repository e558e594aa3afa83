package system

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Memory is bytes in use.
type Memory struct {
	// proportional set size of the system's processes, and their page tables and kernel stacks
	Process int64 `json:"process"`
	// the machine's unreclaimable slab, and its sockets' inodes and dentries: all kernel objects of a flow
	Slab int64 `json:"slab"`
	// what sockets hold in data, in the system's network namespace and all others
	TCP int64 `json:"tcp"`
	BPF int64 `json:"bpf"` // BPF maps that the system's processes hold
}

// All is the sum.
func (m Memory) All() int64 { return m.Process + m.Slab + m.TCP + m.BPF }

// Since is the difference between two readings.
func (m Memory) Since(before Memory) Memory {
	return Memory{m.Process - before.Process, m.Slab - before.Slab, m.TCP - before.TCP, m.BPF - before.BPF}
}

// Used is all memory that the kernel can't have back, for whatever it is: sockets, pipes, skbs that nobody is
// charged for; and what the system's processes hold. What other processes hold, which other people may have
// started meanwhile, is not in it.
func (s *System) Used() int64 {
	m := func(name string) int64 { return kb("/proc/meminfo", name) }
	used := m("MemTotal:") - m("MemFree:") - m("Buffers:") - m("Cached:") - m("SReclaimable:") - m("AnonPages:")
	for _, pid := range s.Tree() {
		used += kb(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss_Anon:")
	}
	return used
}

const dentrySize = 192 // bytes, of one on 64-bit machines; each socket has one

// ReadMemory reads what the system's processes and the whole kernel hold.
func (s *System) ReadMemory() (Memory, error) {
	var m Memory
	for _, pid := range s.Tree() {
		m.Process += kb(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
		status := fmt.Sprintf("/proc/%d/status", pid)
		m.Process += kb(status, "VmPTE:")
		// a count, not kB; 16 KiB of kernel stack each
		m.Process += (kb(status, "Threads:") >> 10) * (16 << 10)
		m.BPF += bpfMaps(pid)
	}
	m.Slab = kb("/proc/meminfo", "SUnreclaim:")
	slabs, err := os.ReadFile("/proc/slabinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(slabs)) {
		if col := strings.Fields(line); len(col) > 3 && col[0] == "sock_inode_cache" {
			n, _ := strconv.ParseInt(col[1], 10, 64)
			size, _ := strconv.ParseInt(col[3], 10, 64)
			m.Slab += n * (size + dentrySize)
		}
	}
	sockstat, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(sockstat)) {
		if col := strings.Fields(line); len(col) > 2 && col[0] == "TCP:" && col[len(col)-2] == "mem" {
			pages, _ := strconv.ParseInt(col[len(col)-1], 10, 64)
			m.TCP = pages * int64(os.Getpagesize())
		}
	}
	return m, nil
}

// kb reads a "Name: N kB" line, in bytes; 0 if there is none.
func kb(file, name string) int64 {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n << 10
		}
	}
	return 0
}

// bpfMaps is what the process's map descriptors say that they take.
func bpfMaps(pid int) (bytes int64) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir)
	for _, fd := range fds {
		if link, _ := os.Readlink(dir + "/" + fd.Name()); !strings.Contains(link, "bpf-map") {
			continue
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(line, "memlock:"); ok {
				n, _ := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
				bytes += n
			}
		}
	}
	return bytes
}
