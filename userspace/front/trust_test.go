package front

import (
	"net/netip"
	"testing"
)

// TestPeersZone: the address of a link-local client says by which interface it came, and is in the prefixes that it is in without.
func TestPeersZone(t *testing.T) {
	for _, c := range []struct {
		list, client string
		want         bool
	}{
		{"::/0", "fe80::1%eth0", true},
		{"fe80::/10", "fe80::1%2", true},
		{"fe80::1", "fe80::1%eth0", true},
		{"fe80::2", "fe80::1%eth0", false},
		{"fd00::/8", "fe80::1%eth0", false},
		{"0.0.0.0/0", "fe80::1%eth0", false},
	} {
		if ok, who := newPeers([]string{c.list}).check(t.Context(), netip.MustParseAddr(c.client), nil); ok != c.want {
			t.Errorf("%s in %s: %v (%s), want %v", c.client, c.list, ok, who, c.want)
		}
	}
}
