package front

import (
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keepFlowsAlive gives the connections that lc's listeners accept keepAlive, and TCP_NODELAY.
// On Linux they inherit it from the listening socket: five system calls less
// for each connection (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child).
func keepFlowsAlive(lc *net.ListenConfig) {
	lc.KeepAlive = -1 // Go need not set anything on each
	next := lc.Control
	lc.Control = func(network, address string, c syscall.RawConn) error {
		var err error
		set := func(fd uintptr, level, option, value int) {
			err = errors.Join(err, unix.SetsockoptInt(int(fd), level, option, value))
		}
		cerr := c.Control(func(fd uintptr) {
			set(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			set(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
			set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle/time.Second))
			set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval/time.Second))
			set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count)
		})
		if err := errors.Join(cerr, err); err != nil || next == nil {
			return err
		}
		return next(network, address, c)
	}
}
