package vhost

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// ConnInfo says who is at the other end of a downstream connection.
type ConnInfo struct {
	// Client is the client as far back as believed: a PROXY header's, else Peer. Invalid: a unix socket's.
	Client netip.AddrPort
	Peer   netip.AddrPort // the other end of the socket
	Local  netip.AddrPort // what the client connected to
	// Unknown is nil if Client is the client, else why not: an UnsaidError, or why nobody can tell of Peer.
	Unknown error
	Trusted bool   // accept_proxy.from names Peer. For its forwarding headers see believes.
	Hop     string // the name, if known, of the node at the other end, if that one may speak for others
	Crowded bool   // Client has many connections
	Hops    Hops   // tells who else may speak for others. Nil: nobody.
	ID      string // the path's id. Never empty if it comes from Info.
	// ServerName is the name that the client asked for in TLS: from an earlier hop's PROXY header, or from
	// the handshake here. On a plain connection a name means that an earlier hop terminated TLS.
	ServerName string
}

// How many streams an HTTP/2 connection may have depends on whose it is. Good clients need few connections.
const (
	crowdOfClient = iota
	crowdOfHop
	crowdOfMany
	crowds
)

func (i ConnInfo) crowd() int {
	switch _, isHop := errors.AsType[*UnsaidError](i.Unknown); {
	case isHop:
		return crowdOfHop
	case i.Crowded:
		return crowdOfMany
	}
	return crowdOfClient
}

// Infoer is a net.Conn for ServeConn that knows more. Info is called once, before the first byte is read.
type Infoer interface{ Info() ConnInfo }

// Judge is what an Infoer may have beside. Judge is called once for each request, whose context ctx is, and
// brings Trusted, Unknown, Hop and Hops up to date: the configuration may change while a connection is kept.
type Judge interface {
	Judge(ctx context.Context, info *ConnInfo)
}

// Hops says whether the config trusts an address to speak for others (accept_proxy.from names it). An error
// says that nobody can tell now. Hop may take a while.
type Hops interface {
	Hop(netip.Addr) (bool, error)
}

// MayTell says whether the next hop may hear a client's address. It may not hear that of a hop, which has
// rights of its own there; but of a process on this host, hop or not, the address says no more than that.
func MayTell(client netip.Addr, unknown error) bool {
	unsaid, ok := errors.AsType[*UnsaidError](unknown)
	return unknown == nil || ok && unsaid.Itself && client.IsLoopback()
}

// client says why a is not a client, nil if it is one: it speaks for others, or nobody can tell.
func (i *ConnInfo) client(a netip.Addr) error {
	if i.Hops == nil {
		return nil
	}
	hop, err := i.Hops.Hop(a)
	if hop {
		return &UnsaidError{Hop: a, Itself: true}
	}
	return err
}

// UnsaidError says that a hop speaks for somebody and doesn't say for whom.
type UnsaidError struct {
	Hop    netip.Addr
	Itself bool // nothing was said at all, as if the hop were the client
}

func (e *UnsaidError) Error() string {
	return e.Hop.String() + " forwards for a client and does not say for whom"
}

// believes says whether the forwarding headers in the requests of a connection are those of a trusted hop.
//
// Being trusted is not enough. A hop that sends a PROXY header may be an edge which passes its client's bytes
// on: then the client wrote the headers, and the PROXY header has said already what is true. And what comes
// in TLS was written by whoever made the handshake, which an edge never does.
func believes(i ConnInfo, overTLS bool) bool { return i.Trusted && !overTLS && i.Client == i.Peer }

// conn is one downstream connection, below TLS.
type conn struct {
	net.Conn
	server    *Server
	info      ConnInfo
	done      chan struct{} // closed with the connection
	late      *time.Timer   // ends a handshake that takes too long
	closeOnce sync.Once
	closeErr  error
	lingers   atomic.Bool  // Close is to leave the peer time to read
	requests  atomic.Int64 // that were given an id here
	hasHTTP1  atomic.Bool  // a request of HTTP/1 has come
	armed     moment.Var   // when the write deadline was last set
	isForeign atomic.Bool  // somebody else has set a write deadline
	preface   int          // bytes of HTTP/2's preface that were read; -1: it speaks something else

	// For Shutdown. HTTP/2 waits for its first request only.
	awaits      moment.Var  // when c began to wait for the head of a request; never: it does not
	heard       moment.Var  // when the first byte of that came; never: none has
	isHTTP2     atomic.Bool // net/http knows that c speaks it
	hasPromised atomic.Bool // the answer of HTTP/1 that is being written has said that c is kept
	isUp        atomic.Bool // net/http gets it now: TLS, if there is to be any, is there
	isTold      atomic.Bool // HTTP/2 is told to go

	readMu sync.Mutex
	// readBy is the deadline that others have set for reads.
	// +checklocks:readMu
	readBy time.Time
	// isCalled: who reads is to look whether c is to end.
	// +checklocks:readMu
	isCalled bool

	mu sync.Mutex
	// +checklocks:mu
	exchanges map[*exchange]struct{} // whose handlers run
	frames    *frames                // nil: no HTTP/2, or TLS around it
	secure    *secure                // nil: no HTTP/2, or no TLS around it
}

