package vhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// body is a request's body on its way up. It counts, bounds the client's silence before the answer begins,
// keeps what went wrong on the client's side (the transport blames the upstream), and passes trailers on.
type body struct {
	io.ReadCloser
	isHTTP2 bool // the client speaks it
	stall   time.Duration
	limit   int64 // bytes; 0 is none
	control *http.ResponseController
	bytes   atomic.Int64
	x       *exchange

	idle sync.Cond  // with mu: no Read waits
	mu   sync.Mutex // Read is the transport's, Close may come from the handler
	// +checklocks:mu
	bodyState

	in, out *http.Request // whose trailers are passed on
}

// bodyState is how far a body is.
type bodyState struct {
	reading       time.Time   // since when Read waits; zero where it does not
	timer         *time.Timer // looks whether Read waits for too long; nil before the first one
	isLate        bool        // Read waited for too long, and was ended
	isLeft        bool        // nothing is read any more
	hasEnded      bool        // Read has returned an error, or EOF
	isInterrupted bool        // by us: the upstream is gone
	isKept        bool        // the answer has begun: neither to be interrupted nor to be late any more
	isAbandoned   bool        // nobody reads on: what Read returns is our doing
	failed        error       // what Read returned, other than EOF
}

func newBody(x *exchange, w http.ResponseWriter, stall time.Duration, limit int64) *body {
	b := &body{ReadCloser: x.req.Body, isHTTP2: x.req.ProtoMajor >= 2, stall: stall, limit: limit,
		control: http.NewResponseController(w), x: x}
	b.idle.L = &b.mu
	return b
}

var errTooLarge = errors.New("the request's body is larger than the route allows")

// errLate is what a client's silence is told as.
type errLate time.Duration

func (e errLate) Error() string {
	return fmt.Sprintf("the client sent nothing more of the request's body within %v", time.Duration(e))
}
func (e errLate) Is(target error) bool { return target == os.ErrDeadlineExceeded }

func (b *body) Read(p []byte) (int, error) {
	if !b.begin() {
		return 0, errGivenUp
	}
	n, err := b.ReadCloser.Read(p)
	add(b.x.resp.traffic.Up, n)
	if total := b.bytes.Add(int64(n)); b.limit > 0 && total > b.limit {
		n, err = 0, errTooLarge
	}
	b.end(err)
	return n, err
}

// begin notes that the upstream waits for the client. It reports false where nothing is to be read any more.
func (b *body) begin() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.isLeft {
		return false
	}
	b.reading = time.Now()
	if b.timer == nil && !b.isKept {
		b.x.heardNothing(b.reading)
		b.timer = time.AfterFunc(b.stall, b.look)
	}
	return true
}

// look ends a Read that waits too long. A deadline would, in HTTP/2, also end a body that nobody reads now.
func (b *body) look() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hasEnded || b.isInterrupted || b.isKept {
		return
	}
	left := b.stall
	if !b.reading.IsZero() {
		left -= time.Since(b.reading)
	}
	if left > 0 {
		b.timer.Reset(left)
		return
	}
	b.isLate = true
	b.control.SetReadDeadline(time.Unix(1, 0))
}

// end notes that a Read has returned err; if not nil, how the body ended, and hands the trailers on. Past the
// body no deadline is set: the read that waits is the server's own, watching for the client to leave; it has
// taken the deadline away (HTTP/1), and sets one when it wants that read to end.
func (b *body) end(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = time.Time{}
	b.idle.Broadcast()
	if err == nil || b.hasEnded || b.isAbandoned {
		return
	}
	b.hasEnded = true
	b.stopTimer()
	if b.isLate && errors.Is(err, os.ErrDeadlineExceeded) {
		err = errLate(b.stall)
	}
	if err != io.EOF {
		b.failed = err
		return
	}
	if b.out == nil {
		return
	}
	for k, v := range b.in.Trailer {
		if v != nil && b.x.passesTrailer(k) {
			b.out.Trailer[k] = v
		}
	}
}

// passTrailers makes in's trailers out's, once they have come: those announced, and with HTTP/1 others.
func (b *body) passTrailers(in, out *http.Request) {
	b.in, b.out = in, out
	out.Trailer = http.Header{}
	for k := range in.Trailer {
		if b.x.passesTrailer(k) {
			out.Trailer[k] = nil
		}
	}
	if len(out.Trailer) > 0 {
		out.ContentLength = -1 // HTTP/1 has trailers only in chunked bodies, HTTP/2 in all
	}
}

