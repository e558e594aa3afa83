package tcpsock

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// SetOptions sets [KeepAlive] and TCP_NODELAY, as Go does for connections of its own. What a listening socket
// accepts inherits both (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child).
func SetOptions(fd int) (err error) {
	for _, o := range [][3]int{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
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
