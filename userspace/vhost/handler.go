package vhost

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// exchange is one request on its way.
type exchange struct {
	conn        *conn
	req         *http.Request // as it came in
	id          string
	uri         URI // of a request that was refused at once, what it looks like
	started     time.Time
	requestID   string
	route       *Route
	up          *Upstream // the one that is tried
	using       func()    // ends its Using; nil: there is nothing to end
	wantsTiming bool      // the answer shall have Server-Timing
	hsts        string    // the answer's Strict-Transport-Security, "" for none
	body        *body     // nil if the request has none
	resp        *response
	err         error
	visit       Visit
	charge      charge
	upConn      atomic.Pointer[upstreamConn] // that the transport chose
	wasReused   bool                         // it had been used before
	sentBefore  int64                        // bytes that it had taken then
	watcher     *watcher                     // nil if it is not watched
	isExpecting bool                         // the upstream is asked whether it wants the body
	wasHeard    atomic.Bool                  // the upstream has said something
	isWhole     bool                         // the handler returned: it did not abort the answer
}

type exchangeKey struct{}

// serveHTTP is the handler of every request.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	x, bad := newExchange(w, r)
	x.conn.begins(x)
	defer x.conn.ends(x)
	noRoom := s.charge(x)
	defer x.endRequest()
	if noRoom == nil {
		defer x.hurry()
	}
	defer x.forget()
	s.readHeader(x)
	defer s.finish(x) // also while ErrAbortHandler passes
	if s.enter(x, bad, noRoom) {
		s.forward(x, w)
	}
	x.isWhole = true
}

// newExchange begins with a request. bad is what is wrong with its target.
func newExchange(w http.ResponseWriter, r *http.Request) (x *exchange, bad error) {
	x = &exchange{started: time.Now(), conn: r.Context().Value(connKey{}).(*conn), req: r}
	if x.conn.secure != nil {
		r.TLS = &x.conn.secure.tls
	}
	x.resp = &response{ResponseWriter: w, isPlain: !r.ProtoAtLeast(1, 1)}
	if r.Method == http.MethodConnect {
		x.uri = URI{Host: r.Host, Path: r.RequestURI}
	} else {
		x.uri, bad = readURI(r)
	}
	x.visit = Visit{Request: r, URI: x.uri, ID: x.conn.info.ID, Conn: x.conn.info, Client: x.conn.info.Client, Unknown: x.conn.info.Unknown, x: x}
	if r.ProtoMajor < 2 && !x.conn.hasHTTP1.Load() {
		x.conn.hasHTTP1.Store(true)
	}
	return x, bad
}

// readHeader takes from a charged request's header what every answer needs.
func (s *Server) readHeader(x *exchange) {
	r := x.req
	isBelieved := believes(x.visit.Conn, r.TLS != nil)
	dropForwarding(r.Header, isBelieved)
	// With a Content-Length beside it, which net/http doesn't show, a hop before may see the end of a chunked
	// body elsewhere, and another client's request begin in it (RFC 9112 6.1).
	x.resp.isLast = r.ProtoMajor == 1 && len(r.TransferEncoding) > 0 && !isBelieved
	x.requestID = requestID(r, x.conn, x.id)
	x.wantsTiming = s.opts.Timing != nil && s.opts.Timing() || isBelieved && r.Header[timingHeader] != nil
	if s.opts.HSTS != nil && r.TLS != nil {
		x.hsts = s.opts.HSTS()
	}
	x.resp.before = func(h http.Header) {
		s.addOwn(x, h)
		x.resp.isLast = x.resp.isLast || s.isLast(x)
	}
}

// finish ends x's answer, and tells of it.
func (s *Server) finish(x *exchange) {
	if r := x.req; r.ProtoMajor == 1 && r.Close && hasBody(r) {
		x.conn.lingers.Store(x.isWhole && (x.body == nil || x.body.unfinished()))
	}
	if !x.isWhole {
		x.cutOff()
	}
	add(x.resp.traffic.Requests, -1)
	x.endUse()
	s.report(x)
	x.body.leave()
}

