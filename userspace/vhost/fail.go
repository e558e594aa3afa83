package vhost

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
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

// Reasoner is an error that knows its reason, as Upstream.Dial's should. Others go by what they wrap.
type Reasoner interface {
	error
	Reason() string
}

// Fail gives err a reason.
func Fail(reason string, err error) error { return &failure{reason: reason, err: err} }

// FailAbsent gives err the reason ReasonAbsent, and when the upstream was last seen, for the page (or zero).
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
	if known, ok := errors.AsType[Reasoner](err); ok {
		return known.Reason()
	}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return ReasonTimeout
	case errors.As(err, new(*dialError)):
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
			// ENOENT: no such unix socket
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
	return tcpsock.IsReset(err) || errors.Is(err, syscall.ECONNABORTED)
}

// fault is what a page says: nothing that only the owner needs, whom the log tells the rest.
type fault struct {
	title  string // also plain text's first line
	text   string // what happened
	hint   string // what the visitor can do
	target string // the hop that did not answer, "" if the fault is here
	state  string // of the target, in a word or two
	reason string
}

// ago is how long ago something was, as people say it.
func ago(d time.Duration) string {
	if d < time.Second {
		return "just now"
	}
	n, unit := int(d/time.Second), "second"
	switch {
	case d >= 48*time.Hour:
		n, unit = int(d/(24*time.Hour)), "day"
	case d >= time.Hour:
		n, unit = int(d/time.Hour), "hour"
	case d >= time.Minute:
		n, unit = int(d/time.Minute), "minute"
	}
	if n != 1 {
		unit += "s"
	}
	return strconv.Itoa(n) + " " + unit + " ago"
}

// hopFaults are the pages for an upstream that did not answer, by reason. NAME stands for its name, Name for
// the same at the start of a sentence; text goes on from "Your request came as far as this node".
var hopFaults = map[string]struct {
	status             int
	title, state, text string
}{
	ReasonRefused: {http.StatusBadGateway, "Name is not answering", "not answering",
		", but NAME takes no requests at the moment. It may be starting."},
	ReasonReset: {http.StatusBadGateway, "Name closed the connection", "no answer",
		", but NAME closed the connection before it sent an answer."},
	ReasonMalformed: {http.StatusBadGateway, "Name sent no valid answer", "invalid answer",
		", but what NAME answered is not valid HTTP."},
	reasonUnproven: {http.StatusBadGateway, "Name could not prove its identity", "not verified",
		", which could not verify the certificate of NAME, so it sent nothing on."},
	ReasonTLS: {http.StatusBadGateway, "There is no secure connection to NAME", "not secure",
		", which could not make a secure connection to NAME, so it sent nothing on."},
	ReasonTimeout: {http.StatusGatewayTimeout, "Name did not answer in time", "no answer",
		", but NAME did not answer in time. It may be busy, asleep, or without a network."},
	ReasonAbsent: {http.StatusServiceUnavailable, "Name is not available right now", "not available",
		", but NAME is offline or not running."},
	reasonOffline: {http.StatusServiceUnavailable, "Name is not available right now", "offline",
		", but NAME is offline. It was last seen AGO."},
	ReasonUnreachable: {http.StatusBadGateway, "Name can't be reached", "not reachable",
		", but there is no connection from there to NAME at the moment."},
}

// What the pages for ReasonTLS and ReasonAbsent say where more is known.
const (
	reasonUnproven = "tls: unproven"
	reasonOffline  = "absent: offline"
)

