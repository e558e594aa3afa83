package tcpsock

import (
	"slices"

	"golang.org/x/sys/unix"
)

const closeWait = 8

var (
	hasFIN  = []uint8{closeWait, lastAck, closing}
	sentFIN = []uint8{finWait1, finWait2, lastAck, closing}
)

// PositionOf is where fd's streams are at one moment. Of a socket that has no connection, or none any more,
// it is ENOTCONN. While fd is in a sockmap, Read may be too large by what is unread: some kernels (6.18.44
// for one) count there only what a verdict has left to the process.
//
// A FIN has a place in the sequence of bytes, and is counted there as soon as it has come or is to be sent.
// SIOCINQ leaves it out where bytes are unread before it, and where it was read nothing is unread: so it
// counts among the bytes received in either case (net/ipv4/tcp.c, tcp_inq).
func PositionOf(fd int) (Position, error) {
	for {
		var i, again unix.TCPInfo
		if err := Info(fd, &i); err != nil {
			return Position{}, err
		}
		unread, err := Unread(fd)
		if err != nil {
			return Position{}, err
		}
		unacked, err := Unacked(fd)
		if err != nil {
			return Position{}, err
		}
		if err := Info(fd, &again); err != nil {
			return Position{}, err
		}
		if i.Bytes_received != again.Bytes_received || i.Bytes_acked != again.Bytes_acked || i.State != again.State {
			continue // something came in between
		}
		p := Position{Read: i.Bytes_received - uint64(unread), Written: i.Bytes_acked + uint64(unacked),
			IsEnded: slices.Contains(hasFIN, i.State), IsShut: slices.Contains(sentFIN, i.State)}
		if i.State != Established && !p.IsEnded && !p.IsShut {
			return Position{}, unix.ENOTCONN
		}
		if p.IsEnded {
			p.Read--
		}
		if p.IsShut {
			p.Written--
		}
		return p, nil
	}
}
