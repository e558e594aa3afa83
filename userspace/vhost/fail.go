package vhost

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Reasons why an upstream did not answer, as pages know them.
const (
	ReasonRefused     = "refused"     // nothing listens there: 502
	ReasonReset       = "reset"       // closed before it answered: 502
	ReasonUnreachable = "unreachable" // no way there: 502
	ReasonMalformed   = "malformed"   // its answer is not HTTP: 502
	ReasonAbsent      = "absent"      // known, and not there now: 503
	ReasonTimeout     = "timeout"     // 504
	ReasonTLS         = "tls"         // it has no TLS, or a certificate that is not believed: 502
)

// Reasoner is an error that knows its reason, one of the Reason constants;
// Upstream.Dial's errors should. Others are classed by what they wrap.
type Reasoner interface {
	error
	Reason() string
}

// Fail gives err a reason.
func Fail(reason string, err error) error { return &failure{reason: reason, err: err} }

// FailAbsent gives err the reason ReasonAbsent, and the time when the upstream was
// last seen, for the page; zero if unknown.
func FailAbsent(seen time.Time, err error) error { return &failure{ReasonAbsent, err, seen} }

type failure struct {
	reason string
	err    error
	seen   time.Time
}

func (f *failure) Error() string  { return f.err.Error() }
func (f *failure) Unwrap() error  { return f.err }
func (f *failure) Reason() string { return f.reason }

// dialError is an error of Upstream.Dial, on its way through the transport.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// reasonOf classes an error of dialling or of a round trip.
func reasonOf(err error) string {
	var known Reasoner
	var dial *dialError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &known):
		return known.Reason()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return ReasonTimeout
	case errors.As(err, &dial):
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) { // ENOENT: no such unix socket
			return ReasonRefused
		}
		return ReasonUnreachable
	case isReset(err), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		strings.Contains(err.Error(), "server closed idle connection"): // net/http's, not exported
		return ReasonReset
	}
	return ReasonMalformed
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// fault is what a page says.
type fault struct {
	title  string // also plain text's first line
	text   string // what happened
	hint   string // what to do
	target string // the hop that did not answer, "" if the fault is here
	reason string
	seen   time.Time // of the target; zero if unknown
}

// ago is how long ago something was, as people say it.
func ago(d time.Duration) string {
	n, unit := int(d/time.Second), "second"
	switch {
	case d >= 48*time.Hour:
		n, unit = int(d/(24*time.Hour)), "day"
	case d >= time.Hour:
		n, unit = int(d/time.Hour), "hour"
	case d >= time.Minute:
		n, unit = int(d/time.Minute), "minute"
	case d < time.Second:
		return "just now"
	}
	if n != 1 {
		unit += "s"
	}
	return strconv.Itoa(n) + " " + unit + " ago"
}