// enter says whether x's request goes on to an upstream. If not, it has been answered.
func (s *Server) enter(x *exchange, bad, noRoom error) bool {
	switch {
	case noRoom != nil:
		s.guard(x, func(http.ResponseWriter, *Visit) error { return noRoom })
	case x.req.Method == http.MethodConnect: // a tunnel to a place of the client's choice: never
		x.resp.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
		s.page(x, http.StatusMethodNotAllowed, fault{title: "This is not a forward proxy", text: "CONNECT is not served here."})
	case bad != nil:
		s.refuse(x, bad)
	case s.opts.Answer != nil && s.opts.Answer(x.resp, x.req):
	case s.guard(x, s.opts.Guard):
		if err := s.findRoute(x); err != nil {
			s.refuse(x, err)
			return false
		}
		return s.admit(x)
	}
	return false
}

// source is the client's address, the zero Addr where it is not known.
func (x *exchange) source() netip.Addr {
	if x.visit.Unknown != nil {
		return netip.Addr{}
	}
	return x.visit.Client.Addr()
}

// forward sends x's request to an upstream of its route, and the answer back.
func (s *Server) forward(x *exchange, w http.ResponseWriter) {
	readUpgrade(x.req)
	x.use(x.route.pick(x.source(), nil))
	ctx := context.WithValue(x.req.Context(), exchangeKey{}, x)
	ctx = context.WithValue(ctx, dialKey{}, x.up)
	trace := &httptrace.ClientTrace{GotConn: x.gotConn}
	if x.isExpecting = x.expects(); x.isExpecting {
		trace.GotFirstResponseByte = func() { x.wasHeard.Store(true) }
	}
	// A copy: the server looks at its own request's Body (for Expect), and puts the trailers there.
	in := x.req.WithContext(httptrace.WithClientTrace(ctx, trace))
	if hasBody(x.req) {
		x.body = newBody(x, w, cmp.Or(x.route.BodyTimeout, s.opts.StallTimeout), x.route.MaxBody)
		in.Body = x.body
		// Else an HTTP/1 server, when the answer begins, drops the rest of the body, which may still be read.
		http.NewResponseController(w).EnableFullDuplex()
	}
	s.proxy.ServeHTTP(x.resp, in)
}

// use makes up the upstream that is tried.
func (x *exchange) use(up *Upstream) {
	x.endUse()
	if x.up = up; up.Using != nil {
		x.using = up.Using()
	}
}

func (x *exchange) endUse() {
	if x.using != nil {
		x.using()
		x.using = nil
	}
}

// hasBody says whether a body comes with a request. In HTTP/2 net/http gives every request one to read.
func hasBody(r *http.Request) bool {
	return r.Body != nil && r.Body != http.NoBody && (r.ProtoMajor == 1 || r.ContentLength != 0)
}

const hstsHeader = "Strict-Transport-Security"

// addOwn gives the header of x's final answer what is this hop's own, whoever makes the answer.
func (s *Server) addOwn(x *exchange, h http.Header) {
	if x.hsts != "" {
		h[hstsHeader] = []string{x.hsts}
	}
	for name, values := range x.visit.Answer {
		h[name] = append(h[name], values...)
	}
	if x.wantsTiming {
		// this hop beside those behind it, which the upstream has named: milliseconds since the header was
		// read
		h.Add("Server-Timing", fmt.Sprintf("%s;dur=%.3f", s.opts.Node, float64(time.Since(x.started))/float64(time.Millisecond)))
	}
}

// findRoute finds x's route.
func (s *Server) findRoute(x *exchange) error {
	route, err := s.opts.Route(x.req, x.uri.Host, x.uri.Plain)
	if err != nil {
		return err
	}
	if route == nil {
		return ErrNoHost
	}
	x.route = route
	if s.opts.Count != nil {
		x.resp.traffic = s.opts.Count(route)
		add(x.resp.traffic.Requests, 1)
	}
	return s.checkReadings(x)
}

