// Package vhost serves HTTP for `http` and `https` listeners: it takes accepted connections, terminates TLS
// if it has a configuration for it, and proxies each request to the upstream that its host and path lead to.
//
// It is net/http's server and httputil's ReverseProxy with what a hop among hops needs: forwarding headers
// that can't be forged, upstream connections that no two clients share where a PROXY header speaks for one of
// them, upgrades that lose no byte, trailers both ways, and pages that name the hop which failed.
//
// What vhost does not know, it is given in standard types: where a request goes (Options.Route), what a
// connection's client is (Infoer), how to dial (Upstream.Dial).
//
// Two pairs of its locks nest: spareBody.mu is taken before body.mu, watcher.mu before upstreamConn.mu.
//
// Its files, in the order in which a request meets them:
//
//	vhost.go       the server: options, the connections that it is given, TLS
//	conn.go        a connection: its client, and which hops are believed
//	shutdown.go    connections end, and lose no request
//	frames.go      HTTP/2: a connection's memory is counted by frame
//	handler.go     a request, from its head to its log line
//	uri.go         the request's target, parsed once
//	route.go       what a route takes, and which of its targets is tried first
//	charge.go      the request is charged to its source
//	held.go        what answers take whose clients do not read
//	readings.go    refuses what servers read in different ways behind a guard
//	guard.go       access rules and certificates of clients: what they see, and how they refuse
//	rewrite.go     the path that the target gets, and answers that name another address
//	forwarded.go   X-Forwarded-*, Forwarded, the path's id and hops; header names as CGI and WSGI read them
//	body.go        the request's body: its time, size and trailers, and 100-continue
//	upgrade.go     WebSocket and other upgrades
//	upstream.go    connections to a target
//	retry.go       which target, which protocol, and what is sent again
//	watch.go       upstream connections whose other end may have fallen asleep
//	response.go    the answer, as the client gets it
//	compress.go    gzip
//	fail.go        why a request failed, in words
//	page.go        error pages, and failures as gRPC clients read them
package vhost

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of Options.
const (
	DefaultHeaderTimeout = 10 * time.Second // for the TLS handshake, and then for each request's header
	// DefaultCertificateTimeout is for a handshake with a client certificate: choosing one, typing a PIN.
	DefaultCertificateTimeout = 3 * time.Minute
	// how long a downstream connection may wait for its next request
	DefaultIdleTimeout = 3 * time.Minute
	// DefaultStallTimeout is how long a body may make no progress while somebody waits for it.
	DefaultStallTimeout = 5 * time.Minute
	// DefaultAnswerTimeout is an upstream's time to think about a whole request. Long polls take minutes.
	DefaultAnswerTimeout = 5 * time.Minute
	// DefaultHeaderBytes bounds a request's header. Cookies are large: servers behind us take 8 to 64 KiB.
	DefaultHeaderBytes = 128 << 10
)

// Limits that nobody has wanted to set yet.
const (
	// of an HTTP/2 connection of a trusted hop, which carries many clients
	maxStreams    = 250
	clientStreams = 100 // of a client's; RFC 9113 6.5.2 recommends no fewer
	// of one of a source that has many connections; HTTP/1.1's browsers take 6
	crowdStreams      = 16
	pingAfter         = 60 * time.Second // of silence on an HTTP/2 connection
	http2Stall        = 30 * time.Second // within which an HTTP/2 connection must take some bytes
	answerHeaderBytes = 256 << 10        // of an upstream's answer
	expectTimeout     = 3 * time.Second  // an upstream's time to say 100 Continue, several slow round trips
	// an unused upstream connection's life; shorter than servers keep theirs
	upstreamIdle        = 30 * time.Second
	upstreamIdlePerHost = 64
	upstreamIdleTotal   = 1024
	ownIdle             = 5 * time.Second // the same, of one that speaks for one client: few come back for it
	ownIdlePerHost      = 8               // what a client's HTTP/2 asks for at once
)

