package server

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// conn is an accepted connection: whose it is, and what is known of it. What it is read from is somebody
// else's: a socket on the relay's loop on the fast path, else a stream.
type conn struct {
	server   *Server
	listener *listener
	service  *service // as it was when the connection came
	lease    *limit.Lease
	accepted time.Time

	id     string              // the path's id
	peer   netip.AddrPort      // the socket's other end
	client netip.AddrPort      // the client, as far back as it is believed
	local  netip.AddrPort      // what the client connected to, as far as it is known
	header *proxyheader.Header // that the peer sent, nil if it sent none
	// why client isn't the client, nil if it is: of the connection, see Judge for requests
	unknown error
	name    string  // server name, once known
	asker   *asker  // who has an address, asked for the connection
	course  *course // of several targets, as far as the fast path has come; else nil

	// undoes that the end of srv.ctx ends it: whoever calls this ends it from then on
	stopCancel   func() bool
	closeOnce    sync.Once
	isArriving   atomic.Bool   // it is to be served requests, and the HTTP server has not got it yet
	afterHeader  time.Duration // from accept to the end of the PROXY header: then its hello's time begins
	headerBytes  int64         // of the PROXY header, which is none of the flow's; negative: not known
	isAttributed bool          // with accept_proxy: it counts as its source's
	isIdentified bool          // with accept_proxy: what the peer says has been judged
}

// stream is a conn that a goroutine reads from. It is a net.Conn whose Read gives first the bytes that were
// read ahead.
type stream struct {
	*net.TCPConn
	*conn
	ahead             []byte       // read from the socket, not yet consumed
	bytesIn, bytesOut atomic.Int64 // through Read and Write: HTTP's share

	holds  atomic.Pointer[func() (bytes int64, since time.Time)] // what HTTP holds for its client
	killed atomic.Pointer[error]                                 // why, by an operator
}

func (in *stream) Read(b []byte) (int, error) {
	var n int
	var err error
	if len(in.ahead) > 0 {
		n = copy(b, in.ahead)
		in.ahead = in.ahead[n:]
		if len(in.ahead) == 0 {
			in.ahead = nil
		}
	} else {
		n, err = in.TCPConn.Read(b)
	}
	in.bytesIn.Add(int64(n))
	return n, err
}

func (in *stream) Write(b []byte) (int, error) {
	n, err := in.TCPConn.Write(b)
	in.bytesOut.Add(int64(n))
	return n, err
}

// RemoteAddr is never nil. That of a TCPConn which was made of a descriptor is, if the peer had reset it by
// then, and net/http asks it without looking.
func (in *stream) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(in.peer) }

// ReadFrom and WriteTo hide TCPConn's, which would pass the bytes that were read ahead, and the counters, by.
func (in *stream) ReadFrom(r io.Reader) (int64, error) {
	n, err := in.TCPConn.ReadFrom(r)
	in.bytesOut.Add(n)
	return n, err
}

func (in *stream) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{in})
}

// Close closes the socket and ends what the limits and the drain count.
func (in *stream) Close() error {
	err := in.TCPConn.Close()
	in.release()
	return err
}

// release ends what the limits and the drain count, when somebody else closes the socket. It may be called
// more than once.
func (in *conn) release() {
	in.closeOnce.Do(func() {
		in.stopCancel()
		in.arrived()
		in.lease.Release()
		in.server.conns.Done()
	})
}

// arrived says that the HTTP server has in, or that it is over: until then no end of that server begins.
func (in *conn) arrived() {
	if in.isArriving.CompareAndSwap(true, false) {
		in.listener.arriving.Add(-1)
	}
}

// takeAhead gives the bytes that were read ahead to a caller who uses the bare TCPConn from here on.
func (in *stream) takeAhead() []byte {
	b := in.ahead
	in.ahead = nil
	return b
}

// serve brings one connection from accept to its end. It owns in.
func (srv *Server) serve(in *stream) {
	if in.asker == nil {
		in.asker = in.newAsker()
	}
	in.asker.onLoop, in.asker.mustAsk = false, false
	if in.service.Trust != nil && !in.isIdentified {
		if err := in.identify(); err != nil {
			srv.refuseConn(in, err)
			return
		}
	}
	if in.id == "" {
		in.id = flow.NewID()
	}
	switch in.service.Mode {
	case "tcp":
		r, err := in.decide(nil)
		if err != nil {
			srv.refuseConn(in, err)
			return
		}
		srv.spliceTo(in, r, nil)
	case "sni":
		srv.serveSNI(in)
	default: // http, https
		in.listener.http.serve(in)
	}
}

