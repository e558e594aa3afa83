package proxyheader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

var (
	// ErrTimeout means that no header, or no whole one, came in time.
	ErrTimeout = errors.New("the PROXY header was not complete in time")

	// ErrEOF means that the peer closed or reset the connection before it sent anything.
	ErrEOF = errors.New("the connection ended before its first byte")
)

// InvalidError says that a stream begins like a PROXY header and then isn't one, or is too long.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string { return "invalid PROXY header: " + e.Err.Error() }

func (e *InvalidError) Unwrap() error { return e.Err }

// firstRead is the size of the first buffer, bytes. What follows a header, a TLS hello mostly, comes with it in one read.
const firstRead = 3 << 10

// Read reads the PROXY header from c.
//
// When the stream has none, h is nil without an error, decided after as few bytes as that takes. maxBytes limits the
// header, as [MaxBytes] does in any case; timeout is for all of it, from now. 0 or less means no limit, for either.
//
// rest is what was read from c beyond the header, or everything when there is none or with an error: nothing is lost.
// It is to be handled before anything else from c; its spare capacity belongs to the caller. On success no read
// deadline is left on c, on failure it stays. c stays open in any case.
//
// A server name, ALPN or unique id that is none is ignored, as if its TLV weren't there; of several the first good one
// counts. Unknown TLVs are ignored. A checksum must be right.
//
// The error is an [*InvalidError] that says what is wrong, [ErrTimeout], [ErrEOF], one that wraps [io.ErrUnexpectedEOF]
// when c ended within the header, or what c.Read returned.
func Read(c net.Conn, maxBytes int, timeout time.Duration) (h *Header, rest []byte, err error) {
	if timeout > 0 {
		if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return nil, nil, fmt.Errorf("set the deadline for the PROXY header: %w", err)
		}
	}
	limit := MaxBytes
	if maxBytes > 0 {
		limit = min(maxBytes, MaxBytes)
	}
	buf := make([]byte, 0, firstRead)
	for ended := false; ; {
		h, n, done, err := next(buf, limit)
		if err != nil {
			return nil, buf, &InvalidError{err}
		}
		if done || ended {
			if timeout > 0 {
				if err := c.SetReadDeadline(time.Time{}); err != nil {
					return h, buf[n:], fmt.Errorf("clear the deadline of the PROXY header: %w", err)
				}
			}
			return h, buf[n:], nil
		}
		if len(buf) == cap(buf) {
			bigger := make([]byte, len(buf), limit) // an incomplete header is shorter than the limit
			copy(bigger, buf)
			buf = bigger
		}
		m, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+m]
		if m == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			// A stream that ends in what could have become a signature is a short stream without a header.
			if err == io.EOF && len(buf) > 0 && Sniff(buf) == More {
				ended = true
				continue
			}
			return nil, buf, readError(len(buf), err)
		}
	}
}

// next looks at b, what came so far. When that is enough, done is set, and n is the length of the header.
func next(b []byte, limit int) (h *Header, n int, done bool, err error) {
	switch Sniff(b) {
	case More:
		return nil, 0, false, nil
	case No:
		return nil, 0, true, nil
	}
	n, err = length(b, limit)
	if err != nil || n == 0 || len(b) < n {
		return nil, 0, false, err
	}
	h, err = parse(b[:n])
	return h, n, err == nil, err
}

// readError says in our terms how a connection failed after n bytes.
func readError(n int, err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrTimeout
	case n == 0 && (err == io.EOF || errors.Is(err, syscall.ECONNRESET)):
		return ErrEOF
	case err == io.EOF:
		return fmt.Errorf("the connection ended after %d bytes of a PROXY header: %w", n, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read the PROXY header: %w", err)
}