// Options says what a Server serves. Route is needed; the rest has defaults.
type Options struct {
	Node string // this hop's name, shown on the pages it makes itself
	// Route says what becomes of a request for host and path, which are URI.Host and URI.Plain. Errors:
	// ErrNoHost, ErrMisdirected, ErrNoPath, a MethodError, ErrRejected; any other is an internal error (500).
	// It is called for each request, so a reload needs no new Server, and for each reading of a path.
	Route func(r *http.Request, host, path string) (*Route, error)
	// ByPath says whether Route looks at the path of a request for host; nil is that it does.
	ByPath func(host string) bool
	// HSTS, if not nil, is the value of Strict-Transport-Security in each answer over TLS, "" for none; an
	// upstream's own gives way to it. Timing, if not nil, says whether answers have a Server-Timing header.
	HSTS   func() string
	Timing func() bool
	// Answer, if not nil, sees each request before Route, and says whether it answered: ACME's challenges.
	Answer func(http.ResponseWriter, *http.Request) bool
	// Charge, if not nil, is asked first whether there is room for a request, whose client is not known yet.
	// Its error is as a Guard's. The lease is released when all work on the request, dialling too, has ended.
	Charge func(*Visit) (Lease, error)
	// Guard, if not nil, decides after Answer and before Route whether a request goes on; a Route's, later.
	Guard Guard
	// TLS is for each connection, with h2 and http/1.1; nil is HTTP/1.1, and HTTP/2 with prior knowledge.
	TLS *tls.Config
	// Count, if not nil, gives what a request of a route is counted in while it is under way.
	Count func(*Route) Traffic
	// if not nil, is called once for each request when it has ended
	OnRequest func(Request)
	// gets what an administrator should know, and debugging. nil discards.
	Log                                                                         *slog.Logger
	HeaderTimeout, CertificateTimeout, IdleTimeout, StallTimeout, AnswerTimeout time.Duration
	HeaderBytes                                                                 int
}

// Traffic is what requests are counted in as they go: how many are under way, and the bytes of their bodies,
// or of all after an upgrade, up to the upstream and down to the client. Its zero value counts nothing.
type Traffic struct{ Requests, Up, Down *atomic.Int64 }

// add counts n in c, which may be nil.
func add(c *atomic.Int64, n int) {
	if c != nil {
		c.Add(int64(n))
	}
}

// Lease is the right to one request.
type Lease interface {
	// Name says whether there is room for a request of the Visit's client. Its error is as a Guard's.
	Name(*Visit) error
	Release()
}

// Route's answers for a request that it leads nowhere.
var (
	// ErrNoHost says that the listener has no route for the host: 421 over TLS, so that a browser which
	// reused a connection for one more name of the certificate tries again with a fresh one; 404 otherwise.
	ErrNoHost = errors.New("no route for this host")
	// ErrMisdirected says that the connection is one for another name: 421, and browsers try a fresh one.
	ErrMisdirected = errors.New("the connection was made for another name")
	ErrNoPath      = errors.New("no route for this path")        // but for the host: 404
	ErrRejected    = errors.New("rejected by the configuration") // 403
)

// Request is what OnRequest learns of a request that has ended.
type Request struct {
	Conn   ConnInfo
	Client netip.AddrPort // as far back as it is believed; port 0 if a header said it
	ID     string         // the path's id, as the upstream got it
	Method string
	Host   string // as Route got it
	Path   string // as the client sent it, without the query
	// as the client sent it, but for what is not believed of it; not to be changed or kept
	Header    http.Header
	URI       string // its path and query, as the client sent them
	RequestID string // X-Request-Id, as the upstream got it
	User      string // who it is, as a Guard found out; "" if none did
	Proto     string // HTTP/1.0, HTTP/1.1 or HTTP/2.0
	Status    int    // of the answer; 499 if the client left before it; 101 for upgrades
	BytesIn   int64  // of the request's body; of everything after an upgrade
	BytesOut  int64  // of the answer's body; of everything after an upgrade
	Started   time.Time
	Duration  time.Duration
	Route     *Route    // nil if none was found
	Upstream  *Upstream // the last that was tried; nil if none was
	// UpstreamConn is what Upstream.Dial returned for this request or an earlier one, for its addresses and
	// the kernel's view of it only: it is not the receiver's, and may be closed. Nil if there was none.
	UpstreamConn net.Conn
	Err          error // why it did not end well, or nil
}

