package vhost

import (
	"net"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// queued is how many bytes c's socket has received, and nobody has read. What it has not sent is of requests,
// which may be others': HTTP/2 has one connection for many.
func queued(c net.Conn) (bytes int64) {
	tcpsock.Control(c, func(fd int) {
		n, _ := tcpsock.Unread(fd)
		bytes = int64(n)
	})
	return bytes
}
