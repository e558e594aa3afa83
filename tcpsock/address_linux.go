package tcpsock

import (
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// Local is the address of fd's own end, Remote that of the other one; the zero AddrPort where there is none.
// What IPv4 is, is written so, whatever the socket's family.
func Local(fd int) netip.AddrPort {
	a, _ := unix.Getsockname(fd)
	return AddrPort(a)
}

// Remote: see [Local].
func Remote(fd int) netip.AddrPort {
	a, _ := unix.Getpeername(fd)
	return AddrPort(a)
}

// AddrPort is what a names, with an IPv4 address that is mapped into IPv6 taken out of it; the zero AddrPort
// for nil and for what is not IP.
func AddrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(a.Addr).Unmap()
		if a.ZoneId != 0 {
			zone := strconv.Itoa(int(a.ZoneId))
			if i, err := net.InterfaceByIndex(int(a.ZoneId)); err == nil {
				zone = i.Name
			}
			ip = ip.WithZone(zone)
		}
		return netip.AddrPortFrom(ip, uint16(a.Port))
	}
	return netip.AddrPort{}
}

// Sockaddr is a for a socket of a's family.
func Sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: zoneID(a.Addr().Zone())}
}

// zoneID is the number of an interface, 0 for none and for one that does not exist.
func zoneID(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	n, _ := strconv.ParseUint(zone, 10, 32)
	return uint32(n)
}
