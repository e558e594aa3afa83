package front

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Gone reports whether the peer has closed the connection or its side of it.
// Bytes that came before may still wait to be read.
func (in *inbound) Gone() bool {
	raw, err := in.TCPConn.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		gone = err == nil && info.State != tcpEstablished
	})
	return gone || err != nil
}

// tcpEstablished is TCP_ESTABLISHED (linux/tcp_states.h).
const tcpEstablished = 1

// roundTrip is the kernel's estimate of c's round trip time, or 0 for what is
// not TCP. Right after the handshake it is the handshake's.
func roundTrip(c net.Conn) time.Duration {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0
	}
	var rtt time.Duration
	raw.Control(func(fd uintptr) { rtt = roundTripFD(int(fd)) })
	return rtt
}

func roundTripFD(fd int) time.Duration {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return time.Duration(info.Rtt) * time.Microsecond
}
