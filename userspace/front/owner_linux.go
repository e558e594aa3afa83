package front

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// portOwner names the process that listens on the TCP port, as "nginx (pid
// 12)", or "" when it can't be told (no such socket, or not root).
func portOwner(port uint16) string {
	inodes := map[uint32]bool{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, _ := netlink.SocketDiagTCP(family)
		for _, s := range sockets {
			if s.State == tcpsock.Listening && s.ID.SourcePort == port && s.INode != 0 {
				inodes[s.INode] = true
			}
		}
	}
	if len(inodes) == 0 {
		return ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil {
			continue
		}
		var inode uint32
		if n, _ := fmt.Sscanf(to, "socket:[%d]", &inode); n != 1 || !inodes[inode] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
	}
	return ""
}
