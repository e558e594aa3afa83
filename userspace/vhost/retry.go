package vhost

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// transports sends a request by the transport that its upstream needs, and again where that can do no harm.
type transports struct{ s *Server }

// RoundTrip tries the upstream that was picked first. What follows from an attempt that failed is its remedy.
func (t transports) RoundTrip(r *http.Request) (*http.Response, error) {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	defer x.roundTripOver()
	if x.body == nil && len(x.route.Upstreams) == 1 && repeatable(r.Method) {
		return t.once(x, r) // the transport itself does all that there is to do
	}
	var spare *spareBody
	if r.Body != nil {
		spare = &spareBody{body: r.Body, abandon: x.body.abandon}
		defer spare.lastAttempt()
	}
	var tried []*Upstream
	var errs []error               // theirs
	mayWait := x.route.Wait != nil // and none was reached so far
	began := time.Now()
	for stale := 0; ; {
		x.upConn.Store(nil)
		res, err := t.once(x, spare.attemptOf(r))
		if err == nil {
			return res, nil
		}
		switch x.remedy(r, err, spare, stale) {
		case giveUp:
			return nil, err
		case sameUpstream:
			stale++
			continue
		}
		tried, errs = append(tried, x.up), append(errs, err)
		mayWait = mayWait && isUnreached(err)
		next := x.route.pick(x.source(), tried)
		if next == nil && mayWait && x.route.Wait(r.Context(), began, errs) {
			tried, errs = nil, nil
			next = x.route.pick(x.source(), nil)
		}
		if next == nil {
			return nil, err
		}
		t.s.log.Debug("http: trying another upstream", "id", x.id, "failed", x.up.Key, "next", next.Key, "err", err)
		x.use(next)
		r = r.WithContext(context.WithValue(r.Context(), dialKey{}, next))
		u := *r.URL
		r.URL = &u
		next.address(r.URL, x)
	}
}

// isUnreached says whether an attempt has failed with err because the upstream could not be reached. One that
// was, and did not take the request, would be found at once by a wait, and so again and again.
func isUnreached(err error) bool {
	return errors.As(err, new(*dialError)) && reasonOf(err) != ReasonTLS
}

// remedy is what is done about an attempt that has failed.
type remedy int

const (
	giveUp        remedy = iota
	sameUpstream         // once more, on another connection
	otherUpstream        // the next one that the route picks
)

// remedy judges the attempt that failed with err, after so many stale connections, by the first line that
// fits:
//
//	the client has left or is being answered, or the body can't be sent again   giveUp
//	nothing was sent on a connection of the pool, which had gone stale          sameUpstream, maxStale times
//	nothing was sent                                                            otherUpstream
//	the request may be repeated, and this was no timeout but of dialling        otherUpstream
//	else                                                                        giveUp
func (x *exchange) remedy(r *http.Request, err error, spare *spareBody, stale int) remedy {
	if r.Context().Err() != nil || errors.Is(err, errClientLeft) || x.resp.status != 0 || !spare.whole() || x.body.wasInterrupted() {
		return giveUp
	}
	// after all: the transport may have given up a connection before
	isDial := errors.As(err, new(*dialError))
	isUnsent := isDial
	if c := x.upConn.Load(); c != nil {
		c.leave(x)
		isUnsent = c.sent.Load() == x.sentBefore
		if isUnsent && x.wasReused && stale < maxStale {
			return sameUpstream
		}
	}
	isTimeout := !isDial && (errors.Is(err, os.ErrDeadlineExceeded) || reasonOf(err) == ReasonTimeout)
	if isUnsent || repeatable(r.Method) && !isTimeout {
		return otherUpstream
	}
	return giveUp
}

// maxStale bounds how many stale connections a request may meet: more than the pool holds is another fault.
const maxStale = upstreamIdlePerHost + 1

// repeatable says whether a request may be sent again though an upstream may have seen it (RFC 9110 9.2.2).
func repeatable(method string) bool {
	return slices.Contains([]string{http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut,
		http.MethodDelete}, method)
}

