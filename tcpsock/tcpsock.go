// Package tcpsock knows TCP sockets: what the kernel tells of one, and what is set on one, by its descriptor.
//
// The loader and the parts of the daemon need the same of it, and neither may import the other. So it stands
// below both, in neither's folder, and imports nothing of ours. What it does is one system call or two: when
// to ask, and what follows from the answer, is its callers'.
//
// The kernel's side of this is Linux. Elsewhere a question has the answer that changes nothing.
//
//	tcpsock.go  the way from a connection to its descriptor
//	info.go     what TCP_INFO tells
//	address.go  the addresses of both ends, and the kernel's form of an address
//	options.go  what the socket of a flow has set
//	dup.go      another descriptor
//	reset.go    closing with a reset
package tcpsock

import (
	"net"
	"syscall"
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
