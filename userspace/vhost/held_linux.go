package vhost

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// queued is how many bytes c's socket has received, and nobody has read. What it has not sent is of requests,
// which may be others': HTTP/2 has one connection for many.
func queued(c net.Conn) (bytes int64) {
	tcpsock.Control(c, func(fd int) {
		if n, err := unix.IoctlGetInt(fd, unix.SIOCINQ); err == nil {
			bytes = int64(n)
		}
	})
	return bytes
}
