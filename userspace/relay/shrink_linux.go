package relay

import (
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// What a flow holds for a reader that stops is, for the most part, as much as its sockets had grown to
// before. It can't be taken back afterwards. So while memory is short the sockets of directions past their
// trial grow no more. The receive buffer does not become smaller, since the sender may send what it was
// offered, and what has no room is dropped, and comes again by a timer.
const (
	shrunkUnsent = 128 << 10     // bytes that a reader may be written beyond what TCP can send
	shrunkLeast  = 2 * 208 << 10 // bytes of a receive buffer, for far senders
)

// SaveSockets says whether memory is short: then buffers of sockets grow no more.
func (r *Relay) SaveSockets(isShort bool) {
	if isShort {
		r.holding.leastReceive.Store(int64(leastReceive()))
	}
	r.holding.saves.Store(isShort)
}

// leastReceive is shrunkLeast, or what this machine allows if that is less.
func leastReceive() int {
	least := shrunkLeast
	for name, times := range map[string]int{"core/rmem_max": 2, "ipv4/tcp_rmem": 1} {
		text, _ := os.ReadFile("/proc/sys/net/" + name)
		if f := strings.Fields(string(text)); len(f) > 0 {
			if n, err := strconv.Atoi(f[len(f)-1]); err == nil {
				least = min(least, times*n)
			}
		}
	}
	return least
}

// shrink has the receive buffer of s, and the send queue of dst, grow no more, or grow again. It is for the
// pump of s.
func (s *side) shrink(isShort bool, fd int, dst *side) {
	if isShort && !s.isTried {
		return
	}
	s.isShrunk = isShort
	unsent := 0 // what the sysctl says
	if isShort {
		unsent = shrunkUnsent
	}
	lockReceive(fd, isShort, int(s.flow.relay.holding.leastReceive.Load()))
	dst.control(func(fd int) { _ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent) })
}

// grow undoes shrink, for whoever has s next.
func (s *side) grow() {
	if s.isShrunk {
		s.control(func(fd int) { s.shrink(false, fd, s.other()) })
	}
}

// growTo makes a receive buffer as large as that, if it is smaller, and its window as large as fits.
func growTo(fd, bytes int) {
	if size, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || size >= bytes {
		return
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bytes/2) // the kernel doubles it
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, bytes/2)
}

// lockReceive makes the kernel leave the size of a socket's receive buffer as it is, or as it becomes with
// least bytes, or choose it. It needs Linux 5.14; before that nothing could undo it, and it does nothing.
func lockReceive(fd int, on bool, least int) {
	locks, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK)
	if err != nil {
		return
	}
	locks &^= unix.SOCK_RCVBUF_LOCK
	if on {
		growTo(fd, least)
		locks |= unix.SOCK_RCVBUF_LOCK
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK, locks)
}

// ungrown undoes what trials and shrink have left on the sockets of a flow whose process may have died.
func ungrown(down, up net.Conn) {
	for _, c := range [][2]net.Conn{{down, up}, {up, down}} {
		unsent := 0
		tcpsock.Control(c[0], func(fd int) {
			unsent, _ = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT)
		})
		if unsent == shrunkUnsent {
			tcpsock.Control(c[1], func(fd int) { lockReceive(fd, false, 0) })
		}
		unspare(c[0])
	}
}
