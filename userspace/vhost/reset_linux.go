package vhost

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// wasReset reports whether TCP has given c up, whose stream we have not ended: then an end of stream that was read
// may be none, but the rest of a reset that a write was told of.
func wasReset(c net.Conn) bool {
	const tcpClose = 7 // TCP_CLOSE in include/net/tcp_states.h
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	closed := false
	_ = raw.Control(func(fd uintptr) {
		// The first byte of struct tcp_info is the state. A unix socket has none.
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		closed = err == nil && info.State == tcpClose
	})
	return closed
}

// cutsOff reports whether the reset that the first write was told of has cut off the other side's stream. If that
// had ended before, it is told EPIPE (tcp_reset in net/ipv4/tcp_input.c).
func cutsOff(err error) bool { return !errors.Is(err, unix.EPIPE) }