// hopFailed answers with the page for an upstream that did not.
func (s *Server) hopFailed(x *exchange, err error) {
	reason := reasonOf(err)
	name := x.up.Name
	f := fault{target: name, reason: reason}
	status := http.StatusBadGateway
	switch reason {
	case ReasonRefused:
		f.title = sentence(name) + " is not answering"
		f.text = s.opts.Node + " reached " + name + ", and nothing there takes the connection."
		f.hint = "The service may be starting or stopped. Try again in a moment; if it is yours, see that it runs and listens on the port that the route names."
	case ReasonReset:
		f.title = sentence(name) + " hung up"
		f.text = sentence(name) + " closed the connection before it answered " + s.opts.Node + "."
		f.hint = "Try again. If it is yours, its own log should tell why."
	case ReasonMalformed:
		f.title = sentence(name) + " gave no usable answer"
		f.text = "What " + name + " answered " + s.opts.Node + " is not HTTP, or its header is too large."
		f.hint = "If it is yours, see that the route's upstream.protocol is what its port speaks."
	case ReasonTLS:
		var unproven *tls.CertificateVerificationError
		if errors.As(err, &unproven) {
			f.title = sentence(name) + " could not prove who it is"
			f.text = s.opts.Node + " does not believe the certificate of " + name + "."
			f.hint = "If it is yours, see that the route's upstream names the authority of its certificate (ca) and the name on it (server_name)."
			break
		}
		f.title = sentence(name) + " does not speak TLS that is understood here"
		f.text = s.opts.Node + " and " + name + " did not agree on TLS."
		f.hint = "If it is yours, see that the port speaks TLS, and in the log of " + s.opts.Node + " what was wrong: a version, or a certificate that can't be read."
	case ReasonTimeout:
		status = http.StatusGatewayTimeout
		f.title = sentence(name) + " did not answer in time"
		f.text = s.opts.Node + " waited for " + name + " in vain."
		f.hint = "It may be busy, asleep, or without a network. Try again in a moment."
	case ReasonAbsent:
		status = http.StatusServiceUnavailable
		f.title = sentence(name) + " is not there right now"
		f.text = s.opts.Node + " knows " + name + ", but it is offline or not running."
		var absent *failure
		if errors.As(err, &absent) && !absent.seen.IsZero() {
			f.seen = absent.seen
			f.text = s.opts.Node + " knows " + name + ", but it is offline. It was last seen " + ago(time.Since(f.seen)) + ", at " + f.seen.UTC().Format("15:04 on 2 January 2006 UTC") + "."
		}
		f.hint = "Try again once it is back. If it is yours, start it; then this page goes away by itself."
		x.resp.Header().Set("Retry-After", "10")
	default:
		f.reason = ReasonUnreachable
		f.title = sentence(name) + " can't be reached"
		f.text = s.opts.Node + " found no way to " + name + "."
		f.hint = "Try again in a moment. If it is yours, see that it is on the network and that the way to it is allowed."
	}
	s.page(x, status, f)
}

// sentence is name as the first word of one.
func sentence(name string) string {
	if after, ok := strings.CutPrefix(name, "a "); ok {
		return "A " + after
	}
	return name
}

// refuse answers a request that has no route, or can have none.
func (s *Server) refuse(x *exchange, err error) {
	x.err = err
	host := x.uri.Host
	if host == "" {
		host = "a request without a host"
	}
	var method *MethodError
	var bad *BadRequest
	switch {
	case errors.As(err, &bad):
		if x.req.ProtoMajor == 1 { // in HTTP/2 it is about one stream
			x.resp.Header().Set("Connection", "close")
		}
		s.page(x, http.StatusBadRequest, fault{title: "It is not clear what this request is for", text: bad.text})
	case errors.As(err, &method):
		x.resp.Header().Set("Allow", strings.Join(method.Allow, ", "))
		s.page(x, http.StatusMethodNotAllowed, fault{title: "Not this way", text: sentence(host) + " does not take " + x.req.Method + " at this path."})
	case errors.Is(err, ErrMisdirected):
		s.page(x, http.StatusMisdirectedRequest, fault{title: "Come again with a connection of its own", text: "This connection was made for another name, and requests for " + x.uri.Host + " may belong elsewhere."})
	case errors.Is(err, ErrNoHost) && x.req.TLS != nil:
		s.page(x, http.StatusMisdirectedRequest, fault{title: "Nothing is served for " + host + " here",
			text: s.opts.Node + " has no route for " + host + ".",
			hint: "Check the name. If it is yours, add a route for it, or a default."})
	case errors.Is(err, ErrNoHost):
		s.page(x, http.StatusNotFound, fault{title: "Nothing is served for " + host + " here",
			text: s.opts.Node + " has no route for " + host + ".",
			hint: "Check the name. If it is yours, add a route for it, or a default."})
	case errors.Is(err, ErrNoPath):
		s.page(x, http.StatusNotFound, fault{title: "Nothing is served at this path",
			text: s.opts.Node + " serves " + host + ", but has no route for this path.",
			hint: "Check the address. If it is yours, add a route for the path, or one for the whole host."})
	case errors.Is(err, ErrRejected):
		s.page(x, http.StatusForbidden, fault{title: "This is not open to you",
			text: "The configuration of " + s.opts.Node + " rejects requests for " + host + " at this path."})
	default:
		s.log.Error("http: routing a request failed", "host", x.uri.Host, "path", x.uri.Path, "id", x.id, "err", err)
		s.page(x, http.StatusInternalServerError, fault{title: "Something went wrong here",
			text: s.opts.Node + " could not find out where this request belongs.",
			hint: "Its log says why."})
	}
}
