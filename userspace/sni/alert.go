package sni

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"
)

// Alert descriptions of RFC 8446 section 6 that a router of hellos has a use for.
const (
	AlertUnexpectedMessage = 10
	AlertRecordOverflow    = 22
	AlertIllegalParameter  = 47
	AlertAccessDenied      = 49
	AlertDecodeError       = 50
	AlertProtocolVersion   = 70
	AlertInternalError     = 80
	AlertUnrecognizedName  = 112
)

var alertNames = map[uint8]string{
	AlertUnexpectedMessage: "unexpected_message",
	AlertRecordOverflow:    "record_overflow",
	AlertIllegalParameter:  "illegal_parameter",
	AlertAccessDenied:      "access_denied",
	AlertDecodeError:       "decode_error",
	AlertProtocolVersion:   "protocol_version",
	AlertInternalError:     "internal_error",
	AlertUnrecognizedName:  "unrecognized_name",
}

const (
	// an alert fits into any send buffer: it blocks only when the peer reads nothing
	alertWriteTimeout = time.Second
	drainTimeout      = 500 * time.Millisecond // a client answers an alert within its round trip
	// early data and what else is under way when the client learns of the alert
	drainBytes = 64 << 10
)

// alertName returns the name in RFC 8446 section 6, as clients print it.
func alertName(desc uint8) string { return cmp.Or(alertNames[desc], strconv.Itoa(int(desc))) }

// AlertFor returns the alert that a client should get for an error of [Parse] or [Read]; ok is false when it
// should get none, because it does not speak TLS, is gone, or did not finish its hello in time.
func AlertFor(err error) (desc uint8, ok bool) {
	switch r, ok := errors.AsType[*RejectError](err); {
	case ok:
		return r.Alert, true
	case errors.Is(err, ErrTooLarge):
		// TLS has no alert for a limit of one's own; crypto/tls also sends this one.
		return AlertInternalError, true
	}
	return 0, false
}

// Alert returns a record with a fatal alert, to be sent in answer to a ClientHello.
//
// Its record version is TLS 1.0, whatever the client offered: no version has been agreed on, clients of every
// version take 3.1 from a server that has not yet chosen, and crypto/tls and BoringSSL send the same.
func Alert(desc uint8) []byte {
	const recordAlert, fatal = 21, 2
	return []byte{recordAlert, 3, 1, 0, 2, fatal, desc}
}

// writeAlert sends a fatal alert with a deadline of one second, and leaves c open. Unless the caller reads on
// until the client closes, [Refuse] is the better choice.
func writeAlert(c net.Conn, desc uint8) error {
	if err := c.SetWriteDeadline(time.Now().Add(alertWriteTimeout)); err != nil {
		return fmt.Errorf("send the TLS alert %s: %w", alertName(desc), err)
	}
	if _, err := c.Write(Alert(desc)); err != nil {
		return fmt.Errorf("send the TLS alert %s: %w", alertName(desc), err)
	}
	return nil
}

// Refuse sends a fatal alert and closes c, always, in a way that lets the alert arrive.
//
// A kernel that closes a socket with unread bytes, or gets bytes for a closed one, answers with RST. That
// fails the client's next write, and on some systems throws away what the client has not read yet: the alert.
// Either way people see "connection reset" instead of the reason. So Refuse closes its own direction first,
// then reads and forgets what still comes until the client closes too, but at most 64 KiB and half a second.
//
// It blocks for that time at most (one second and a half if the client does not even take the alert) and
// costs the caller's goroutine, 1 KiB and the file descriptor meanwhile. Under attack that is bounded by the
// limit on connections as long as the caller gives its lease back after Refuse, not before. To refuse at no
// cost at all, close c instead.
func Refuse(c net.Conn, desc uint8) error {
	err := writeAlert(c, desc)
	if err == nil {
		drain(c)
	}
	if cerr := c.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("close a refused connection: %w", cerr))
	}
	return err
}

func drain(c net.Conn) {
	half, ok := c.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil || c.SetReadDeadline(time.Now().Add(drainTimeout)) != nil {
		return
	}
	buf := make([]byte, 1<<10)
	for n := 0; n < drainBytes; {
		m, err := c.Read(buf)
		if err != nil {
			return
		}
		n += m
	}
}
