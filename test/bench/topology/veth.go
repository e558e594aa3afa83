package topology

import (
	"fmt"
	"net/netip"
	"time"
)

// Delay is the far path's, each way: the round trip is 60 ms.
const Delay = 30 * time.Millisecond

// NewVeth makes
//
//	client ── veth ── proxy ── veth ── server
//	    └─── delay ───┘
//
// with a TUN relay as the delay. The proxy is the router of the two others, and so can also just forward.
func NewVeth() (_ *Topology, err error) {
	var closers []func()
	t := &Topology{
		Name:      "veth",
		Listen:    netip.MustParseAddr("10.231.1.1"),
		Target:    netip.MustParseAddrPort(fmt.Sprintf("10.231.2.2:%d", ServerPort)),
		Direct:    netip.MustParseAddrPort(fmt.Sprintf("10.231.2.2:%d", ServerPort)),
		Far:       netip.MustParseAddr("10.231.3.1"),
		FarDirect: netip.MustParseAddrPort(fmt.Sprintf("10.231.4.2:%d", ServerPort)),
		Note:      "the proxy host's kernel forwards packets as a router",
		Close: func() error {
			for _, f := range closers {
				f()
			}
			return nil
		},
	}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	var n [3]*namespace
	for i, name := range []string{"client", "proxy", "server"} {
		if n[i], err = newNamespace(name); err != nil {
			return nil, err
		}
		closers = append(closers, func() { close(n[i].jobs); command("ip", "netns", "del", n[i].name) })
		if err := tune(n[i]); err != nil {
			return nil, err
		}
	}
	client, proxy, server := n[0], n[1], n[2]
	t.Client, t.Proxy, t.Server = client, proxy, server
	if err := proxy.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return nil, err
	}
	delay, err := newCable(client, "far0", proxy, "far0", Delay)
	if err != nil {
		return nil, fmt.Errorf("far path: %w", err)
	}
	closers = append([]func(){delay.close}, closers...)
	for _, s := range []struct {
		on   *namespace
		args string
	}{
		{client, "link add eth0 type veth peer name down0 netns " + proxy.name},
		{server, "link add eth0 type veth peer name up0 netns " + proxy.name},
		{client, "addr add 10.231.1.2/24 dev eth0"},
		{proxy, "addr add 10.231.1.1/24 dev down0"},
		{proxy, "addr add 10.231.2.1/24 dev up0"},
		{server, "addr add 10.231.2.2/24 dev eth0"},
		{server, "addr add 10.231.4.2/32 dev eth0"}, // the server by the far path
		{client, "addr add 10.231.3.2/24 dev far0"},
		{proxy, "addr add 10.231.3.1/24 dev far0"},
		{client, "link set eth0 up"}, {client, "link set far0 up"},
		{proxy, "link set down0 up"}, {proxy, "link set up0 up"}, {proxy, "link set far0 up"},
		{server, "link set eth0 up"},
		{client, "route add 10.231.2.0/24 via 10.231.1.1"},
		{client, "route add 10.231.4.2/32 via 10.231.3.1"},
		{proxy, "route add 10.231.4.2/32 via 10.231.2.2"},
		{server, "route add default via 10.231.2.1"},
	} {
		if err := s.on.ip(s.args); err != nil {
			return nil, err
		}
	}
	t.SetLoss = func(p float64) error { return setLoss(client, "eth0", proxy, "down0", p) }
	return t, nil
}
