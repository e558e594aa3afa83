package sockmap

import (
	"errors"
	"net/netip"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// socket is a descriptor of a TCP socket, not blocking, closed by its flow.
type socket int

// local and remote are the socket's addresses, as [ADDRESS%ZONE]:PORT.
func (s socket) local() string  { return address(tcpsock.Local(int(s))) }
func (s socket) remote() string { return address(tcpsock.Remote(int(s))) }

func address(a netip.AddrPort) string {
	if !a.IsValid() {
		return "?"
	}
	return a.String()
}

// isMultipath reports whether the socket is one of another protocol than TCP itself.
func (s socket) isMultipath() bool {
	protocol, err := unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol != unix.IPPROTO_TCP
}

func (s socket) cookie() (uint64, error) { return tcpsock.Cookie(int(s)) }

func (s socket) info(i *unix.TCPInfo) error { return tcpsock.Info(int(s), i) }

// received is how many bytes the peer's TCP has given this socket, read or not, and one more for a FIN.
func (s socket) received() (uint64, error) {
	var i unix.TCPInfo
	err := s.info(&i)
	return i.Bytes_received, err
}

// unread is how many bytes wait in the receive queue. Exact only while the socket is in no sockmap.
func (s socket) unread() (uint64, error) {
	n, err := tcpsock.Unread(int(s))
	return uint64(n), err
}

// noMemory is a range of addresses that nobody may write to.
var noMemory = sync.OnceValue(func() []byte {
	b, _ := unix.Mmap(-1, 0, 64<<20, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	return b
})

// queued is how many bytes a read of TCP's queue would give. It is 0 where a sockmap has some before them.
func (s socket) queued() uint64 {
	b := noMemory() // TCP does not write to it for MSG_TRUNC; a sockmap, which does not know that, may not
	if b == nil {
		return 0
	}
	const flags = unix.MSG_PEEK | unix.MSG_TRUNC | unix.MSG_DONTWAIT
	n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(s), uintptr(unsafe.Pointer(unsafe.SliceData(b))),
		uintptr(len(b)), flags, 0, 0)
	if errno != 0 {
		return 0
	}
	return uint64(n)
}

// unacked is how many bytes the send queue holds.
func (s socket) unacked() (int, error) { return unix.IoctlGetInt(int(s), unix.SIOCOUTQ) }

// written is a lower bound of how many bytes this socket's TCP was given, and exact when nothing moves.
//
// It is what was acknowledged and then what the queue holds, in this order: what is acknowledged between the
// two calls is missing. bytes_sent - bytes_retrans + notsent would be one call, but counts a segment twice
// that a queueing discipline dropped at once (tcp_write_xmit sends it again as new), and the tail of a stream
// would be taken for written while it is not.
func (s socket) written() (uint64, error) {
	var i unix.TCPInfo
	if err := s.info(&i); err != nil {
		return 0, err
	}
	n, err := s.unacked()
	return i.Bytes_acked + uint64(int64(int32(n))), err
}

// readable reports whether a read would give bytes now. poll(2) says so already while they are on their way
// to the queue.
func (s socket) readable() bool {
	var b [1]byte
	n, _, err := unix.Recvfrom(int(s), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return n > 0 && err == nil
}

// writable reports whether there is room in the send buffer.
func (s socket) writable() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(s), Events: unix.POLLOUT}}, 0)
	return n > 0 || err != nil
}

// room is about how many bytes the send buffer takes now, 0 if that are few; then epoll tells when there is
// room (EPOLLOUT).
func (s socket) room() int {
	const sndbuf, queued = 3, 5 // SK_MEMINFO_SNDBUF, SK_MEMINFO_WMEM_QUEUED
	var i [9]uint32
	size := uint32(unsafe.Sizeof(i))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&i)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return chunk
	}
	free := int(i[sndbuf]) - int(i[queued])
	// As sk_stream_is_writeable has it. poll(2) makes the kernel tell.
	if free < int(i[queued])/2 && !s.writable() {
		return 0
	}
	return max(free-free/8, 4<<10) // the heads of what is sent take some
}

// widen makes room in the send buffer for n bytes more, whatever the limits say. The kernel does not change
// its size any more then.
func (s socket) widen(n int) {
	if size, err := unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil {
		// It takes twice as much, for its own needs.
		_ = unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size/2+n)
	}
}

// hold keeps the verdict from what comes, until kick, or until so much has come as a quarter of the receive
// buffer, or as the window may be. For more, the kernel would enlarge the buffer, past net.ipv4.tcp_rmem too
// (tcp_set_rcvlowat): where segments are small, much of the buffer is overhead, and little of it window.
func (s socket) hold() {
	size, err := unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return
	}
	clamp, err := unix.GetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP)
	if err != nil {
		return
	}
	_ = unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_RCVLOWAT, min(size/4, clamp))
}

// kick makes the kernel look at what is queued: the verdict runs for it. A plain read would leave EPOLLIN
// stuck.
func (s socket) kick() { _ = unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1) }

// attach makes the program decide what TCP gets to see of each segment.
func (s socket) attach(p *ebpf.Program) error {
	return unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_ATTACH_BPF, p.FD())
}

func (s socket) detach() { _ = unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) }

// fault is the error that broke the socket, or nil. It clears the error. A closed state alone is no fault: a
// socket whose both directions have ended is closed by its TIME_WAIT.
func (s socket) fault() error {
	n, err := unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

func (s socket) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(s), b)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func (s socket) write(b []byte) (int, error) {
	for {
		// MSG_NOSIGNAL: a broken pipe is an error like others.
		n, err := unix.SendmsgN(int(s), b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func (s socket) closeWrite() { _ = unix.Shutdown(int(s), unix.SHUT_WR) }

func (s socket) close() { _ = unix.Close(int(s)) }

// reset closes with a RST; what was not sent is lost.
func (s socket) reset() { _ = tcpsock.Reset(int(s)) }

func isAgain(err error) bool { return errors.Is(err, unix.EAGAIN) }

// isShortOfMemory reports whether err says that TCP has no memory for a write, of which it took nothing.
//
// What a socket in a sockmap has passed is charged to it though nothing was reserved for it
// (sk_psock_skb_ingress_self in net/core/skmsg.c): the socket may owe memory. If TCP has none to give, and
// the kernel may not change the size of the send buffer (see widen), tcp_wmem_schedule in net/ipv4/tcp.c
// makes the length of a write negative, and the copy of that fails with EFAULT. It can't be a bad address:
// what this package writes is its own memory.
func isShortOfMemory(err error) bool { return errors.Is(err, unix.EFAULT) }
