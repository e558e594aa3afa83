package tcpsock

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The states of a socket, as TCP_INFO and sock_diag tell them (include/net/tcp_states.h).
const (
	Established = 1  // TCP_ESTABLISHED: neither end has ended its stream
	Closed      = 7  // TCP_CLOSE
	Listening   = 10 // TCP_LISTEN
)

// Info fills i with TCP_INFO, without an allocation. What this kernel doesn't know is 0. An error means that
// fd is no TCP socket, mostly.
func Info(fd int, i *unix.TCPInfo) error {
	size := uint32(unsafe.Sizeof(*i))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_INFO,
		uintptr(unsafe.Pointer(i)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// IsClosed reports whether TCP has given the connection up: by a reset, a timeout, or after both ends have
// ended their streams.
func IsClosed(fd int) bool {
	var i unix.TCPInfo
	return Info(fd, &i) == nil && i.State == Closed
}

// IsEstablished reports whether neither end has ended its stream, and nothing else has. It is true where
// nobody knows: fd is no TCP socket.
func IsEstablished(fd int) bool {
	var i unix.TCPInfo
	return Info(fd, &i) != nil || i.State == Established
}

// RoundTrip is the kernel's estimate of the round trip time, or 0 for what is not TCP. Right after the
// handshake it is the handshake's.
func RoundTrip(fd int) time.Duration {
	var i unix.TCPInfo
	if Info(fd, &i) != nil {
		return 0
	}
	return time.Duration(i.Rtt) * time.Microsecond
}

// IsUnheard reports whether something that was sent is not acknowledged, and the other end has acknowledged
// nothing for d.
func IsUnheard(fd int, d time.Duration) bool {
	var i unix.TCPInfo
	return Info(fd, &i) == nil && i.Unacked > 0 && time.Duration(i.Last_ack_recv)*time.Millisecond >= d
}