// Server serves HTTP on the connections that it is given. Use New.
type Server struct {
	opts   Options
	log    *slog.Logger
	http   [crowds]*http.Server // which differ in the streams of a connection
	proxy  *httputil.ReverseProxy
	shared [protocolCount]*http.Transport // for upstreams that speak for all
	own    [protocolCount]*http.Transport // for the others
	feeds  [crowds]*feed

	isEnding atomic.Bool // each answer is the last of its connection
	patience

	mu sync.Mutex
	// +checklocks:mu
	conns map[*conn]struct{}
	// +checklocks:mu
	closed bool // no more connections

	ctx      context.Context
	cancel   context.CancelFunc
	gone     context.Context // done when closed and conns is empty
	tellGone context.CancelFunc
}

// patience is the constants of the same names, but for tests.
type patience struct{ firstCall, lastCall, http2Stall, lastWait time.Duration }

// New returns a server that is ready for connections. Close or Shutdown ends it.
func New(o Options) *Server {
	o.HeaderTimeout = cmp.Or(o.HeaderTimeout, DefaultHeaderTimeout)
	o.CertificateTimeout = cmp.Or(o.CertificateTimeout, DefaultCertificateTimeout)
	o.IdleTimeout = cmp.Or(o.IdleTimeout, DefaultIdleTimeout)
	o.StallTimeout = cmp.Or(o.StallTimeout, DefaultStallTimeout)
	o.AnswerTimeout = cmp.Or(o.AnswerTimeout, DefaultAnswerTimeout)
	o.HeaderBytes = cmp.Or(o.HeaderBytes, DefaultHeaderBytes)
	o.TLS = patient(o.TLS, o.CertificateTimeout)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{opts: o, log: o.Log, conns: map[*conn]struct{}{},
		patience: patience{firstCall: firstCall, lastCall: lastCall, http2Stall: http2Stall, lastWait: lastWait}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.gone, s.tellGone = context.WithCancel(context.Background())
	for p := range s.shared {
		s.shared[p] = s.newTransport(Protocol(p), upstreamIdlePerHost, upstreamIdle)
		s.own[p] = s.newTransport(Protocol(p), ownIdlePerHost, ownIdle)
	}
	errorLog := log.New(logBridge{o.Log}, "", 0)
	s.proxy = s.newProxy(errorLog)

	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // in TLS, too: see secure
	for c, streams := range [crowds]int{crowdOfClient: clientStreams, crowdOfHop: maxStreams, crowdOfMany: crowdStreams} {
		s.feeds[c] = newFeed()
		s.http[c] = &http.Server{
			Handler:           http.HandlerFunc(s.serveHTTP),
			Protocols:         &protocols,
			ReadHeaderTimeout: o.HeaderTimeout,
			IdleTimeout:       o.IdleTimeout,
			MaxHeaderBytes:    o.HeaderBytes,
			HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: streams, SendPingTimeout: pingAfter},
			ErrorLog:          errorLog,
			ConnContext:       connContext,
			ConnState:         connState,
			// OPTIONS * is a request like any other.
			DisableGeneralOptionsHandler: true,
		}
		go s.http[c].Serve(s.feeds[c])
	}
	return s
}

// ServeConn serves c until it is closed, by whichever side, and returns then. It owns c. If c has Info
// (Infoer), that tells who is at its other end. served, if not nil, is called once Shutdown ends c as HTTP
// has it. The error says why no request could be served: the TLS handshake failed, or the server is closed
// (http.ErrServerClosed).
func (s *Server) ServeConn(c net.Conn, served func()) error {
	cn := newConn(c, s)
	if !s.add(cn) {
		c.Close()
		return http.ErrServerClosed
	}
	if served != nil {
		served()
	}
	var above net.Conn = cn
	if s.opts.TLS != nil {
		tc, err := s.handshake(cn)
		if err != nil {
			cn.Close()
			return err
		}
		above = tc
		if tc.ConnectionState().NegotiatedProtocol == "h2" {
			cn.secure = &secure{Conn: tc, tls: tc.ConnectionState(), below: cn, frames: newFrames(cn, tc)}
			above = cn.secure
		}
	}
	cn.await() // what TLS has read already is looked at in less than firstCall
	cn.isUp.Store(true)
	if !s.feeds[cn.info.crowd()].push(above) {
		above.Close()
		return http.ErrServerClosed
	}
	<-cn.done
	return nil
}

