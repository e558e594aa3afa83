package relaytest

import (
	"net"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// windowRefused reports whether one side of the connection that c is an end of waits for a window that the other one, who has
// read all there is, has opened. Linux lets two ends come to that where memory is short: the last segments that a socket gets are
// dropped for want of it, but their sequence number is remembered, and no window update with a lower one is believed until
// they have come again. If this befalls both sides, or nobody reads from one of them, that is never.
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
	here, there := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
	family := uint8(syscall.AF_INET6)
	if here.IP.To4() != nil {
		family = syscall.AF_INET
	}
	all, err := netlink.SocketDiagTCPInfo(family)
	if err != nil {
		return false
	}
	for _, s := range all {
		id := s.InetDiagMsg.ID
		if s.TCPInfo == nil || int(id.SourcePort) != there.Port || int(id.DestinationPort) != here.Port || !id.Source.Equal(there.IP) {
			continue
		}
		return s.TCPInfo.Snd_wnd == 0 && s.InetDiagMsg.WQueue > 0 && unread == 0 ||
			own.Snd_wnd == 0 && own.Notsent_bytes > 0 && s.InetDiagMsg.RQueue == 0
	}
	return false
}
