package tcpsock

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// SetOptions sets [KeepAlive], TCP_NODELAY, as Go does for connections of its own, and [KeepUrgent]. What a
// listening socket accepts inherits all of them (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child).
func SetOptions(fd int) (err error) {
	for _, o := range [][3]int{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(KeepAlive.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(KeepAlive.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, KeepAlive.Count},
	} {
		if e := unix.SetsockoptInt(fd, o[0], o[1], o[2]); e != nil {
			err = errors.Join(err, os.NewSyscallError("setsockopt", e))
		}
	}
	return err
}

// KeepUrgent leaves urgent bytes of fd in their place in the stream, as RFC 6093 asks. Without it a reader loses
// more than those: while an urgent byte is over 64 KiB ahead, Linux marks the byte before that distance as urgent
// (net/ipv4/tcp_output.c, tcp_transmit_skb), and the reader's kernel leaves that one out.
func KeepUrgent(fd int) { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) }
