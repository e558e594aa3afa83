package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
)

// TestServeTailnet: health is shown on this node's tailnet addresses, which come late and change.
func TestServeTailnet(t *testing.T) {
	ts := startTailscaled(t)
	ts.stop()
	first, _, _ := net.SplitHostPort(freeAddrAt(t, "127.0.0.3"))
	_, port, _ := net.SplitHostPort(freeAddr(t))
	ts.self = []netip.Addr{netip.MustParseAddr(first)}
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]
control: { health: "tailnet:%s" }
`, freeAddr(t), port))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		d.ServeTailnet(ctx, port, func(ln net.Listener) {
			for {
				c, err := ln.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					c.Write([]byte("x"))
					c.Close()
				}
			}
		})
	}()
	answers := func(host string) func() bool {
		return func() bool {
			c, err := net.Dial("tcp", net.JoinHostPort(host, port))
			if err != nil {
				return false
			}
			defer c.Close()
			n, _ := c.Read(make([]byte, 1))
			return n == 1
		}
	}
	eventually(t, "it is a problem that tailscaled is not there", func() bool { return d.has(PartHealth, "tailnet:"+port, "tailscaled") })
	if r := d.Ready(); !r.Ready {
		t.Errorf("health that can't be shown makes nothing unready: %s", r)
	}
	ts.start()
	eventually(t, "it answers", answers(first))
	eventually(t, "the problem is over", func() bool { return len(d.Problems()) == 0 })
	const second = "127.0.0.4"
	ts.change(func() { ts.self = []netip.Addr{netip.MustParseAddr(second)} })
	eventually(t, "it answers at the new address", answers(second))
	eventually(t, "and no more at the old one", func() bool { return !answers(first)() })
	cancel()
	<-ended
	if answers(second)() {
		t.Error("it answers after its end")
	}
}
