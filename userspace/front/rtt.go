package front

import (
	"net"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// Gone reports whether the peer has closed the connection or its side of it.
// Bytes that came before may still wait to be read.
func (in *stream) Gone() bool {
	gone := false
	open := tcpsock.Control(in.TCPConn, func(fd int) { gone = !tcpsock.IsEstablished(fd) })
	return gone || !open
}

// roundTrip is the kernel's estimate of c's round trip time, or 0 for what is
// not TCP.
func roundTrip(c net.Conn) (rtt time.Duration) {
	tcpsock.Control(c, func(fd int) { rtt = tcpsock.RoundTrip(fd) })
	return rtt
}

// unheard says whether something that c has sent is not acknowledged, and its
// other end has acknowledged nothing for d.
func unheard(c net.Conn, d time.Duration) (silent bool) {
	tcpsock.Control(c, func(fd int) { silent = tcpsock.IsUnheard(fd, d) })
	return silent
}
