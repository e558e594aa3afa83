package tcpsock

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

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
	if stat, err := os.ReadFile(filepath.Join(proc, "net/sockstat")); err == nil {
		// TCP: inuse 30 orphan 0 tw 2 alloc 35 mem 5
		_, tcp, _ := strings.Cut(string(stat), "\nTCP: ")
		_, mem, _ := strings.Cut(tcp, " mem ")
		_, _ = fmt.Sscan(mem, &used)
	}
	if limits, err := os.ReadFile(filepath.Join(proc, "sys/net/ipv4/tcp_mem")); err == nil {
		var low int64
		_, _ = fmt.Sscan(string(limits), &low, &pressure)
		return used * page, pressure * page
	}
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) != nil {
		return used * page, 0
	}
	return used * page, int64(i.Totalram) * int64(i.Unit) / 16
}