// once sends r to x's upstream.
func (t transports) once(x *exchange, r *http.Request) (*http.Response, error) {
	if err := x.up.refuses(); err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, &dialError{err}
	}
	p := x.up.Protocol
	if needsHTTP1(x, r) { // who speaks HTTP/2 speaks HTTP/1.1 too
		switch p {
		case H2C:
			p = HTTP1
		case HTTPS:
			p = https1
		}
	}
	transport := t.s.pool(x.up, p)
	if x.route.AnswerTimeout > 0 {
		var stop func()
		r, stop = withAnswerTimeout(r, x.route.AnswerTimeout)
		defer stop()
	}
	res, err := transport.RoundTrip(r)
	if err == nil { // on a connection that was kept, too
		x.up.Health.Worked()
	}
	if err != nil && errors.Is(context.Cause(r.Context()), errAnswerTimeout) {
		err = errAnswerTimeout
	}
	return res, err
}

// pool is where the connections to up are kept that speak p.
func (s *Server) pool(up *Upstream, p Protocol) *http.Transport {
	if up.Speaks != ForAll {
		return s.own[p]
	}
	return s.shared[p]
}

var errAnswerTimeout = Fail(ReasonTimeout, errors.New("no answer within the route's timeouts.answer"))

// needsHTTP1 says whether x's request, as it came or goes, has what HTTP/2 can't: an Upgrade, or no host.
func needsHTTP1(x *exchange, r *http.Request) bool {
	return wantsUpgrade(r) || x.uri.Authority == "" && x.route.RequestHeader.Set["Host"] == ""
}

// withAnswerTimeout cancels r when it has been sent whole and no answer has begun after d. stop ends that. It
// may come before the transport's writer is done: the first of both sets timer, so that none runs on.
func withAnswerTimeout(r *http.Request, d time.Duration) (_ *http.Request, stop func()) {
	ctx, cancel := context.WithCancelCause(r.Context())
	var timer atomic.Pointer[time.Timer]
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) {
		if t := time.AfterFunc(d, func() { cancel(errAnswerTimeout) }); !timer.CompareAndSwap(nil, t) {
			t.Stop()
		}
	}})
	return r.WithContext(ctx), func() {
		if !timer.CompareAndSwap(nil, new(time.Timer)) {
			timer.Load().Stop()
		}
	}
}

// spareBody is a request's body that can be sent again while what was read of it still fits in memory.
type spareBody struct {
	body    io.ReadCloser
	abandon func()       // ends a Read of body that waits
	attempt *attemptBody // the last that was made; RoundTrip's own
	done    atomic.Bool  // there will be no other attempt

	mu sync.Mutex // held while body is read, which may take long
	// +checklocks:mu
	read []byte // from body, by whichever attempt
	// +checklocks:mu
	err error // how body ended
	// +checklocks:mu
	isOver bool // more was read than is kept
}

// attemptOf is r for one more attempt. s may be nil.
func (s *spareBody) attemptOf(r *http.Request) *http.Request {
	if s == nil {
		return r
	}
	r = r.WithContext(r.Context())
	s.attempt = &attemptBody{spare: s}
	r.Body = s.attempt
	return r
}

// spareBytes are what a transport's buffers take before any of it is sent.
const spareBytes = 2 * bufferSize

// whole says whether the body can be sent once more. s may be nil.
func (s *spareBody) whole() bool {
	if s == nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.isOver && (s.err == nil || s.err == io.EOF)
}

// lastAttempt says that there will be no other. The transport may have closed the body by now, or will.
func (s *spareBody) lastAttempt() {
	s.done.Store(true)
	if s.attempt.closed.Load() {
		s.abandon()
	}
}

// attemptBody is what one attempt reads.
type attemptBody struct {
	spare  *spareBody
	at     int
	closed atomic.Bool
}

var errGivenUp = errors.New("this attempt was given up")

func (a *attemptBody) Read(p []byte) (int, error) {
	s := a.spare
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.closed.Load() {
		return 0, errGivenUp
	}
	if a.at < len(s.read) {
		n := copy(p, s.read[a.at:])
		a.at += n
		return n, nil
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.body.Read(p)
	s.err = err
	switch {
	case s.isOver:
	case len(s.read)+n > spareBytes:
		s.isOver, s.read, a.at = true, nil, 0
	default:
		s.read = append(s.read, p[:n]...)
		a.at += n
	}
	return n, err
}

// Close ends the attempt, and the body itself only with the last one.
func (a *attemptBody) Close() error {
	a.closed.Store(true)
	if a.spare.done.Load() {
		a.spare.abandon()
		return a.spare.body.Close()
	}
	return nil
}
