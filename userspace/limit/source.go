package limit

import "net/netip"

// source is what connections are counted by: an address with the bits that do not count cleared. The zero
// source is the unknown one.
type source struct {
	addr netip.Addr
	bits uint8
}

// tailnet is where Tailscale gives each node an address of its own.
// https://tailscale.com/kb/1033/ip-and-dns-addresses
var tailnet = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0}), 48)

func sourceOf(a netip.Addr) source {
	a = a.Unmap().WithZone("")
	switch {
	case !a.IsValid():
		return source{}
	case a.Is4():
		return source{a, 32}
	case tailnet.Contains(a):
		return source{a, 128}
	}
	b := a.As16()
	clear(b[8:])
	return source{netip.AddrFrom16(b), 64}
}

func (s source) prefix() netip.Prefix {
	if s == (source{}) {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(s.addr, int(s.bits))
}

// PrefixOf is the source that an address belongs to, the zero Prefix for the zero Addr.
func PrefixOf(a netip.Addr) netip.Prefix { return sourceOf(a).prefix() }

// name prints a source as people do: a whole address without the number of its bits.
func name(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "an unknown source"
	case p.IsSingleIP():
		return p.Addr().String()
	}
	return p.String()
}
