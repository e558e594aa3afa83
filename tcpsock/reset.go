package tcpsock

import "net"

// ResetConn closes c with a reset: its other end can't take that for the end of a stream, and what was not
// sent is lost. The socket is closed first, under c's layers, whose words of farewell (close_notify of TLS)
// would say that all is well. What has no TCP socket is closed.
func ResetConn(c net.Conn) {
	if sock := lingering(c); sock != nil {
		sock.SetLinger(0)
		sock.Close()
		if net.Conn(sock) == c {
			return
		}
	}
	c.Close()
}

// ResetOnClose makes c's socket send a reset when it is closed.
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
