package vhost

import (
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// charge is what a request counts for while something is done for it.
type charge struct {
	lease Lease // nil where nothing is counted
	work  atomic.Int32
	late  time.Duration // after the end of all work it counts for so long
}

// begin counts more work on a request. It reports false where all of it has ended.
func (c *charge) begin() bool {
	for n := c.work.Load(); n > 0; n = c.work.Load() {
		if c.work.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

// end ends what begin began.
func (c *charge) end() {
	if c.work.Add(-1) > 0 || c.lease == nil {
		return
	}
	if c.late > 0 {
		time.AfterFunc(c.late, c.lease.Release)
		return
	}
	c.lease.Release()
}

const (
	// resetCost is for how long a request at least counts that its client resets: who opens and resets
	// streams as fast as possible then has no more of them than who waits for answers.
	resetCost   = time.Second
	refusalWait = 5 * time.Second // for a client to read that it has too many requests under way
	// lastWait is how long a client with many connections may take for the end of an answer whose handler has
	// returned: HTTP/2's server keeps that, some 30 KB a stream, and nothing counts it any more.
	lastWait = 15 * time.Second
)

// endRequest ends what charge began.
func (x *exchange) endRequest() {
	if x.req.ProtoMajor >= 2 && x.req.Context().Err() != nil {
		x.charge.late = resetCost - time.Since(x.started)
	}
	x.charge.end()
}

// hurry gives a client with many connections lastWait for the end of its answer.
func (x *exchange) hurry() {
	if x.req.ProtoMajor >= 2 && x.conn.info.crowd() == crowdOfMany {
		_ = http.NewResponseController(x.resp).SetWriteDeadline(time.Now().Add(x.conn.server.lastWait))
	}
}

// charge begins the work on x's request, and finds out who it is from. It counts in all before that, since
// the answer may be long in coming, and then for its source. The error says that there is no room.
func (s *Server) charge(x *exchange) (err error) {
	x.charge.work.Store(1)
	if s.opts.Charge != nil {
		x.charge.lease, err = s.opts.Charge(&x.visit)
	}
	if err == nil {
		x.conn.judge(&x.visit)
	}
	x.id = pathID(x.req, x.visit.Conn)
	x.visit.ID = x.id
	if err == nil && x.charge.lease != nil {
		err = x.charge.lease.Name(&x.visit)
	}
	if err != nil && x.req.ProtoMajor >= 2 {
		// Else a stream whose window is empty keeps its handler.
		_ = http.NewResponseController(x.resp).SetWriteDeadline(time.Now().Add(refusalWait))
	}
	return err
}

// forget lets go of what the client sent. HTTP/2's server keeps the request until the client takes the end of
// its answer: many streams may have an empty window, and each header takes up to Options.HeaderBytes.
func (x *exchange) forget() {
	if r := x.req; r.ProtoMajor >= 2 {
		r.Header, r.URL, r.Host, r.RequestURI = nil, nil, "", ""
	}
}

// charged counts dialling as work on the request that wants the connection: the transport goes on when that
// has ended, as with streams that a client opens and resets. What it would only begin then it doesn't begin.
// And a request whose client's connection was closed here meanwhile is not sent, though it may be here whole.
func charged(dial func(context.Context) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		x, ok := ctx.Value(exchangeKey{}).(*exchange)
		if !ok {
			return dial(ctx)
		}
		if !x.charge.begin() {
			return nil, errClientLeft
		}
		defer x.charge.end()
		c, err := dial(ctx)
		if err == nil && x.conn.isClosed() {
			c.Close()
			return nil, errClientLeft
		}
		return c, err
	}
}
