package vhost

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// queued is how many bytes c's socket has received, and nobody has read. What it has not sent is of requests,
// which may be others': HTTP/2 has one connection for many.
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
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ); err == nil {
			bytes = int64(n)
		}
	})
	return bytes
}
