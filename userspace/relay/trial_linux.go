package relay

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// A direction is on trial until its reader has acknowledged trialBytes. Many readers that stop do so before,
// and a flow is to hold little for them. What it would hold is, for the most part, in the receive buffer of
// the sender's socket. The kernel sizes that by what is read before the next packet comes, and one read of
// more than ten segments makes megabytes of it (tcp_rcv_space_adjust in net/ipv4/tcp_input.c). So a direction
// on trial is read in pieces of less, is not spliced, and lets others have their turn between two pieces.
const (
	// more than a reader acknowledges that takes a first answer and stops: its buffer, twice
	trialBytes  = 256 << 10
	trialRead   = 8 << 10  // bytes of a piece
	leastBulk   = 24 << 10 // bytes that come at once when the trial ends, and leave the loop
	trialAtOnce = 16 << 10 // bytes of a message that is read at once, since the last one was answered

	// What a reader on trial may have been written beyond what TCP could send, where TCP's memory is scarce.
	// What a direction with a reader that stops has read sizes the receive buffer of its sender.
	trialUnsent = 16 << 10
)

// SpareTCP says whether TCP's memory is scarce on this machine: then directions on trial take less of it, and
// leave the loop more often.
func (r *Relay) SpareTCP(isScarce bool) { r.holding.scarceTCP.Store(isScarce) }

// piece is the part of buf that the next read from s may fill, and isOnTrial whether that is less because s
// is on trial. dst is the other side's socket. It is for the pump of s, or for whoever has its loop.
func (s *side) piece(buf []byte, dst int) (part []byte, isOnTrial bool) {
	if s.isTried {
		return buf, false
	}
	if moved := s.moved().Load(); moved >= trialBytes {
		queued, err := unix.IoctlGetInt(dst, unix.TIOCOUTQ) // SIOCOUTQ: what the reader has not acknowledged
		if s.isTried = err != nil || moved-int64(queued) >= trialBytes; s.isTried {
			if s.isSpared {
				// what the sysctl says
				_ = unix.SetsockoptInt(dst, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 0)
			}
			return buf, false
		}
	}
	if !s.isSpared && s.flow.relay.holding.scarceTCP.Load() {
		s.isSpared = true
		_ = unix.SetsockoptInt(dst, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, trialUnsent)
	}
	return buf[:min(len(buf), trialRead)], true
}

// unspare is for the conn of a reader on trial whose flow leaves.
func unspare(c net.Conn) {
	tcpsock.Control(c, func(fd int) { _ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 0) })
}

// isAnswered reports whether what has come from s is a message, or the first piece of more, and the last one
// was answered. It is for whoever has the loop of s.
func (s *side) isAnswered() bool {
	answers := s.other().moved().Load()
	if s.pieces > 0 || answers == s.answers {
		return false
	}
	s.answers = answers
	return true
}

// restOfMessage is the room behind buf for what else has come from s, if the two are no more than is passed
// at once; else it has no length. In pieces a message would wake its reader twice, and to read so little at
// once makes no megabytes.
func (s *side) restOfMessage(buf []byte) []byte {
	n, err := tcpsock.Unread(s.socket.FD())
	if most := min(trialAtOnce, cap(buf)); err != nil || len(buf)+n > most {
		n = 0
	}
	return buf[len(buf) : len(buf)+n]
}