// admit says whether x's request goes on to an upstream. If not, it has been answered.
func (s *Server) admit(x *exchange) bool {
	if x.route.ClientCAs != nil {
		if err := checkClient(x.req.TLS, x.route.ClientCAs(), x.uri.Host); err != nil {
			s.clientRefused(x, err)
			return false
		}
	}
	if !s.guard(x, x.route.Guard) {
		return false
	}
	switch {
	case x.route.Redirect != nil:
		s.redirect(x, x.route.Redirect)
		return false
	case x.route.MaxBody > 0 && x.req.ContentLength > x.route.MaxBody:
		x.err = errTooLarge
		x.resp.Header().Set("Connection", "close")
		s.page(x, http.StatusRequestEntityTooLarge, fault{title: http.StatusText(http.StatusRequestEntityTooLarge), text: tooLarge(x.route)})
		return false
	}
	return true
}

func tooLarge(r *Route) string {
	return fmt.Sprintf("The body of the request is larger than the %d bytes that are taken here.", r.MaxBody)
}

// answered changes what an upstream answered, before the client gets it.
func (s *Server) answered(res *http.Response) error {
	x := res.Request.Context().Value(exchangeKey{}).(*exchange)
	switch {
	case res.StatusCode < 100:
		return Fail(ReasonMalformed, fmt.Errorf("the upstream answered with the status %03d", res.StatusCode))
	case res.StatusCode == http.StatusSwitchingProtocols:
		if err := x.upgrading(res.Header); err != nil {
			return err
		}
	case res.StatusCode == http.StatusNoContent:
		delete(res.Header, "Content-Length") // HTTP/2's clients refuse it (RFC 9110 8.6)
	}
	delete(res.Header, "Alt-Svc") // ways to the upstream, around this hop, or to nothing
	if x.hsts != "" {
		res.Header.Del(hstsHeader)
	}
	if x.req.ProtoMajor == 1 && res.StatusCode != http.StatusSwitchingProtocols && x.body.unfinished() {
		// The transport may still read the body when the handler returns. net/http must not begin with the
		// next request then, and a connection whose body is not read whole is to be closed (RFC 9112 9.3).
		res.Header["Connection"] = []string{"close"}
	}
	if x.route.Compress {
		compress(res)
	}
	x.route.ResponseHeader.apply(res.Header)
	return nil
}

// gotConn learns which upstream connection the transport chose.
func (x *exchange) gotConn(i httptrace.GotConnInfo) {
	under := i.Conn
	if tc, ok := under.(*tls.Conn); ok {
		under = tc.NetConn()
	}
	c, ok := under.(*upstreamConn) // what dialUpstream made
	if !ok {
		return
	}
	x.upConn.Store(c)
	x.wasReused, x.sentBefore = i.Reused, c.sent.Load()
	c.before.Store(x.sentBefore)
	if i.Reused && x.up.Watch != nil && x.up.Protocol == HTTP1 {
		x.watch(c)
	}
	if x.body != nil {
		c.join(x)
	}
}

// upstreamClosed ends the wait for more of the request's body when the upstream is gone: the transport
// reports that only once its read has returned, and a client that streams may have nothing to say for long.
// An answer that came before the end of the body is no such case; it is given time to be seen.
func (x *exchange) upstreamClosed(c *upstreamConn) {
	time.AfterFunc(100*time.Millisecond, func() {
		if x.upConn.Load() == c {
			x.body.interrupt()
		}
	})
}

// roundTripOver ends what waits for the upstream connection, or for its end.
func (x *exchange) roundTripOver() {
	x.unwatch()
	if x.body == nil {
		return
	}
	x.body.keep()
	if c := x.upConn.Load(); c != nil {
		c.leave(x)
	}
}