// hopFailed answers with the page for an upstream that did not.
func (s *Server) hopFailed(x *exchange, err error) {
	reason := reasonOf(err)
	if _, ok := hopFaults[reason]; !ok {
		reason = ReasonUnreachable
	}
	kind, seen := reason, time.Time{}
	switch {
	case reason == ReasonTLS && errors.As(err, new(*tls.CertificateVerificationError)):
		kind = reasonUnproven
	case reason == ReasonAbsent:
		x.resp.Header().Set("Retry-After", "10")
		if absent, ok := errors.AsType[*failure](err); ok && !absent.seen.IsZero() {
			kind, seen = reasonOffline, absent.seen
		}
	}
	came := "Your request came as far as "
	if x.uri.Host != "" {
		came = "Your request for " + x.uri.Host + " came as far as "
	}
	f := hopFaults[kind]
	fill := strings.NewReplacer("NAME", x.up.Name, "Name", sentence(x.up.Name), "AGO", ago(time.Since(seen))).Replace
	text := came + s.opts.Node + fill(f.text)
	if since := x.route.downSince(); !since.IsZero() {
		text += downFor(len(x.route.Upstreams), time.Since(since))
	}
	s.page(x, f.status, fault{title: fill(f.title), text: text, hint: tryAgain, target: x.up.Name,
		state: f.state, reason: reason})
}

// downFor says for how long health checks have found all n upstreams down.
func downFor(n int, d time.Duration) string {
	if n == 1 {
		return " Health checks found it down " + ago(d) + "."
	}
	return fmt.Sprintf(" Health checks found all %d places that could answer down, the last one %s.", n,
		ago(d))
}

// sentence is name as the first word of one. The case of a node's name or a host's stays as it is.
func sentence(name string) string {
	switch article, after, _ := strings.Cut(name, " "); article {
	case "a":
		return "A " + after
	case "the":
		return "The " + after
	}
	return name
}

// bare is name without its article.
func bare(name string) string { return strings.TrimPrefix(strings.TrimPrefix(name, "a "), "the ") }

// refuse answers a request that has no route, or can have none.
func (s *Server) refuse(x *exchange, err error) {
	x.err = err
	node, host := s.opts.Node, x.uri.Host
	if host == "" {
		host = "a request without a host"
	}
	var method *MethodError
	var bad *BadRequest
	const checkSpelling = "Check the address for typing errors."
	status, f := http.StatusNotFound, fault{}
	switch {
	case errors.As(err, &bad):
		if x.req.ProtoMajor == 1 { // in HTTP/2 it is about one stream
			x.resp.Header().Set("Connection", "close")
		}
		status, f = http.StatusBadRequest, fault{title: "This request can't be understood", text: bad.text}
	case errors.As(err, &method):
		x.resp.Header().Set("Allow", strings.Join(method.Allow, ", "))
		status, f = http.StatusMethodNotAllowed, fault{title: "This method is not allowed here",
			text: sentence(host) + " does not accept " + x.req.Method + " requests at this address."}
	case errors.Is(err, ErrMisdirected):
		status, f = http.StatusMisdirectedRequest, fault{title: "This needs a connection of its own",
			text: "The request for " + x.uri.Host + " came on a connection that was made for another name.", hint: "Reload the page."}
	case errors.Is(err, ErrNoHost):
		if x.req.TLS != nil {
			status = http.StatusMisdirectedRequest
		}
		f = fault{title: "Nothing is served for " + host + " here", text: "Your request came to " + node + ", which has no site of that name.",
			hint: checkSpelling}
	case errors.Is(err, ErrNoPath):
		f = fault{title: "There is nothing at this address", text: sentence(host) + " is here, but it has no page at this path.",
			hint: checkSpelling}
	case errors.Is(err, ErrRejected):
		status, f = http.StatusForbidden, fault{title: "Access is not allowed", text: sentence(host) + " does not let visitors in at this path."}
	default:
		s.log.Error("http: routing a request failed", "host", x.uri.Host, "path", x.uri.Path, "id", x.id, "err", err)
		status, f = http.StatusInternalServerError, fault{title: "Something went wrong here",
			text: "Your request came to " + node + ", which could not find out where it belongs.", hint: tryAgain}
	}
	s.page(x, status, f)
}

const tryAgain = "Nothing is wrong at your end. Try again in a few minutes."
