//go:build !linux

package front

import (
	"net"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// keepFlowsAlive gives the connections that lc's listeners accept the options of a flow's socket.
func keepFlowsAlive(lc *net.ListenConfig) { lc.KeepAliveConfig = tcpsock.KeepAlive }
