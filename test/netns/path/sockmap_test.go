package path

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const sockmapPort = 9100 // and the next one

// sockmapConfig is what an edge needs more to splice in the kernel, to addresses of home's on the tailnet.
func sockmapConfig(home *lab.Host) string {
	config := ""
	for i, ip := range []netip.Addr{home.Node.IP4, home.Node.IP6} {
		config += fmt.Sprintf("  - name: sockmap%d\n    listen: [\":%d\"]\n    mode: tcp\n"+
			"    default: { forward: %q, datapath: sockmap }\n",
			i, sockmapPort+i, netip.AddrPortFrom(ip, sockmapPort))
	}
	return config
}

// TestSockmap runs the table of cases through a daemon that splices in the kernel, from veth to the tailnet:
// IPv4, IPv6, and from the one to the other; then with 1 % of loss on all its ways, which makes retransmits,
// and segments out of order.
func TestSockmap(t *testing.T) {
	s := world(t)
	run := func(t *testing.T, client string, to int, size relaytest.Size, loses bool) {
		home := []netip.Addr{s.Home.Node.IP4, s.Home.Node.IP6}[to]
		ln, err := s.Home.Listen("tcp", netip.AddrPortFrom(home, sockmapPort).String())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		dial := func() (net.Conn, error) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			return s.Client.Dial(ctx, client, fmt.Sprintf("%s:%d", lab.Site, sockmapPort+to))
		}
		relaytest.Run(t, relaytest.Path{Dial: relaytest.Through(dial, ln, nil), Loses: loses,
			PIDs: []int{s.edgeA.Pid()}}, size)
		ended := map[any]int{}
		for _, l := range s.edgeA.LogLines() {
			if l["msg"] == "flow ended" && l["listener"] == fmt.Sprintf("sockmap%d", to) {
				ended[l["datapath"]]++
			}
		}
		// A flow that ends while it is being taken over stays in userspace.
		if ended["sockmap"] < 10*ended["userspace"] || ended["sockmap"] == 0 {
			t.Errorf("sockmap was not what was tested: flows ended by %v", ended)
		}
	}
	for _, client := range []string{"tcp4", "tcp6"} {
		for to, family := range []string{"tcp4", "tcp6"} {
			t.Run(client+" to "+family,
				func(t *testing.T) { run(t, client, to, relaytest.SmallSize(), false) })
		}
	}
	t.Run("loss", func(t *testing.T) {
		if err := s.EdgeA.Impair(lab.Impairment{Loss: 0.01}); err != nil {
			t.Fatal(err)
		}
		defer s.EdgeA.Impair(lab.Impairment{})
		size := relaytest.SmallSize()
		size.Big, size.Behind, size.Random = 1<<20, 1<<20, 2
		size.Short, size.Concurrent, size.Rounds = 20, 10, 50
		run(t, "tcp4", 0, size, true)
	})
}
