package relay

import (
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// keepUrgent: see [tcpsock.KeepUrgent].
func (s *side) keepUrgent() { s.control(tcpsock.KeepUrgent) }

// gone reports whether TCP has given the connection up, although we haven't ended our stream: then an end of
// stream that was read is none, but the rest of a reset that somebody else has been told of.
func (s *side) gone() (isGone bool) {
	if s.isShut.Load() {
		return false
	}
	s.control(func(fd int) { isGone = tcpsock.IsClosed(fd) })
	return isGone && !s.isShut.Load() // that may have come meanwhile
}

// unacked is the number of bytes written to s that its other end has not acknowledged, and still may.
func (s *side) unacked() (n int) {
	s.control(func(fd int) {
		if !tcpsock.IsClosed(fd) {
			n, _ = tcpsock.Unacked(fd)
		}
	})
	return n
}

// refuses reports whether the other end of s has no room, as [tcpsock.Refuses] does. It is true for what is
// no TCP socket.
func (s *side) refuses() (isFull bool) {
	isFull = true
	s.control(func(fd int) {
		var i unix.TCPInfo
		isFull = tcpsock.Info(fd, &i) != nil || tcpsock.Refuses(&i)
	})
	return isFull
}

// takeError gives the error that TCP has for s, if any, which it tells once.
func (s *side) takeError() (err error) {
	s.control(func(fd int) { err = takeError(fd) })
	return err
}

func takeError(fd int) error {
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}
