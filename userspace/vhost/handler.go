package vhost

import (
	"context"
	"errors"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// exchange is one request on its way.
type exchange struct {
	conn *conn
	req  *http.Request // as it came in
	id   string
	host string
	up   *Upstream
	body *body // nil if the request has none
	resp *response
	err  error

	upConn atomic.Pointer[upstreamConn] // that the transport chose

	whole bool // the handler returned: it did not abort the answer
}

type exchangeKey struct{}

// serveHTTP is the handler of every request.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	started := time.Now()
	x := &exchange{conn: r.Context().Value(connKey{}).(*conn), req: r, host: routeHost(r.Host), resp: &response{ResponseWriter: w}}
	x.id = pathID(r, x.conn.info)
	defer func() { s.report(x, started) }() // also while ErrAbortHandler passes
	if r.Method == http.MethodConnect {
		// A tunnel to a place of the client's choice: never.
		x.resp.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
		s.page(x, http.StatusMethodNotAllowed, fault{title: "This is not a forward proxy", text: "CONNECT is not served here."})
		x.whole = true
		return
	}
	if s.opts.Answer != nil && s.opts.Answer(x.resp, r) {
		x.whole = true
		return
	}
	up, err := s.opts.Route(x.host, routePath(r))
	if err == nil && up == nil {
		err = ErrNoHost
	}
	if err != nil {
		s.refuse(x, err)
		x.whole = true
		return
	}
	x.up = up
	refuseH2CUpgrade(r)
	ctx := context.WithValue(r.Context(), exchangeKey{}, x)
	ctx = context.WithValue(ctx, dialKey{}, up)
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: x.gotConn})
	// A copy: the server looks at its own request's Body (for Expect), and puts
	// the trailers there.
	in := r.WithContext(ctx)
	if r.Body != nil && r.Body != http.NoBody {
		x.body = newBody(r, w, s.opts.StallTimeout)
		in.Body = x.body
		// Without it an HTTP/1 server throws the rest of the body away when the
		// answer begins, though the upstream may still be reading.
		http.NewResponseController(w).EnableFullDuplex()
	}
	s.proxy.ServeHTTP(x.resp, in)
	x.whole = true
}

// gotConn learns which upstream connection the transport chose.
func (x *exchange) gotConn(i httptrace.GotConnInfo) {
	c, ok := i.Conn.(*upstreamConn)
	if !ok {
		return
	}
	x.upConn.Store(c)
	if x.body != nil {
		c.user.Store(x)
	}
}

// upstreamClosed ends the wait for more of the request's body when the upstream
// is gone: the transport reports that only once its read has returned, and a
// client that streams may have nothing to say for long. An answer that came
// before the end of the body is no such case; it is given time to be seen.
func (x *exchange) upstreamClosed(c *upstreamConn) {
	time.AfterFunc(100*time.Millisecond, func() {
		if x.upConn.Load() == c {
			x.body.interrupt()
		}
	})
}

// roundTripOver ends what waits for the upstream connection's end.
func (x *exchange) roundTripOver() {
	if x.body == nil {
		return
	}
	x.body.keep()
	if c := x.upConn.Load(); c != nil {
		c.user.CompareAndSwap(x, nil)
	}
}

// report tells OnRequest of a request that has ended.
func (s *Server) report(x *exchange, started time.Time) {
	if s.opts.OnRequest == nil {
		return
	}
	q := Request{
		Conn: x.conn.info, Client: clientOf(x.req, x.conn.info), ID: x.id, Method: x.req.Method, Host: x.host, Path: x.req.URL.Path, Proto: x.req.Proto,
		Status: x.resp.status, BytesOut: x.resp.bytes, Started: started, Duration: time.Since(started), Upstream: x.up, Err: x.err,
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
	if q.Err == nil && !x.whole {
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
		Rewrite:   s.rewrite,
		Transport: transports{s},
		// Answers of unknown length and event streams are flushed with each
		// write, always. Those of known length may wait this long, so that a
		// small one takes one segment and one TLS record instead of two or three
		// (15 to 20 % of the CPU that a small request takes).
		FlushInterval: time.Millisecond,
		BufferPool:    &buffers{},
		ErrorLog:      errorLog,
		ErrorHandler:  s.failed,
	}
}

// rewrite turns the request that came in into the one that goes out.
func (s *Server) rewrite(pr *httputil.ProxyRequest) {
	x := pr.In.Context().Value(exchangeKey{}).(*exchange)
	pr.Out.URL.Scheme = "http"
	pr.Out.URL.Host = x.up.host()
	pr.Out.URL.User = nil
	pr.Out.Host = pr.In.Host
	// ReverseProxy re-encodes queries that Go's parser finds odd, for the sake
	// of handlers which decide by them. We don't; the upstream gets what was sent.
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery
	setForwarded(pr.In, pr.Out.Header, x.conn.info, x.id)
	if x.body != nil {
		x.body.passTrailers(x.req, pr.Out)
	}
}

// failed answers a request that the upstream did not answer.
func (s *Server) failed(_ http.ResponseWriter, out *http.Request, err error) {
	x := out.Context().Value(exchangeKey{}).(*exchange)
	x.err = err
	if x.body.wasInterrupted() {
		x.err = errUpstreamClosed // and what the transport says is what we did
	} else if status, cause := x.body.fault(x.req.Context()); status != 0 {
		x.err = cause
		x.resp.Header().Set("Connection", "close")
		s.page(x, status, fault{title: http.StatusText(status), text: "The body of the request could not be read."})
		return
	} else if x.req.Context().Err() != nil || x.body.lost() {
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

// routeHost is the host that routes are looked up by.
func routeHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	} else {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// routePath is the path that routes are looked up by: as an upstream would read
// it that decodes and resolves, so that no other way of writing a path leads
// around a route.
func routePath(r *http.Request) string {
	p := r.URL.Path
	if p == "" || p[0] != '/' {
		return "/" // of an absolute-form target without a path, or OPTIONS *
	}
	clean := path.Clean(p)
	if clean != "/" && (strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")) {
		clean += "/"
	}
	return clean
}

// PathMatches says whether a route's path covers path: the same, or followed by
// more segments. "/api/" and "/api" both cover /api, /api/ and /api/x, and not
// /apis; "" and "/" cover everything.
func PathMatches(route, path string) bool {
	route = strings.TrimSuffix(route, "/")
	rest, ok := strings.CutPrefix(path, route)
	return ok && (rest == "" || rest[0] == '/')
}

// refuseH2CUpgrade keeps a client from turning its HTTP/1 request into an
// HTTP/2 connection with the upstream, in which no route would be looked up
// any more. A server may ignore such a wish (RFC 9110 7.8).
func refuseH2CUpgrade(r *http.Request) {
	if r.ProtoMajor >= 2 {
		r.Header.Del("Upgrade")
		return
	}
	for _, v := range r.Header["Upgrade"] {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "h2c") {
				r.Header.Del("Upgrade")
				r.Header.Del("Http2-Settings")
				return
			}
		}
	}
}

// buffers are for copying bodies.
type buffers struct{ pool sync.Pool }

const copyBuffer = 32 << 10

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[copyBuffer]byte); ok {
		return p[:]
	}
	return make([]byte, copyBuffer)
}

func (b *buffers) Put(buf []byte) {
	if len(buf) == copyBuffer {
		b.pool.Put((*[copyBuffer]byte)(buf))
	}
}
