package proxyheader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/tailsplice/tailsplice/userspace/preface"
)

var (
	// ErrTimeout means that no header, or no whole one, came in time.
	ErrTimeout = errors.New("the PROXY header was not complete in time")

	// ErrEOF means that the peer closed or reset the connection before it sent anything.
	ErrEOF = errors.New("the connection ended before its first byte")

	// ErrIncomplete means that a stream may yet begin with a header, or does, and that it has not come whole.
	ErrIncomplete = errors.New("the PROXY header is not complete")
)

// InvalidError says that a stream begins like a PROXY header and then isn't one, or is too long.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string { return "invalid PROXY header: " + e.Err.Error() }

func (e *InvalidError) Unwrap() error { return e.Err }

// firstRead is the size of the first buffer, bytes. What follows a header, a TLS hello mostly, comes with it
// in one read.
const firstRead = 3 << 10

// Read reads the PROXY header from c, after head, which has been read from it before.
//
// When the stream has none, h is nil without an error, decided after as few bytes as that takes. maxBytes
// limits the header, as [MaxBytes] does in any case; timeout is for all of it, from now. 0 or less means no
// limit, for either.
//
// rest is what was read from c beyond the header, or everything when there is none or with an error: nothing
// is lost. It is to be handled before anything else from c; its spare capacity belongs to the caller. On
// success no read deadline is left on c, on failure it stays. c stays open in any case.
//
// A server name, ALPN or unique id that is none is ignored, as if its TLV weren't there; of several the first
// good one counts. Unknown TLVs are ignored. A checksum must be right.
//
// The error is an [*InvalidError] that says what is wrong, [ErrTimeout], [ErrEOF], one that wraps
// [io.ErrUnexpectedEOF] when c ended within the header, or what c.Read returned.
func Read(c net.Conn, head []byte, maxBytes int, timeout time.Duration) (h *Header, rest []byte, err error) {
	if timeout > 0 {
		if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return nil, nil, fmt.Errorf("set the deadline for the PROXY header: %w", err)
		}
	}
	buf := append(make([]byte, 0, max(firstRead, len(head))), head...)
	for ended := false; ; {
		h, n, err := Parse(buf, maxBytes)
		switch {
		case err == nil, ended:
			if timeout > 0 {
				if err := c.SetReadDeadline(time.Time{}); err != nil {
					return h, buf[n:], fmt.Errorf("clear the deadline of the PROXY header: %w", err)
				}
			}
			return h, buf[n:], nil
		case err != ErrIncomplete:
			return nil, buf, err
		}
		if len(buf) == cap(buf) {
			// an incomplete header is shorter than the limit
			buf = append(make([]byte, 0, limit(maxBytes)), buf...)
		}
		m, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+m]
		if m == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			if err := Ended(buf, err); err != nil {
				return nil, buf, err
			}
			ended = true
		}
	}
}

// Parse parses the PROXY header at the start of b, the first bytes of a stream, with the rules of [Read]. n
// is its length in bytes. When the stream has none, h is nil and n 0 without an error. The error is
// [ErrIncomplete], or an [*InvalidError].
func Parse(b []byte, maxBytes int) (h *Header, n int, err error) {
	switch sniff(b) {
	case isUnclear:
		return nil, 0, ErrIncomplete
	case isOther:
		return nil, 0, nil
	}
	n, err = length(b, limit(maxBytes))
	switch {
	case err != nil:
		return nil, 0, &InvalidError{err}
	case n == 0, len(b) < n:
		return nil, 0, ErrIncomplete
	}
	if h, err = parse(b[:n]); err != nil {
		return nil, 0, &InvalidError{err}
	}
	return h, n, nil
}

// limit is how long a header may be, bytes.
func limit(maxBytes int) int {
	if maxBytes > 0 {
		return min(maxBytes, MaxBytes)
	}
	return MaxBytes
}

// Ended says what it means that no more of a stream could be read than b, for which [Parse] says
// [ErrIncomplete], but only err. It is nil when b is a whole stream, without a header, and else the error of
// [Read].
func Ended(b []byte, err error) error {
	if err == io.EOF && len(b) > 0 && sniff(b) == isUnclear {
		// a short stream ends in what could have become a signature
		return nil
	}
	return preface.Error("PROXY header", len(b), err, ErrTimeout, ErrEOF)
}