// report tells OnRequest of a request that has ended.
func (s *Server) report(x *exchange) {
	if s.opts.OnRequest == nil {
		return
	}
	q := Request{
		Conn: x.visit.Conn, Client: x.visit.Client, ID: x.id, Method: x.req.Method, Host: x.uri.Host, Path: x.uri.Path, Proto: x.req.Proto,
		Header: x.req.Header, URI: x.uri.String(), RequestID: x.requestID, User: x.visit.User,
		Status: x.resp.status, BytesOut: x.resp.bytes, Started: x.started, Duration: time.Since(x.started), Route: x.route, Upstream: x.up, Err: x.err,
	}
	if c := x.upConn.Load(); c != nil {
		q.UpstreamConn = c.Conn
	}
	if x.body != nil {
		q.BytesIn = x.body.bytes.Load()
	}
	if h := x.resp.hijacked; h != nil {
		q.BytesIn, q.BytesOut = h.in.Load(), h.out.Load()
	}
	if q.Err == nil && !x.isWhole {
		q.Err = errCutOff
		if x.req.Context().Err() != nil {
			q.Err = errClientLeft
		}
	}
	s.opts.OnRequest(q)
}

var (
	errUpstreamClosed = Fail(ReasonReset, errors.New("the upstream closed the connection in the middle of the request"))

	errCutOff     = errors.New("the upstream ended in the middle of its answer")
	errClientLeft = errors.New("the client left before the end")
)

// newProxy makes the proxy that all requests share.
func (s *Server) newProxy(errorLog *log.Logger) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite:        s.rewrite,
		ModifyResponse: s.answered,
		Transport:      transports{s},
		// Answers of unknown length and event streams are flushed with each write, always. Those of known
		// length may wait this long, so that a small one takes one segment and one TLS record instead of two
		// or three (15 to 20 % of the CPU that a small request takes).
		FlushInterval: time.Millisecond,
		BufferPool:    newBuffers(),
		ErrorLog:      errorLog,
		ErrorHandler:  s.failed,
	}
}

// failed answers a request that the upstream did not answer.
func (s *Server) failed(_ http.ResponseWriter, out *http.Request, err error) {
	x := out.Context().Value(exchangeKey{}).(*exchange)
	x.err = err
	if x.body.wasInterrupted() {
		x.err = errUpstreamClosed // and what the transport says is what we did
		if c := x.upConn.Load(); c != nil && c.isUnheard.Load() {
			x.err = errUnheard
		}
	} else if status, cause := x.body.fault(x.req.Context()); status != 0 {
		x.err = cause
		x.resp.Header().Set("Connection", "close")
		f := fault{title: http.StatusText(status), text: "The body of the request could not be read."}
		if status == http.StatusRequestEntityTooLarge {
			f.text = tooLarge(x.route)
		}
		s.page(x, status, f)
		return
	} else if x.clientLeft() || x.body.lost() {
		x.resp.status = statusClientLeft
		x.err = errClientLeft
		panic(http.ErrAbortHandler) // nobody is there to read a page
	}
	if x.resp.hijacked != nil || x.resp.status != 0 {
		panic(http.ErrAbortHandler)
	}
	if x.body.unfinished() {
		x.resp.Header().Set("Connection", "close")
	}
	s.hopFailed(x, x.err)
}

// statusClientLeft is nginx's number for a client that did not wait.
const statusClientLeft = 499

// RoutePath resolves the dot segments and double slashes of a path that has no escapes.
func RoutePath(p string) string {
	if p == "" || p[0] != '/' {
		return "/"
	}
	clean := path.Clean(p)
	if clean != "/" && (strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")) {
		clean += "/"
	}
	return clean
}

// buffers are for copying bodies.
type buffers struct{ pool sync.Pool }

const copyBuffer = 32 << 10

func newBuffers() *buffers {
	return &buffers{sync.Pool{New: func() any { return new([copyBuffer]byte) }}}
}

func (b *buffers) Get() []byte { return b.pool.Get().(*[copyBuffer]byte)[:] }

func (b *buffers) Put(buf []byte) {
	if len(buf) == copyBuffer {
		b.pool.Put((*[copyBuffer]byte)(buf))
	}
}
