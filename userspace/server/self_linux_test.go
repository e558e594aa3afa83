package server

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cable"
)

// TestSelf: a target on this host that nobody listens for, and whose port is one that connections are made from, never gets a client
// its own bytes back. The log says why, and how to keep the port.
func TestSelf(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	hello := helloFor(t, "a.test")
	i := 0
	for _, mode := range []string{"tcp", "sni"} {
		for _, target := range []string{"127.0.0.1", "::1"} {
			i++
			port := uint16(40000 + 10*i)                                                    // a new one, since the long way leaves those that it tried in TIME_WAIT
			cable.Sysctl(t, "ipv4/ip_local_port_range", fmt.Sprintf("%d %d", port, port+1)) // of an even and an odd one, connect(2) takes the first
			at := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 39000 + i}
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: %q } } ]`,
				at.String(), mode, netip.AddrPortFrom(netip.MustParseAddr(target), port)))
			c, err := net.DialTCP("tcp", &net.TCPAddr{IP: at.IP, Port: 39100 + i}, &at) // not from the range, which is for the target
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(hello)
			c.SetReadDeadline(time.Now().Add(60 * time.Second))
			if got, err := io.ReadAll(c); len(got) > 7 || mode == "sni" && len(got) != 7 { // a TLS alert
				t.Errorf("%s to %s: the client gets %d bytes, %v", mode, target, len(got), err)
			}
			eventually(t, "the log says it", func() bool {
				return strings.Contains(d.log.String(), "connected to itself") && strings.Contains(d.log.String(), "ip_local_reserved_ports")
			})
		}
	}
}
