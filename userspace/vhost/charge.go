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

// resetCost is for how long a request counts at least whose client resets it: who opens and resets streams as
// fast as possible has no more of them, then, than who waits for answers.
const resetCost = time.Second

// endRequest ends what charge began.
func (x *exchange) endRequest() {
	if x.req.ProtoMajor >= 2 && x.req.Context().Err() != nil {
		x.charge.late = resetCost - time.Since(x.started)
	}
	x.charge.end()
}

// refusalWait is how long a client may take to read that it has too many requests under way.
const refusalWait = 5 * time.Second

// lastWait is how long a client with many connections may take for the end of an answer whose handler has
// returned: HTTP/2's server keeps that, some 30 KB a stream, and nothing counts it any more.
const lastWait = 15 * time.Second

// hurry sets that time.
func (x *exchange) hurry() {
	if x.req.ProtoMajor >= 2 && x.conn.info.crowd() == crowdOfMany {
		_ = http.NewResponseController(x.resp).SetWriteDeadline(time.Now().Add(lastWait))
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

// forget lets go of what the client sent. HTTP/2's server keeps the request, and the end of its answer, until
// the client takes that: of streams whose window is empty there may be many, and the header of each takes up
// to Options.HeaderBytes.
func (x *exchange) forget() {
	if r := x.req; r.ProtoMajor >= 2 {
		r.Header, r.URL, r.Host, r.RequestURI = nil, nil, "", ""
	}
}

// charged counts dialling as work on the request that wants the connection: the transport goes on with it
// when the request has ended, as that of a client which opens streams and resets them. What it would begin
// afterwards it doesn't begin at all.
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
		return dial(ctx)
	}
}
