package front

import (
	"net"
	"time"
)

// keepAlive notices a dead client of a silent flow after 5 min, as package
// dial does a dead upstream. Go's default asks four times a minute: too much
// for many idle flows, and for phones.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 30 * time.Second, Count: 8}
