package tcpsock

import (
	"bytes"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Memory is how many bytes all TCP sockets of the machine hold, and from how many on the kernel saves memory:
// see tcp_mem in tcp(7). 0 is not known. proc is where procfs is mounted. Each CPU counts by the megabyte, so
// where there is little traffic used may be 0 for long.
//
// A network namespace other than the first one, such as a container's, does not show tcp_mem: there it is
// taken for what the kernel makes it at boot, a sixteenth of the memory.
func Memory(proc string) (used, pressure int64) {
	page := int64(os.Getpagesize())
	var space [1024]byte
	if stat, err := readFile(proc+"/net/sockstat", space[:]); err == nil {
		// TCP: inuse 30 orphan 0 tw 2 alloc 35 mem 5
		_, tcp, _ := bytes.Cut(stat, []byte("\nTCP: "))
		_, mem, _ := bytes.Cut(tcp, []byte(" mem "))
		used = number(bytes.Fields(mem), 0)
	}
	if limits, err := readFile(proc+"/sys/net/ipv4/tcp_mem", space[:]); err == nil {
		return used * page, number(bytes.Fields(limits), 1) * page
	}
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) != nil {
		return used * page, 0
	}
	return used * page, int64(i.Totalram) * int64(i.Unit) / 16
}

// IsShort reports whether the kernel saves TCP's memory now. It begins when more is held than Memory's
// pressure, and goes on until that is less than the first number of tcp_mem.
func IsShort(proc string) bool {
	all, _ := os.ReadFile(proc + "/net/protocols")
	for line := range bytes.Lines(all) {
		// protocol  size sockets  memory press maxhdr ...
		if f := bytes.Fields(line); len(f) > 4 && string(f[0]) == "TCP" {
			return string(f[4]) == "yes"
		}
	}
	return false
}

// number is the field i, or 0 where that is none.
func number(fields [][]byte, i int) int64 {
	if i >= len(fields) {
		return 0
	}
	n, _ := strconv.ParseInt(string(fields[i]), 10, 64)
	return max(n, 0)
}

// readFile is what the first read of a file of procfs gives, as far as there is space. os.ReadFile takes
// twice as many system calls.
func readFile(name string, space []byte) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, space)
	return space[:max(n, 0)], err
}
