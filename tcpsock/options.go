package tcpsock

import (
	"net"
	"time"
)

// KeepAlive is what each connection of a flow has, accepted or dialled: a dead peer of a silent flow is
// noticed after 5 minutes. It is that long so that a laptop may sleep or lose its network for a while. Go's
// default asks four times a minute: too much for many idle flows, and for phones.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 30 * time.Second, Count: 8}
