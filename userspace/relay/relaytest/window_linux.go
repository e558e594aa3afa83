package relaytest

import (
	"net"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// windowRefused reports whether one side of the connection that c is an end of waits for a window that the
// other one, who has read all there is, has opened. Linux lets two ends come to that where memory is short:
// the last segments that a socket gets are dropped for want of it, but their sequence number is remembered,
// and no window update with a lower one is believed until they have come again. If this befalls both sides,
// or nobody reads from one of them, that is never.
func windowRefused(c *net.TCPConn) bool {
	var own *unix.TCPInfo
	unread := 0
	if err := onSocket(c, func(fd int) (err error) {
		if own, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			unread, err = unix.IoctlGetInt(fd, unix.SIOCINQ)
		}
		return err
	}); err != nil {
		return false
	}
	other := socketAt(c.RemoteAddr(), c.LocalAddr())
	return other != nil && other.TCPInfo != nil &&
		(other.TCPInfo.Snd_wnd == 0 && other.InetDiagMsg.WQueue > 0 && unread == 0 ||
			own.Snd_wnd == 0 && own.Notsent_bytes > 0 && other.InetDiagMsg.RQueue == 0)
}

// socketAt is the socket of this network with those addresses, or nil.
func socketAt(here, there net.Addr) *netlink.InetDiagTCPInfoResp {
	h, t := here.(*net.TCPAddr), there.(*net.TCPAddr)
	family := uint8(syscall.AF_INET6)
	if h.IP.To4() != nil {
		family = syscall.AF_INET
	}
	all, err := netlink.SocketDiagTCPInfo(family)
	if err != nil {
		return nil
	}
	for _, s := range all {
		id := s.InetDiagMsg.ID
		if int(id.SourcePort) == h.Port && int(id.DestinationPort) == t.Port && id.Source.Equal(h.IP) {
			return s
		}
	}
	return nil
}
