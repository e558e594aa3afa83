package vhost

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// Protocol is how an upstream is spoken with.
type Protocol uint8

const (
	HTTP1  Protocol = iota // HTTP/1.1 in the clear
	H2C                    // HTTP/2 in the clear, with prior knowledge
	HTTPS                  // TLS, and what it negotiates: HTTP/2 or HTTP/1.1
	https1                 // HTTPS without HTTP/2, see needsHTTP1

	protocolCount = iota
)

// Speaker says for whom a connection to an upstream speaks, and so which requests may share it.
type Speaker uint8

const (
	ForAll    Speaker = iota // for whoever
	ForClient                // for one client's address: Dial binds to it
	ForPath                  // for one client's connection, by the path's id: Dial writes a PROXY header
)

// Upstream is where requests are sent.
type Upstream struct {
	// Key tells upstreams apart: connections are reused for every request whose Upstream has the same Key,
	// within what Speaks allows. The target as the config writes it is a good one.
	Key string
	// Name is how pages call it, for visitors: a node, a container, "a local service", no internal address.
	Name string
	// Dial connects to it. ctx carries the values of the request that wants the connection (Info(ctx) works),
	// not its end: Dial has a timeout of its own. An error with a reason (see Fail) makes a better page.
	Dial func(ctx context.Context) (net.Conn, error)
	// Refuses, if not nil, says why no request may go there now, also on a connection that is there; or nil.
	Refuses func() error
	// Using, if not nil, is called when a request is about to go there. What it returns is called when the
	// request is over, or goes elsewhere.
	Using func() (end func())
	// IsFault, if not nil, reports whether an error of Dial tells others to avoid it.
	IsFault func(error) bool
	// Speaks says for whom its connections speak. Those not for all are closed soon after their last request.
	Speaks   Speaker
	Protocol Protocol    // how to speak with it
	TLS      *tls.Config // for HTTPS: with a ServerName, without NextProtos; other settings are another Key's
	// Roots, if not nil, takes the place of TLS.RootCAs. Connections under another version are used no more.
	Roots func() (pool *x509.CertPool, version string)
	Watch *Watch // if not nil, kept over connections that are used again

	Health balance.Health // what connections to it have shown

	silent moment.Var // when it last ignored an Expect
}

type dialKey struct{}

// newTransport makes one that dials with the request's own Upstream. It pools by the URL's host, see address.
func (s *Server) newTransport(p Protocol, idlePerHost int, idle time.Duration) *http.Transport {
	var speaks http.Protocols
	speaks.SetHTTP1(p != H2C)
	speaks.SetUnencryptedHTTP2(p == H2C)
	speaks.SetHTTP2(p == HTTPS)
	return &http.Transport{
		DialContext: charged(func(ctx context.Context) (net.Conn, error) { return dialUpstream(ctx) }),
		// Instead of TLSClientConfig, which would be the same for all.
		DialTLSContext:         charged(dialUpstreamTLS),
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingAfter, MaxReceiveBufferPerStream: answerBuffer},
		Protocols:              &speaks,
		DisableCompression:     true, // what the client asked for is what it gets
		MaxIdleConnsPerHost:    idlePerHost,
		MaxIdleConns:           upstreamIdleTotal,
		IdleConnTimeout:        idle,
		ResponseHeaderTimeout:  s.opts.AnswerTimeout,
		ExpectContinueTimeout:  expectTimeout,
		MaxResponseHeaderBytes: answerHeaderBytes,
		ReadBufferSize:         bufferSize,
		WriteBufferSize:        bufferSize,
	}
}

const (
	// bufferSize is of an upstream connection, each way: chunked bodies are read through it, so it is also
	// their largest write downstream, and one TLS record holds 16 KiB.
	bufferSize = 16 << 10
	// answerBuffer is what an upstream of HTTP/2 may send of an answer before the client has read it. Go's
	// default is 4 MiB, which a client that reads nothing would fill for each of its streams.
	answerBuffer        = 512 << 10
	tlsHandshakeTimeout = 10 * time.Second // what net/http's default transport gives a handshake
)