// passesTrailer says whether the upstream gets a trailer of this name from the client: none that means
// something to whoever takes trailers for headers (RFC 9110 6.5.1).
func (x *exchange) passesTrailer(name string) bool {
	plain := http.CanonicalHeaderKey(string(foldName(nil, name)))
	if plain == "Cookie" || plain == "Upgrade" || plain == "X-Request-Id" || !httpguts.ValidTrailerHeader(plain) || !httpguts.ValidHeaderFieldName(name) || isForwarding(name) ||
		x.visit.drops(name) {
		return false
	}
	isSame := func(other string) bool { return sameHeader(name, other) }
	change := &x.route.RequestHeader
	return !slices.ContainsFunc(change.Remove, isSame) && !slices.ContainsFunc(slices.Collect(maps.Keys(change.Set)), isSame)
}

// state is how far b is now. b may be nil: then there is no body to read.
func (b *body) state() bodyState {
	if b == nil {
		return bodyState{hasEnded: true}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bodyState
}

// fault is the status for a client whose body is wrong or too slow, and what was wrong; 0 if it is not the
// body's fault, or the client has left. b may be nil.
func (b *body) fault(ctx context.Context) (status int, cause error) {
	failed := b.state().failed
	switch {
	case failed == nil:
		return 0, nil
	case errors.Is(failed, errTooLarge):
		return http.StatusRequestEntityTooLarge, failed
	case errors.Is(failed, os.ErrDeadlineExceeded):
		return http.StatusRequestTimeout, failed
	case ctx.Err() != nil || isGone(failed):
		return 0, nil
	}
	return http.StatusBadRequest, failed
}

// lost says whether the client went away in the middle. b may be nil.
func (b *body) lost() bool { return b.state().failed != nil }

// unfinished says whether there is, or was, more than has been read. b may be nil.
func (b *body) unfinished() bool {
	s := b.state()
	return !s.hasEnded || s.failed != nil
}

// wasInterrupted says whether interrupt was called in time. b may be nil.
func (b *body) wasInterrupted() bool { return b.state().isInterrupted }

// keep says that the answer has begun, or that there will be none: from here on nothing ends the body but its
// sides. A stream whose client only listens says nothing for as long as it likes.
func (b *body) keep() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.isKept = true
	b.stopTimer()
}

// +checklocks:b.mu
func (b *body) stopTimer() {
	if b.timer != nil {
		b.timer.Stop()
	}
}

// leave ends all reading before the handler returns, for which the transport does not wait. A Read that met
// the end of an HTTP/1 body then could make the server wait without end for its own read, or panic. It also
// bounds how long the server waits for what is left of the body, before the next request. b may be nil.
func (b *body) leave() {
	if b == nil || b.isHTTP2 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.isLeft = true
	for !b.reading.IsZero() {
		b.control.SetReadDeadline(time.Unix(1, 0))
		b.idle.Wait()
	}
	if !b.hasEnded || b.failed != nil {
		b.control.SetReadDeadline(time.Now().Add(b.stall))
	}
}

// interrupt ends a Read that waits, and the body with it.
func (b *body) interrupt() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.hasEnded && !b.isKept {
		b.isInterrupted = true
		b.control.SetReadDeadline(time.Unix(1, 0))
	}
}

// abandon ends a Read that waits, when the transport wants no more. Otherwise an upstream could not end its
// answer before a client on HTTP/2 has ended its request, as gRPC servers do with failing streams: Go's
// HTTP/2 transport waits for its reading of the body, and ReverseProxy (Go 1.26) keeps it from closing that
// itself. A body of HTTP/1 is left to the server: closing it may wait for a client that sends on.
func (b *body) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.isHTTP2 && !b.hasEnded {
		b.isAbandoned = true
		b.ReadCloser.Close() // wakes a Read (net/http's requestBody)
	}
}

// isGone says whether err is that of a connection which has ended.
func isGone(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || isReset(err) || strings.Contains(err.Error(), "client disconnected")
}

// expectIgnored is for how long an upstream that says nothing to Expect: 100-continue is not asked again. The
// client of each request would wait for expectTimeout.
const expectIgnored = 10 * time.Minute

// expects says whether the upstream is to decide if it wants the request's body, rather than this hop.
func (x *exchange) expects() bool {
	return strings.EqualFold(x.req.Header.Get("Expect"), "100-continue") && hasBody(x.req) &&
		x.req.ProtoAtLeast(1, 1) &&
		x.up.silent.Load().Since() > expectIgnored
}

// heardNothing notes that the upstream gets the body although it has said nothing yet.
func (x *exchange) heardNothing(now time.Time) {
	if x.isExpecting && !x.wasHeard.Load() {
		x.up.silent.Store(moment.Of(now))
	}
}
