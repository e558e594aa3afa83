package relay_test

import (
	"net"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// plain hides what a connection is.
type plain struct{ net.Conn }

func (p plain) CloseWrite() error { return p.Conn.(interface{ CloseWrite() error }).CloseWrite() }

func TestCases(t *testing.T) {
	for _, p := range []struct {
		name string
		l    relaytest.Loopback
		size relaytest.Size
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize()},
		{"tcp6 to tcp4", relaytest.Loopback{Down: "tcp6"}, relaytest.SmallSize()},
		{"tcp to unix", relaytest.Loopback{Up: "unix"}, relaytest.SmallSize()},
		{"parked at once", relaytest.Loopback{Options: relay.WithParkAfter(relay.Options{}, time.Millisecond)}, relaytest.SmallSize()},
		{"small buffer", relaytest.Loopback{Options: relay.Options{Buffer: 4 << 10}}, relaytest.SmallSize()},
	} {
		t.Run(p.name, func(t *testing.T) { relaytest.Run(t, p.l.Path(t), p.size) })
	}
}
