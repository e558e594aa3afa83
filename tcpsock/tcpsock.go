// Package tcpsock knows TCP sockets: what the kernel tells of one, and what is set on one, by its descriptor.
//
// The loader and the parts of the daemon need the same of it, and neither may import the other. So it stands
// below both, in neither's folder, and imports nothing of ours. What it does is one system call or two: when
// to ask, and what follows from the answer, is its callers'.
//
// The kernel's side of this is Linux. Elsewhere a question has the answer that changes nothing.
//
//	tcpsock.go   connections: their descriptors, their options, closing with a reset
//	fd.go        descriptors: what TCP_INFO and the queues tell, addresses, options, copies, resets
//	bare.go      a connection that is in no poller
//	position.go  where a connection's two streams are
//	memory.go    what all sockets of the machine hold, and may
//	diag.go      which sockets there are, what each holds, and their end
package tcpsock

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Control calls f with c's descriptor, which stays c's, and reports whether there is one: c has a socket that
// is not closed.
func Control(c net.Conn, f func(fd int)) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	return err == nil && raw.Control(func(fd uintptr) { f(int(fd)) }) == nil
}

// AddrPortOf is an address of TCP, with an IPv4 address that is mapped into IPv6 taken out of it; the zero
// AddrPort for any other.
func AddrPortOf(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// KeepAlive is what each connection of a flow has, accepted or dialled: a dead peer of a silent flow is
// noticed after 5 minutes. It is that long so that a laptop may sleep or lose its network for a while. Go's
// default asks four times a minute: too much for many idle flows, and for phones.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 30 * time.Second, Count: 8}

// How long the reader of bytes that came before a reset may stop, before it is reset as well. One that goes
// on reading gets all of them.
const (
	// ResetGrace is for a reader that has no room: see [Refuses].
	ResetGrace = 2 * time.Second
	// TCPGrace is for a reader that has room, and to which TCP brings nothing: it paces, or it retransmits to
	// a network that is silent. After a silence of 8 s it tries again within 13 s, or 15 s on a slow path.
	TCPGrace = 30 * time.Second
)

// IsReset reports whether err says that the other end, and not the network, has ended the connection.
func IsReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, syscall.ENOTCONN)
}

// ResetConn closes c with a reset: its other end can't take that for the end of a stream, and what was not
// sent is lost. The socket is closed first, under c's layers, whose words of farewell (close_notify of TLS)
// would say that all is well. A unix socket has both its streams ended. Where another process has a copy of
// the socket, or one is on its way, this is so at once too. What has no socket is closed.
func ResetConn(c net.Conn) {
	if u, ok := c.(*net.UnixConn); ok {
		Control(u, func(fd int) { _ = Abort(fd) })
	}
	if sock := lingering(c); sock != nil {
		sock.SetLinger(0)
		Control(sock, func(fd int) { _ = Abort(fd) })
		sock.Close()
		if net.Conn(sock) == c {
			return
		}
	}
	c.Close()
}

// ResetOnClose makes c's socket send a reset when its last descriptor is closed.
func ResetOnClose(c net.Conn) {
	if sock := lingering(c); sock != nil {
		sock.SetLinger(0)
	}
}

// lingerer is a [*net.TCPConn], or is used in its place.
type lingerer interface {
	net.Conn
	SetLinger(sec int) error
}

// lingering is the socket under c's layers, or nil.
func lingering(c net.Conn) lingerer {
	for {
		switch u := c.(type) {
		case lingerer:
			return u
		case interface{ NetConn() net.Conn }: // a [*tls.Conn], for one
			c = u.NetConn()
		default:
			return nil
		}
	}
}
