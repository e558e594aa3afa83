package vhost

import (
	"context"
	"encoding/hex"
	"errors"
	"net"
	"net/http"
	"sync/atomic"
)

// Upstream is where requests are sent.
type Upstream struct {
	// Key tells upstreams apart: connections are reused for every request
	// whose Upstream has the same Key. The target as the config writes it is
	// a good one.
	Key string
	// Name is how pages call it. Visitors see it: name a node, a container, or
	// "a local service", not an internal address.
	Name string
	// Dial connects to it. ctx carries the values of the request that wants
	// the connection (Info(ctx) works), not its end: Dial has a timeout of its
	// own. An error with a reason (see Fail) makes a better page.
	Dial func(ctx context.Context) (net.Conn, error)
	// OwnConnections says that a connection speaks for one downstream
	// connection, because Dial writes a PROXY header: it is never used for
	// another, and closed with it.
	OwnConnections bool
	// Route is the route's name, for OnRequest.
	Route string
}

// An own transport serves one client: what HTTP/2 asks for at once.
const (
	ownIdlePerHost = 8
	ownIdleTotal   = 32
)

type dialKey struct{}

// newTransport makes a transport that dials with the request's own Upstream.
// Its pool is keyed by the URL's host, which host makes of Upstream.Key.
func (s *Server) newTransport(idlePerHost, idle int) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			up, ok := ctx.Value(dialKey{}).(*Upstream)
			if !ok {
				return nil, errors.New("no upstream in the request's context")
			}
			c, err := up.Dial(ctx)
			if err != nil {
				return nil, &dialError{err}
			}
			return &upstreamConn{Conn: c}, nil
		},
		Protocols:              &protocols,
		DisableCompression:     true, // what the client asked for is what it gets
		MaxIdleConnsPerHost:    idlePerHost,
		MaxIdleConns:           idle,
		IdleConnTimeout:        upstreamIdle,
		ResponseHeaderTimeout:  s.opts.AnswerTimeout,
		ExpectContinueTimeout:  expectTimeout,
		MaxResponseHeaderBytes: answerHeaderBytes,
		ReadBufferSize:         bufferSize,
		WriteBufferSize:        bufferSize,
	}
}

// bufferSize is of an upstream connection, each way: chunked bodies are read
// through it, so it is also their largest write downstream, and one TLS record
// holds 16 KiB.
const bufferSize = 16 << 10

// host is a host name that stands for an upstream in URLs which only the
// transport sees: one to one, whatever characters the key has.
func (u *Upstream) host() string { return hex.EncodeToString([]byte(u.Key)) }

// upstreamConn is a connection in a pool. It tells the exchange that uses it
// when the transport closes it.
type upstreamConn struct {
	net.Conn
	user atomic.Pointer[exchange] // whose request has a body and no answer yet
}

func (c *upstreamConn) Close() error {
	err := c.Conn.Close()
	if x := c.user.Swap(nil); x != nil {
		x.upstreamClosed(c)
	}
	return err
}

// CloseWrite passes a half-close on, for upgraded connections.
func (c *upstreamConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}

// transports sends a request by the transport that its upstream needs.
type transports struct{ s *Server }

func (t transports) RoundTrip(r *http.Request) (*http.Response, error) {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	transport := t.s.shared
	if x.up.OwnConnections {
		transport = x.conn.transport()
	}
	res, err := transport.RoundTrip(r)
	x.roundTripOver()
	return res, err
}