func (in *conn) newAsker() *asker {
	return &asker{ctx: in.server.ctx, server: in.server, trust: in.service.Trust}
}

// identify reads the PROXY header of a connection to a listener that has accept_proxy, and believes it only
// from whom the config names. Such a peer may leave the header out where the client speaks first and the
// bytes tell (an HTTP hop says the client's address in the request), unless it is required; a tcp listener
// can't tell and needs it.
func (in *stream) identify() error {
	if err := in.meet(); err != nil {
		return err
	}
	limits := &in.service.Limits
	h, rest, err := proxyheader.Read(in.TCPConn, in.takeAhead(), limits.HelloBytes, limits.HelloTimeout)
	in.ahead = rest
	if err != nil {
		return err
	}
	if in.headerBytes = -1; !in.server.opts.KeepsFlows {
		return in.hear(h)
	}
	tcpsock.Control(in.TCPConn, func(fd int) {
		if p, err := tcpsock.PositionOf(fd); err == nil {
			in.headerBytes = int64(p.Read) - int64(len(rest))
		}
	})
	return in.hear(h)
}

// meet judges the peer before anything is read: one that may not speak for others is charged as a client. It
// may be called again, until nothing must be asked any more.
func (in *conn) meet() error {
	trusted, err := in.asker.Hop(in.peer.Addr())
	switch {
	case in.asker.mustAsk:
		return err
	case trusted:
		return nil
	}
	if err := in.attribute(in.peer.Addr()); err != nil {
		return err
	}
	if in.service.NeedsHeader {
		return in.stranger()
	}
	return nil
}

// hear takes in the peer's PROXY header, nil if it sent none: from then on client is who it is, as far as
// that is believed. It may be called again, until nothing must be asked any more.
func (in *conn) hear(h *proxyheader.Header) error {
	switch trusted, _ := in.asker.Hop(in.peer.Addr()); {
	case h == nil && in.service.NeedsHeader:
		return errNoHeader
	case h != nil && !trusted:
		return in.stranger()
	}
	in.header = h
	_, unknown := in.judge(in.asker)
	if in.asker.mustAsk {
		return unknown
	}
	in.unknown = unknown
	if h != nil {
		in.id, in.name = h.ID, h.ServerName
		if h.Source.IsValid() {
			in.client = h.Source
			if h.Destination.IsValid() {
				in.local = h.Destination
			}
		}
	}
	if in.client != in.peer {
		if err := in.service.deny.refuse(in.client.Addr()); err != nil { // whoever it is
			return err
		}
	}
	if in.client != in.peer && in.unknown == nil {
		if err := in.attribute(in.client.Addr()); err != nil {
			return err
		}
	}
	in.isIdentified, in.afterHeader = true, time.Since(in.accepted)
	return nil
}

// stranger is the error of a peer whose PROXY header is not believed.
func (in *conn) stranger() error {
	if _, err := in.asker.Hop(in.peer.Addr()); err != nil {
		return err
	}
	return &strangerError{in.asker.Describe(in.peer.Addr())}
}

// judge says whether what the peer writes in a request about its client is believed, and why the client is
// not known, nil if it is. Who speaks for others is never a client: strangers come through it, and it has
// rights of its own.
func (in *conn) judge(q *asker) (believed bool, unknown error) {
	h := in.header
	if h == nil && q.needsHeader {
		return false, errNoHeader // there need not have been one when the connection came
	}
	trusted, err := q.Hop(in.peer.Addr())
	switch {
	case err != nil:
		return false, err // not known is not believed, and may be a hop
	case h == nil, h.Local: // of LOCAL the hop says that it's no client's connection
		if trusted {
			return true, &vhost.UnsaidError{Hop: in.peer.Addr(), Itself: true}
		}
		return false, nil
	case !trusted: // any more
		return false, &strangerError{q.Describe(in.peer.Addr())}
	case !h.Source.IsValid():
		return false, &vhost.UnsaidError{Hop: in.peer.Addr()}
	}
	// What the client wrote about itself is not the hop's word.
	trusted, err = q.Hop(h.Source.Addr())
	if trusted {
		err = &vhost.UnsaidError{Hop: h.Source.Addr(), Itself: true}
	}
	return false, err
}

// Gone reports whether the peer has closed the connection or its side of it. Bytes that came before may still
// wait to be read.
func (in *stream) Gone() bool {
	gone := false
	open := tcpsock.Control(in.TCPConn, func(fd int) { gone = !tcpsock.IsEstablished(fd) })
	return gone || !open
}
