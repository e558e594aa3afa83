package relay

import (
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// keepUrgent: see [tcpsock.KeepUrgent].
func (s *side) keepUrgent() {
	if s.sock != nil {
		s.sock.Control(func(fd uintptr) { tcpsock.KeepUrgent(int(fd)) })
	}
}

// gone reports whether TCP has given the connection up, although we haven't ended our stream: then an end of
// stream that was read is none, but the rest of a reset that somebody else has been told of.
func (s *side) gone() bool {
	closed := false
	if s.sock == nil || s.isShut.Load() {
		return false
	}
	s.sock.Control(func(fd uintptr) { closed = tcpsock.IsClosed(int(fd)) })
	return closed && !s.isShut.Load() // that may have come meanwhile
}

// unacked is the number of bytes written to s that its other end has not acknowledged, and still may.
func (s *side) unacked() int {
	n := 0
	if s.sock != nil {
		s.sock.Control(func(fd uintptr) {
			if !tcpsock.IsClosed(int(fd)) { // a reset leaves the number as it was
				n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
			}
		})
	}
	return n
}

// refuses reports whether the other end of s has no room for what is written: it has said so, and again when
// it was asked. While it has room, or says nothing, it is TCP or the network that holds things up.
func (s *side) refuses() bool {
	full := true
	if s.sock == nil {
		return full
	}
	s.sock.Control(func(fd uintptr) {
		var i unix.TCPInfo
		switch {
		case tcpsock.Info(int(fd), &i) != nil: // no TCP
		case i.Unacked > 0: // they are on their way, or the window was closed behind them
			full = i.Snd_wnd == 0 && i.Last_ack_recv < uint32(resetGrace.Milliseconds())
		default:
			full = i.Snd_wnd < i.Snd_mss && i.Backoff > 0 && i.Probes == 0
		}
	})
	return full
}

// takeError gives the error that TCP has for s, if any, which it tells once.
func (s *side) takeError() (err error) {
	if s.sock == nil {
		return nil
	}
	s.sock.Control(func(fd uintptr) { err = takeError(int(fd)) })
	return err
}

func takeError(fd int) error {
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}