func dialUpstream(ctx context.Context) (*upstreamConn, error) {
	up := ctx.Value(dialKey{}).(*Upstream)
	c, err := up.Dial(ctx)
	if err != nil {
		if up.IsFault == nil || up.IsFault(err) {
			up.Health.Failed()
		}
		return nil, &dialError{err}
	}
	up.Health.Worked()
	return &upstreamConn{Conn: c, users: map[*exchange]struct{}{}}, nil
}

func dialUpstreamTLS(ctx context.Context) (net.Conn, error) {
	c, err := dialUpstream(ctx)
	if err != nil {
		return nil, err
	}
	up := ctx.Value(dialKey{}).(*Upstream)
	config := up.TLS.Clone()
	if up.Roots != nil {
		config.RootCAs, _ = up.Roots()
	}
	config.NextProtos = []string{"h2", "http/1.1"}
	if x := ctx.Value(exchangeKey{}).(*exchange); needsHTTP1(x, x.req) {
		config.NextProtos = config.NextProtos[1:]
	}
	ctx, cancel := context.WithTimeout(ctx, tlsHandshakeTimeout)
	defer cancel()
	tc := tls.Client(c, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, &dialError{Fail(ReasonTLS, err)}
	}
	return tc, nil
}

// address makes u lead to the upstream, in the transport's eyes only: the host stands for Key, the version of
// Roots, and for whom the connection speaks, whatever characters they have.
func (up *Upstream) address(u *url.URL, x *exchange) {
	u.Scheme = "http"
	if up.Protocol == HTTPS {
		u.Scheme = "https"
	}
	key := up.Key
	if up.Roots != nil {
		_, version := up.Roots()
		key += " " + version
	}
	switch up.Speaks {
	case ForClient:
		key += "\n" + x.visit.Client.Addr().String()
	case ForPath:
		key += "\n" + x.visit.Client.String() + " " + x.id
	}
	if up.Speaks != ForAll && x.visit.Unknown != nil {
		key += "\nunknown" // by now: what was dialled before that speaks for a client
	}
	u.Host = hex.EncodeToString([]byte(key))
}

// upstreamConn is a connection in a pool. It tells the exchanges that use it when the transport closes it.
type upstreamConn struct {
	net.Conn
	sent      atomic.Int64 // bytes
	before    atomic.Int64 // bytes that were sent before the last request
	isDeaf    atomic.Bool  // the upstream takes no more, see Write
	isCut     atomic.Bool  // it is deaf, and its own stream was cut off by that
	isShut    atomic.Bool  // our stream to it has ended
	writing   sync.RWMutex // read-locked by a write that is under way
	isUnheard atomic.Bool  // it was given up: see Watch

	mu sync.Mutex
	// +checklocks:mu
	users map[*exchange]struct{} // whose requests have a body and no answer yet
}

func (c *upstreamConn) join(x *exchange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.users[x] = struct{}{}
}

func (c *upstreamConn) leave(x *exchange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.users, x)
}

// Write reports no reset in the middle of a request: the transport would close the connection, and there may
// be an answer to read, as from servers that refuse an upload. A read says later that the connection is gone.
func (c *upstreamConn) Write(p []byte) (int, error) {
	if c.isDeaf.Load() {
		return len(p), nil
	}
	c.writing.RLock()
	defer c.writing.RUnlock()
	n, err := c.Conn.Write(p)
	if sent := c.sent.Add(int64(n)); err != nil && isReset(err) && sent > c.before.Load() {
		// EPIPE says on Linux that its stream had ended before (tcp_reset in net/ipv4/tcp_input.c).
		if runtime.GOOS != "linux" || !errors.Is(err, syscall.EPIPE) {
			c.isCut.Store(true)
		}
		c.isDeaf.Store(true)
		return len(p), nil
	}
	return n, err
}

func (c *upstreamConn) Close() error {
	err := c.Conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for x := range c.users {
		x.upstreamClosed(c)
	}
	clear(c.users)
	return err
}

// CloseWrite passes a half-close on, for upgraded connections.
func (c *upstreamConn) CloseWrite() error {
	c.isShut.Store(true)
	return closeWrite(c.Conn)
}
