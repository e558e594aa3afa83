package wakelan

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"testing"
)

// TestPacket: six times 0xff, and sixteen times the address.
func TestPacket(t *testing.T) {
	mac, err := net.ParseMAC("02:00:5e:10:00:01")
	if err != nil {
		t.Fatal(err)
	}
	p := magicPacket(mac)
	if got := hex.EncodeToString(p[:18]); len(p) != 102 || got != "ffffffffffff02005e10000102005e100001" {
		t.Errorf("%d bytes: %s...", len(p), got)
	}
	if !bytes.Equal(p[96:], mac) {
		t.Errorf("the end is %x", p[96:])
	}
}

func TestNetworks(t *testing.T) {
	lan := network{netip.MustParsePrefix("192.168.7.130/25"), "eth0"}
	wide := network{netip.MustParsePrefix("10.1.2.3/13"), "eth1"}
	for n, want := range map[network]string{lan: "192.168.7.255", wide: "10.7.255.255"} {
		if got := n.broadcast(); got.String() != want {
			t.Errorf("%s: %s", n, got)
		}
	}
	for _, c := range []struct {
		at   string
		want []network
	}{
		{"192.168.7.200", []network{lan}},
		{"192.168.7.1", []network{lan, wide}}, // the other half
		{"10.7.0.1", []network{wide}},
		{"100.64.0.1", []network{lan, wide}},
		{"::1", []network{lan, wide}},
	} {
		got := towards([]network{lan, wide}, []netip.Addr{netip.MustParseAddr(c.at)})
		if len(got) != len(c.want) || got[0] != c.want[0] {
			t.Errorf("towards %s: %v", c.at, got)
		}
	}
}
