package front

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loopback is the index of lo, in every network namespace.
const loopbackIndex = 1

// arrivedOn says by which interface the connection of a socket came. The kernel keeps that since Linux 2.6:
// see IP_PKTOPTIONS in ip_sockglue.c, and RFC 2292 section 6.
func arrivedOn(fd int, local netip.Addr) (index int, err error) {
	level, want, get, kind := unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, unix.IPV6_2292PKTOPTIONS, unix.IPV6_PKTINFO
	if local.Is4() {
		level, want, get, kind = unix.IPPROTO_IP, unix.IP_PKTINFO, unix.IP_PKTOPTIONS, unix.IP_PKTINFO
	}
	if err := unix.SetsockoptInt(fd, level, want, 1); err != nil {
		return 0, os.NewSyscallError("setsockopt", err)
	}
	defer unix.SetsockoptInt(fd, level, want, 0) // else each segment of IPv6 is copied for it
	var buf [256]byte
	n := uint32(len(buf))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(get), uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return 0, os.NewSyscallError("getsockopt", errno)
	}
	messages, err := unix.ParseSocketControlMessage(buf[:n])
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		switch {
		case int(m.Header.Level) != level || int(m.Header.Type) != kind:
		case local.Is4() && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return int(binary.NativeEndian.Uint32(m.Data)), nil
		case !local.Is4() && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return int(binary.NativeEndian.Uint32(m.Data[16:])), nil
		}
	}
	return 0, unix.ENOENT
}

// has says whether an interface has an address, and how it is called.
func has(index int, a netip.Addr) (name string, ok bool) {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return "", false
	}
	addrs, err := i.Addrs()
	if err != nil {
		return i.Name, false
	}
	for _, n := range addrs {
		if p, err := netip.ParsePrefix(n.String()); err == nil && p.Addr() == a {
			return i.Name, true
		}
	}
	return i.Name, false
}

// cameByTailnet says whether c came by the interface that has its local address, or from this host.
func cameByTailnet(c *net.TCPConn) (ok bool) {
	local := addrPort(c.LocalAddr()).Addr()
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		index, err := arrivedOn(int(fd), local)
		if err == nil && index != loopbackIndex {
			_, ok = has(index, local)
			return
		}
		ok = err == nil
	})
	return ok && err == nil
}
