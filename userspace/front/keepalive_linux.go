package front

import (
	"errors"
	"net"
	"syscall"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// keepFlowsAlive gives the connections that lc's listeners accept the options of a flow's socket. On Linux they inherit
// these from the listening socket: five system calls less for each connection.
func keepFlowsAlive(lc *net.ListenConfig) {
	lc.KeepAlive = -1 // Go need not set anything on each
	next := lc.Control
	lc.Control = func(network, address string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = tcpsock.SetOptions(int(fd)) })
		if err := errors.Join(cerr, err); err != nil || next == nil {
			return err
		}
		return next(network, address, c)
	}
}
