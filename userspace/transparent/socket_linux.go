package transparent

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Fits says why a connection from here to `to` can't carry client's address (an *Error). p may be nil.
func (p *ReturnPath) Fits(client, to netip.Addr) error {
	client, to = client.Unmap(), to.Unmap()
	number := unix.AF_INET
	if to.Is6() {
		number = unix.AF_INET6
	}
	switch {
	case p == nil:
		return no(Unavailable, "answers to the client's address would not come back here: see the log of the start")
	case client.Is4() != to.Is4():
		return no(Family, "the client is %s and the target %s: one is IPv4, the other IPv6", client, to)
	case p.off[number] != nil:
		return no(Unavailable, "%v", p.off[number])
	case client.IsLoopback(), client.IsUnspecified(), client.IsLinkLocalUnicast(), client.IsMulticast(), client.Zone() != "":
		return no(ClientAddress, "the client's address %s means nothing to the target", client)
	case to.IsLoopback():
		return no(TargetHere, "the target %s is on this host", to)
	}
	there, err := p.nl.RouteGet(to.AsSlice())
	if err != nil || len(there) == 0 {
		return nil // connecting will say it better
	}
	if there[0].Type == unix.RTN_LOCAL {
		return no(TargetHere, "the target %s is an address of this host", to)
	}
	back, err := p.nl.RouteGet(client.AsSlice())
	if err != nil || len(back) == 0 || back[0].Type == unix.RTN_LOCAL {
		return nil // no way to the client but by ours, or this host is the client
	}
	if back[0].LinkIndex == there[0].LinkIndex {
		return no(SameNetwork, "%s and %s are both reached by %s: the answers would not pass here", client, to, p.linkName(back[0].LinkIndex))
	}
	return nil
}

func (p *ReturnPath) linkName(index int) string {
	if l, err := p.nl.LinkByIndex(index); err == nil {
		return l.Attrs().Name
	}
	return "the same interface"
}

// From makes d's connections carry client's address. Their targets must be ones that it Fits.
func From(d *net.Dialer, client netip.Addr) {
	client = client.Unmap()
	d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0))
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = prepare(int(fd), client.Is6()) }), err)
	}
}

// prepare readies a socket that is to be bound to an address which is not ours.
func prepare(fd int, v6 bool) error {
	transparent := [3]int{unix.SOL_IP, unix.IP_TRANSPARENT, 1}
	if v6 {
		transparent = [3]int{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1}
	}
	for _, o := range [][3]int{
		transparent,
		{unix.SOL_SOCKET, unix.SO_MARK, socketMark},
		// The port is chosen by connect, which knows the target: each target has all ports of each client.
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
	} {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}
