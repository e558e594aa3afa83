package sni

import (
	"fmt"
	"io"
	"net"
	"time"

	"github.com/tailsplice/tailsplice/userspace/preface"
)

// firstRead is the size of the first buffer, bytes. The hello of a browser with a post-quantum key share fits
// (Chromium 156 sends 2.0 KB, a few hundred bytes more when it resumes a session), and an idle connection
// costs no more than this.
const firstRead = 3 << 10

// wireFactor says how many bytes of records a hello of one byte may take on average.
//
// Record headers are 5 bytes for as little as 1 byte of hello. If they counted in full, a legal hello of 16
// KiB in records of one byte (96 KiB) would fail under the default limit of 64 KiB; if they did not count at
// all, the limit would allow six times the memory that it names. Twice lets that hello pass and is still a
// bound.
const wireFactor = 2

// Read reads the ClientHello from c, after head, which has been read from it before, by a parser of PROXY
// headers, say. Read takes head over: its spare capacity is written to.
//
// maxBytes limits the ClientHello message; the records that carry it may take twice as much with their
// headers, which is also the most that Read reads and keeps in memory. timeout is for all of it together,
// from now, however the bytes trickle in; 0 or less means no limit.
//
// The bytes returned are head and all that was read from c, in success and in failure; at least Length bytes
// in success, more when the client sent more at once. They are to be passed on before anything else from c.
// On success no read deadline is left on c, on failure it stays. c stays open in any case.
//
// The error is [ErrNotTLS], [ErrTooLarge], [ErrTimeout], [ErrEOF], a [*RejectError], one that wraps
// [io.ErrUnexpectedEOF] when c ended within the hello, or what c.Read returned.
func Read(c net.Conn, head []byte, maxBytes int, timeout time.Duration) (Hello, []byte, error) {
	s := NewListener(maxBytes)
	// What was read already may be enough: no system call then.
	h, err := s.next(head)
	if err != ErrIncomplete {
		return h, head, err
	}
	if timeout > 0 {
		if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return Hello{}, head, fmt.Errorf("set the deadline for the TLS hello: %w", err)
		}
	}
	for err == ErrIncomplete {
		head = s.grow(head)
		n, rerr := c.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		if n == 0 {
			if rerr == nil {
				rerr = io.ErrNoProgress
			}
			return Hello{}, head, preface.Error("TLS hello", len(head), rerr, ErrTimeout, ErrEOF)
		}
		h, err = s.next(head)
	}
	if err == nil && timeout > 0 {
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return h, head, fmt.Errorf("clear the deadline of the TLS hello: %w", err)
		}
	}
	return h, head, err
}

// A Listener reads a hello from a stream that grows, for callers that wait for its bytes in another way than
// [Read].
type Listener struct{ scanner }

// NewListener makes a Listener with the limit of [Read].
func NewListener(maxBytes int) *Listener {
	return &Listener{scanner{maxMessage: maxBytes, maxWire: wireFactor * maxBytes}}
}

// Hear goes on with b, which is the whole stream so far, and may be kept: what it holds must not change. The
// error is that of [Parse], or [ErrTooLarge]; after any but [ErrIncomplete] there is nothing more to hear.
func (l *Listener) Hear(b []byte) (Hello, error) { return l.next(b) }

// grow makes room for at least one byte more. It doubles, so that all copies together are linear, and goes by
// what has come, not by what a record's header promises.
func (s *scanner) grow(head []byte) []byte {
	if len(head) < cap(head) {
		return head
	}
	// An incomplete hello is always shorter than maxWire, or it would be too large.
	size := min(max(firstRead, 2*len(head)), s.maxWire)
	return append(make([]byte, 0, size), head...)
}
