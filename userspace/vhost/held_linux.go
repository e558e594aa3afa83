package vhost

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// queued is how many bytes c's socket has received and sent, and nobody has taken.
func queued(c net.Conn) (bytes int64) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		for _, request := range []uint{unix.SIOCINQ, unix.SIOCOUTQ} {
			if n, err := unix.IoctlGetInt(int(fd), request); err == nil {
				bytes += int64(n)
			}
		}
	})
	return bytes
}