// handshake terminates TLS on c.
func (s *Server) handshake(c *conn) (*tls.Conn, error) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	c.late = time.AfterFunc(s.opts.HeaderTimeout, func() { cancel(context.DeadlineExceeded) })
	defer c.late.Stop()
	tc := tls.Server(c, s.opts.TLS)
	err := tc.HandshakeContext(ctx)
	name := tc.ConnectionState().ServerName
	var header tls.RecordHeaderError
	switch {
	case err == nil:
		if name != "" {
			c.info.ServerName = routeHost(name)
		}
		return tc, nil
	case errors.As(err, &header) && header.Conn != nil && looksLikeHTTP(header.RecordHeader):
		header.Conn.SetWriteDeadline(time.Now().Add(s.opts.HeaderTimeout))
		io.WriteString(header.Conn, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\nThis port speaks HTTPS: ask for https:// instead of http://.\n")
		return nil, errors.New("plain HTTP on a TLS port")
	case context.Cause(ctx) == context.DeadlineExceeded:
		err = context.DeadlineExceeded
	case err.Error() == "tls: no certificates configured" && name != "": // crypto/tls's, not exported
		err = fmt.Errorf("no certificate here is for %q", name)
	case err.Error() == "tls: no certificates configured":
		err = errors.New("the client named no server, and the first certificate is not there yet")
	}
	return nil, fmt.Errorf("tls handshake: %w", err)
}

// patient returns c with more time for handshakes in which the client is asked for a certificate.
func patient(c *tls.Config, timeout time.Duration) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	choose := c.GetConfigForClient
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (chosen *tls.Config, err error) {
		if choose != nil {
			chosen, err = choose(hello)
		}
		if auth := cmp.Or(chosen, c).ClientAuth; auth != tls.NoClientCert {
			hello.Conn.(*conn).late.Reset(timeout)
		}
		return chosen, err
	}
	return c
}

// looksLikeHTTP says whether a record header that is none begins a request.
func looksLikeHTTP(b [5]byte) bool {
	return slices.Contains([]string{"GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "DELET", "PATCH"}, string(b[:]))
}

// Close ends all connections at once.
func (s *Server) Close() error {
	s.refuseMore()
	s.cancel()
	var errs [crowds]error
	for c := range s.http {
		errs[c] = s.http[c].Close()
		s.feeds[c].Close()
	}
	s.mu.Lock()
	left := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range left {
		c.Close()
	}
	for p := range s.shared {
		s.shared[p].CloseIdleConnections()
		s.own[p].CloseIdleConnections()
	}
	return errors.Join(errs[:]...)
}

// add registers c until it is closed.
func (s *Server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.closed && len(s.conns) == 0 {
		s.tellGone()
	}
}

func (s *Server) refuseMore() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.isEnding.Store(true)
	if len(s.conns) == 0 {
		s.tellGone()
	}
}

// feed is the listener that gives http.Server the connections of ServeConn.
type feed struct {
	conns chan net.Conn
	open  context.Context // until Close
	close context.CancelFunc
}

func newFeed() *feed {
	f := &feed{conns: make(chan net.Conn)}
	f.open, f.close = context.WithCancel(context.Background())
	return f
}

func (f *feed) push(c net.Conn) bool {
	select {
	case f.conns <- c:
		return true
	case <-f.open.Done():
		return false
	}
}

func (f *feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.open.Done():
		return nil, net.ErrClosed
	}
}

func (f *feed) Close() error {
	f.close()
	return nil
}

// Addr is for [net.Listener]; nobody asks.
func (*feed) Addr() net.Addr { return &net.TCPAddr{} }
