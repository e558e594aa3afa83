//go:build !linux

package front

import "net"

// keepFlowsAlive gives the connections that lc's listeners accept keepAlive.
func keepFlowsAlive(lc *net.ListenConfig) { lc.KeepAliveConfig = keepAlive }