func newConn(c net.Conn, s *Server) *conn {
	cn := &conn{Conn: c, server: s, done: make(chan struct{}), exchanges: map[*exchange]struct{}{}}
	cn.await()
	if s.opts.TLS != nil {
		cn.preface = -1
	}
	if h, ok := c.(Holder); ok {
		h.Holds(cn.held)
	}
	if i, ok := c.(Infoer); ok {
		cn.info = i.Info()
		return cn
	}
	cn.info.Peer = tcpsock.AddrPortOf(c.RemoteAddr())
	cn.info.Client = cn.info.Peer
	cn.info.Local = tcpsock.AddrPortOf(c.LocalAddr())
	return cn
}

// judge puts into v what is known, and believed, of its connection now, and who the client is.
func (c *conn) judge(v *Visit) {
	v.Conn = c.info
	if j, ok := c.Conn.(Judge); ok {
		j.Judge(v.Request.Context(), &v.Conn)
	}
	v.Client, v.Unknown = clientOf(v.Request, v.Conn)
}

// lingerFor is how long a connection stays open after an answer, while the peer sends a body that nobody
// reads: closing resets it. net/http takes as long, but no time where the request said "close".
const lingerFor = 500 * time.Millisecond

// Close closes the connection, soon if it lingers.
func (c *conn) Close() error {
	if c.lingers.Swap(false) && c.CloseWrite() == nil {
		time.AfterFunc(lingerFor, func() { c.Close() })
		return nil
	}
	c.closeOnce.Do(func() {
		c.closeErr = c.Conn.Close()
		c.server.remove(c)
		close(c.done)
	})
	return c.closeErr
}

// reset closes the connection, below TLS, whose alert says that all is well: no peer takes this for an end.
func (c *conn) reset() {
	tcpsock.ResetOnClose(c.Conn)
	c.Close()
}

// stall is how long a write to c may take. Clients of HTTP/2 stop reading streams, and never the connection,
// for which the server keeps up to 10,000 frames; a client without a request is not heard at all.
func (c *conn) stall() time.Duration {
	if c.hasHTTP1.Load() {
		return c.server.opts.StallTimeout
	}
	return min(c.server.http2Stall, c.server.opts.StallTimeout)
}

// Write bounds how long a peer that has stopped reading holds the connection. Setting a deadline for each
// write costs more than it gives: it is renewed when a quarter of it has passed.
func (c *conn) Write(b []byte) (int, error) {
	if !c.isForeign.Load() {
		stall, now := c.stall(), time.Now()
		if at := moment.Of(now); c.armed.Load().Age(at) > stall/4 {
			c.armed.Store(at)
			c.Conn.SetWriteDeadline(now.Add(stall))
		}
	}
	n, err := c.Conn.Write(b)
	if c.frames != nil {
		c.frames.wrote(b[:n])
	}
	return n, err
}

// SetWriteDeadline gives way to a deadline of net/http or crypto/tls (for the last alert).
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.isForeign.Store(!t.IsZero())
	c.armed.Store(0)
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline sets both, as net.Conn says.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetWriteDeadline(t), c.SetReadDeadline(t))
}

// CloseWrite passes a half-close on, for upgraded connections.
func (c *conn) CloseWrite() error { return closeWrite(c.Conn) }

// isClosed reports whether c's socket was closed here, by whomever: then nobody can be answered.
func (c *conn) isClosed() bool {
	_, hasSocket := c.Conn.(syscall.Conn)
	return hasSocket && !tcpsock.Control(c.Conn, func(int) {})
}

// closeWrite ends c's stream: TCP's, or TLS's by close_notify.
func closeWrite(c net.Conn) error {
	if cw, ok := c.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}

// clientLeft says whether nobody waits for the answer. While a body is to be read net/http does not look; the
// connection may see without reading whether its peer has closed its side.
func (x *exchange) clientLeft() bool {
	c, ok := x.conn.Conn.(interface{ Gone() bool })
	return x.req.Context().Err() != nil || x.conn.isClosed() || x.req.ProtoMajor == 1 && ok && c.Gone()
}

// ClientLeft says whether the client of the request that wants a connection has left; ctx is what
// Upstream.Dial got. It sees more if the downstream net.Conn has the method Gone() bool.
func ClientLeft(ctx context.Context) bool {
	x, ok := ctx.Value(exchangeKey{}).(*exchange)
	return ok && x.clientLeft()
}

type connKey struct{}

// connContext gives requests their connection.
func connContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, connOf(c))
}

// connOf is the connection below what net/http has.
func connOf(c net.Conn) *conn {
	switch v := c.(type) {
	case *tls.Conn:
		c = v.NetConn()
	case *secure:
		c = v.below
	}
	return c.(*conn)
}

// Info returns what is known of who a request is from; ctx is the request's, or what Upstream.Dial got. For
// Dial, Client, Unknown and ID are the request's: one that a believed hop said has port 0 and no Local.
func Info(ctx context.Context) (ConnInfo, bool) {
	c, ok := ctx.Value(connKey{}).(*conn)
	if !ok {
		return ConnInfo{}, false
	}
	info := c.info
	if x, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
		info.ID, info.Unknown = x.id, x.visit.Unknown
		if x.visit.Client != info.Client {
			info.Client, info.Local = x.visit.Client, netip.AddrPort{}
		}
	}
	return info, true
}

// logBridge turns net/http's log into slog's: what strangers cause, but for a panic of our own.
type logBridge struct{ log *slog.Logger }

func (b logBridge) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(p, []byte("panic serving")) {
		level = slog.LevelError
	}
	b.log.Log(context.Background(), level, "http: "+string(bytes.TrimSpace(p)))
	return len(p), nil
}
