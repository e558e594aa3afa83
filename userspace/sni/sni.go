// Package sni reads the TLS ClientHello that begins a connection, and says which name it asks for, so that a
// connection can be routed without being decrypted.
//
// It looks at bytes only: no key, no certificate, no state. [Parse] is a pure function of the bytes, [Read]
// adds a connection, a limit and a deadline to it, and [Refuse] tells a client in TLS why it is sent away.
//
// # What is judged and what is not
//
// The parser is as strict as is needed for the name that it reports to be the one that the server behind will
// see (framing, extension syntax, no extension twice), and leaves everything else (cipher suites, key shares,
// random, compression) to that server, which knows better what to answer. It was fuzzed against crypto/tls.
// The known differences from it, all towards refusing:
//
//   - the first record must say major version 3, as OpenSSL and BoringSSL demand; a client_version of SSL
//     3.0 or less is refused as RFC 8446 appendix D.5 demands;
//   - an alert in front of the hello, or between its fragments, is refused, where crypto/tls skips warnings;
//   - a host name must look like one (see [Hello.ServerName]); crypto/tls takes any bytes.
//
// Where clients send what RFC 6066 forbids and the meaning is not in doubt, it takes that: one trailing dot,
// which crypto/tls refuses, is dropped from a name, and so is a port, as nginx does: a route for a name, and
// what guards it, holds for each of its spellings. An address is no name, so that only a default takes it.
//
// Its files:
//
//	sni.go      what a hello says, and errors
//	record.go   records of TLS become messages
//	hello.go    the message becomes a Hello
//	name.go     host names
//	read.go     a hello is read from a connection, or heard piece by piece
//	alert.go    alerts of TLS
package sni

import (
	"errors"
	"fmt"
)

// Hello is what a ClientHello says that matters for routing.
type Hello struct {
	// ServerName is the host_name of the server_name extension (RFC 6066 section 3) in lower case, without a
	// trailing dot and port, or "" when there is none, or an IP address in its place. It is at most 253 bytes
	// long, its labels are 1 to 63 bytes of letters, digits, hyphens and underscores (those, and hyphens at
	// an end, are not legal in a host name, but in use), and its last label is no number, so that it is never
	// an IP literal. An internationalized name is in its A-label form.
	ServerName string

	// FinalDot says that the name was sent with a dot at its end. RFC 6066 section 3 forbids that, and
	// crypto/tls refuses such a hello as malformed.
	FinalDot bool

	// ALPN holds the protocols that the client offers, in its order, as sent (GREASE included: RFC 8701).
	// Treat it as read-only.
	ALPN []string

	// Length is the size of the TLS records that carry the hello, headers included, in bytes from the start
	// of the stream. What follows (early data, say) belongs to what comes next.
	Length int
}

var (
	// ErrIncomplete is Parse's way to ask for more bytes: what is there may yet become a ClientHello.
	ErrIncomplete = errors.New("the TLS hello is not complete yet")

	// ErrNotTLS means that the stream does not begin with a TLS record. An SSLv2 hello is none.
	ErrNotTLS = errors.New("the stream does not begin with a TLS handshake")

	// ErrTooLarge means that the hello is, or says that it is, larger than the limit.
	ErrTooLarge = errors.New("the TLS hello is larger than the limit")

	// ErrTimeout means that the hello was not complete in time.
	ErrTimeout = errors.New("the TLS hello was not complete in time")

	// ErrEOF means that the peer closed or reset the connection before it sent anything, as port scanners,
	// health checks and browsers that connect ahead do. It is rarely worth a line in a log.
	ErrEOF = errors.New("the connection ended before its first byte")
)

// RejectError says that the stream is TLS, but holds no ClientHello that may be routed.
type RejectError struct {
	Alert  uint8  // the alert description that the client should get (RFC 8446 section 6)
	Reason string // what is wrong with the hello
}

func (e *RejectError) Error() string {
	return fmt.Sprintf("refuse the TLS hello: %s (alert %s)", e.Reason, alertName(e.Alert))
}

func reject(alert uint8, reason string) error { return &RejectError{alert, reason} }

// Parse parses the ClientHello at the start of b, which holds TLS records from the start of the stream; the
// hello may be fragmented over records in any way (RFC 8446 section 5.1), and bytes may follow it.
//
// The error is [ErrIncomplete] when b ends too early, [ErrNotTLS], or a [*RejectError]. A verdict other than
// ErrIncomplete is final: more bytes do not change it. The result shares no memory with b.
func Parse(b []byte) (Hello, error) {
	s := scanner{maxMessage: maxHello, maxWire: int(^uint(0) >> 1)}
	return s.next(b)
}
