package tcpsock

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The states of a socket, as TCP_INFO and sock_diag tell them (include/net/tcp_states.h).
const (
	Established = 1  // TCP_ESTABLISHED: neither end has ended its stream
	Closed      = 7  // TCP_CLOSE
	Listening   = 10 // TCP_LISTEN

	finWait1, finWait2, timeWait, lastAck, closing = 4, 5, 6, 9, 11
)

// Info fills i with TCP_INFO, without an allocation. What this kernel doesn't know is 0. An error means that
// fd is no TCP socket, mostly.
func Info(fd int, i *unix.TCPInfo) error {
	size := uint32(unsafe.Sizeof(*i))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_INFO,
		uintptr(unsafe.Pointer(i)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// IsClosed reports whether TCP has given the connection up: by a reset, a timeout, or after both ends have
// ended their streams.
func IsClosed(fd int) bool {
	var i unix.TCPInfo
	return Info(fd, &i) == nil && i.State == Closed
}

// IsShut reports whether we have ended our stream. It is false where the connection has broken, with an error
// that nobody was told of yet.
func IsShut(fd int) bool {
	var i unix.TCPInfo
	ours := []uint8{finWait1, finWait2, timeWait, Closed, lastAck, closing}
	if Info(fd, &i) != nil || !slices.Contains(ours, i.State) {
		return false
	}
	p := []unix.PollFd{{Fd: int32(fd)}} // which does not take the error, as SO_ERROR does
	_, err := unix.Poll(p, 0)
	return i.State != Closed || err != nil || p[0].Revents&unix.POLLERR == 0
}

// IsEstablished reports whether neither end has ended its stream, and nothing else has. It is true where
// nobody knows: fd is no TCP socket.
func IsEstablished(fd int) bool {
	var i unix.TCPInfo
	return Info(fd, &i) != nil || i.State == Established
}

// RoundTrip is the kernel's estimate of the round trip time, or 0 for what is not TCP. Right after the
// handshake it is the handshake's.
func RoundTrip(fd int) time.Duration {
	var i unix.TCPInfo
	if Info(fd, &i) != nil {
		return 0
	}
	return time.Duration(i.Rtt) * time.Microsecond
}

// IsUnheard reports whether something that was sent is not acknowledged, and the other end has acknowledged
// nothing for d.
func IsUnheard(fd int, d time.Duration) bool {
	var i unix.TCPInfo
	return Info(fd, &i) == nil && i.Unacked > 0 && time.Duration(i.Last_ack_recv)*time.Millisecond >= d
}

// Refuses reports whether the other end has no room for what is written: it has said so, and again when it
// was asked. While it has room, or says nothing, it is TCP or the network that holds things up.
func Refuses(i *unix.TCPInfo) bool {
	if i.Unacked > 0 { // they are on their way, or the window was closed behind them
		return i.Snd_wnd == 0 && i.Last_ack_recv < uint32(ResetGrace.Milliseconds())
	}
	return i.Snd_wnd < i.Snd_mss && i.Backoff > 0 && i.Probes == 0
}

// Unread is how many bytes can be read from fd now: SIOCINQ of tcp(7). With an error it is 0.
func Unread(fd int) (bytes int, err error) { return unix.IoctlGetInt(fd, unix.SIOCINQ) }

// Unacked is how many bytes were written to fd that its other end has not acknowledged: SIOCOUTQ of tcp(7).
// After a reset it stays what it was. With an error it is 0.
func Unacked(fd int) (bytes int, err error) { return unix.IoctlGetInt(fd, unix.SIOCOUTQ) }

// Cookie is fd's SO_COOKIE: no other socket has it for as long as the machine runs.
func Cookie(fd int) (uint64, error) {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	return cookie, os.NewSyscallError("getsockopt", err)
}

// Local is the address of fd's own end, Remote the address of its peer; the zero AddrPort where there is
// none. What IPv4 is, is written so, whatever the socket's family.
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

// SetOptions sets [KeepAlive], TCP_NODELAY, as Go does for connections of its own, and [KeepUrgent]. What a
// listening socket accepts inherits all of them (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child).
func SetOptions(fd int) (err error) {
	for _, o := range [][3]int{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(KeepAlive.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(KeepAlive.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, KeepAlive.Count},
	} {
		if e := unix.SetsockoptInt(fd, o[0], o[1], o[2]); e != nil {
			err = errors.Join(err, os.NewSyscallError("setsockopt", e))
		}
	}
	return err
}

// KeepUrgent leaves urgent bytes of fd in their place in the stream, as RFC 6093 asks. Without it a reader
// loses more than those: while an urgent byte is over 64 KiB ahead, Linux marks the byte before that distance
// as urgent (net/ipv4/tcp_output.c, tcp_transmit_skb), and the reader's kernel leaves that one out.
func KeepUrgent(fd int) { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) }

// Dup gives another descriptor of sock's socket, which is the caller's; with an error it is negative. It is
// none of 0 to 2, which a program that is started would take for its own.
func Dup(sock syscall.RawConn) (fd int, err error) {
	fd = -1
	if cerr := sock.Control(func(own uintptr) { fd, err = DupFD(int(own)) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// DupFD is [Dup] for a descriptor that nobody closes meanwhile.
func DupFD(fd int) (copied int, err error) {
	copied, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	return copied, os.NewSyscallError("fcntl", err)
}

// Reset closes fd with a reset; what was not sent is lost. It is sent now, whoever else has the socket.
func Reset(fd int) error {
	if Abort(fd) != nil {
		return errors.Join(ResetFDOnClose(fd), unix.Close(fd))
	}
	return unix.Close(fd)
}

// Abort ends the connection of fd with a reset; what was not sent, or not read, is lost. It doesn't matter
// who else has the socket: to close one with SO_LINGER sends no reset while there is another descriptor, in
// any process, or on its way to one. A unix socket, which knows no resets, has both its streams ended.
func Abort(fd int) error {
	// A connection to nowhere: __inet_stream_connect in net/ipv4/af_inet.c calls tcp_disconnect for it, which
	// is what closes a socket with SO_LINGER, too.
	none := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none))
	if errno == 0 {
		return nil
	}
	if family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_UNIX {
		return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_RDWR))
	}
	return os.NewSyscallError("connect", errno)
}

// ResetFDOnClose makes a socket send a reset when its last descriptor is closed.
func ResetFDOnClose(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
