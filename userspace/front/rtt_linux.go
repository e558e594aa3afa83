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
	var rtt time.Duration
	withFD(c, func(fd int) { rtt = roundTripFD(fd) })
	return rtt
}

// unheard says whether something that c has sent is not acknowledged, and its
// other end has acknowledged nothing for d.
func unheard(c net.Conn, d time.Duration) bool {
	silent := false
	withFD(c, func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		silent = err == nil && info.Unacked > 0 && time.Duration(info.Last_ack_recv)*time.Millisecond >= d
	})
	return silent
}

// withFD calls f with c's socket, if it has one.
func withFD(c net.Conn, f func(fd int)) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

func roundTripFD(fd int) time.Duration {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return time.Duration(info.Rtt) * time.Microsecond
}
