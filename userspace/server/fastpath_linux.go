package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// fastPath is the way of the usual connection: a tcp listener, or an sni listener; a target that is an
// address; a peer and a client whom tailscaled knows already, or need not know. It goes on a loop from event
// to event, with no goroutine, and the relay gets it with an upstream that may still be connecting. At the
// first thing that is not usual it takes the slow path, serve, with the bytes that were read: only that asks,
// explains, retries. PROXY headers and hellos wait here until they are whole, those of https listeners too.
type fastPath struct {
	server  *Server
	in      *conn
	down    *loop.Socket
	stage   stage
	partial *partial // nil: nothing has come, or all of it at once

	isOver atomic.Bool // somebody wants its place, since it yielded last, or the daemon ends
}

// A stage is what a connection on the fast path waits for.
//
//	awaitsHeader -> awaitsHello   a PROXY header is whole, or it was none
//	either       -> decided       the relay, the slow path or nobody has the connection
type stage uint8

const (
	awaitsHeader stage = iota
	awaitsHello
	decided
)

// A partial is a PROXY header or a hello that has not come whole.
type partial struct {
	head     []byte        // what has come
	listener *sni.Listener // to a hello
}

const (
	fastHello = 16 << 10 // bytes; what does not fit takes the slow path
	// fastDial is how long a connect may take here: whatever takes longer needs to be retried, or explained.
	fastDial = time.Second

	// partialBytes is how many bytes of PROXY headers and hellos that are not whole may wait in all.
	partialBytes = 16 << 20
)

var hellos = sync.Pool{New: func() any { return new([fastHello]byte) }}

// admit takes in what was accepted, and starts serving it, or returns how it waits for its first bytes. It
// blocks on nothing, and is called for any number of connections at the same time: one over the limit costs
// no more than to be closed.
func (srv *Server) admit(l *listener, down *loop.Socket, peer netip.AddrPort) (first loop.Wait) {
	in := srv.takeIn(l, down, peer)
	if in == nil {
		return first
	}
	x := &fastPath{server: srv, in: in, down: down, stage: awaitsHello}
	if in.service.Mode == "http" { // a goroutine waits for requests anyhow
		x.takeSlowPath(nil)
		return first
	}
	in.asker = in.newAsker()
	in.asker.onLoop = true
	if in.service.Trust != nil {
		x.stage = awaitsHeader
		if err := in.meet(); err != nil {
			x.reject(err, nil)
			return first
		}
	} else if in.service.Mode == "tcp" {
		x.decide(nil, nil, nil, false)
		return first
	}
	in.stopCancel = context.AfterFunc(srv.ctx, func() {
		x.isOver.Store(true)
		down.Expire()
	})
	in.lease.Yield(x.giveWay)
	if int64(srv.limiter.Yielding()) > srv.mostWaiting.Load() {
		srv.limiter.TakeOldest()
	}
	return x.wait()
}

// wait is how x waits: read is called when more has come, or has not in time.
func (x *fastPath) wait() loop.Wait {
	return loop.Wait{Timeout: x.timeLeft(), Ready: x.read, IsOver: &x.isOver}
}

// takeSlowPath goes on by the slow path, after what was read.
func (x *fastPath) takeSlowPath(head []byte) {
	x.stage = decided
	go x.server.slowPath(x.in, x.down, bytes.Clone(head))
}

// timeLeft is what the connection has for what it waits for.
func (x *fastPath) timeLeft() time.Duration {
	if x.stage == awaitsHeader {
		return max(1, x.in.service.Limits.HelloTimeout-time.Since(x.in.accepted))
	}
	return x.in.timeForHello()
}

// read takes what has come. The loop calls it.
func (x *fastPath) read(timedOut bool) {
	switch {
	case x.server.ctx.Err() != nil:
		x.refuse(shutdown, x.server.ctx.Err())
		return
	case timedOut && x.isOver.Load():
		x.refuse(helloDisplaced, errDisplaced)
		return
	}
	buf := hellos.Get().(*[fastHello]byte)
	defer hellos.Put(buf)
	for x.stage != decided {
		n, err := unix.Read(x.down.FD(), buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			x.readAll(timedOut)
			return
		case err != nil:
			err = os.NewSyscallError("read", err)
		case n == 0:
			err = io.EOF
		}
		stage := x.stage
		x.take(buf[:max(n, 0)], err, n == len(buf)) // on, until the socket says that there is no more
		timedOut = timedOut && x.stage == stage     // a hello has time of its own
	}
}

// readAll goes on where all that has come is read, and more is awaited.
func (x *fastPath) readAll(timedOut bool) {
	switch {
	case timedOut && x.stage == awaitsHeader: // and not because a busy loop comes late to what has arrived
		x.reject(proxyheader.ErrTimeout, nil)
	case timedOut:
		x.refuse(helloTimeout, sni.ErrTimeout)
	case x.down.AwaitBytes(x.wait()) != nil:
		x.in.lease.Keep()
		x.takeSlowPath(x.forgetPartial())
	}
}

// take goes on with b, which has just been read, or without any more, for ended. full says that there may be
// yet more to be read at once.
func (x *fastPath) take(b []byte, ended error, full bool) {
	if x.stage == awaitsHeader {
		b = x.takeHeader(b, ended, full)
	}
	if x.stage != awaitsHello {
		return
	}
	head, hello, err := x.hearHello(b)
	if err == sni.ErrIncomplete && ended == nil {
		return
	}
	x.in.lease.Keep()
	x.forgetPartial()
	x.decide(head, &hello, err, full)
}

// takeHeader is take for the PROXY header, or for what is none. It returns what came behind it.
func (x *fastPath) takeHeader(b []byte, ended error, full bool) []byte {
	head := b
	if x.partial != nil {
		head = x.keep(b)
	}
	h, n, err := proxyheader.Parse(head, x.in.service.Limits.HelloBytes)
	if err == proxyheader.ErrIncomplete {
		if ended == nil {
			if x.partial == nil {
				x.keep(b)
			}
			return nil
		}
		err = proxyheader.Ended(head, ended)
	}
	x.in.lease.Keep()
	x.forgetPartial()
	if err == nil {
		x.in.headerBytes = int64(n)
		err = x.in.hear(h)
	}
	switch {
	case err != nil:
		x.reject(err, head)
	case x.in.service.Mode == "tcp":
		x.decide(head[n:], nil, nil, full)
	default:
		x.stage = awaitsHello
		x.isOver.Store(false)
		if x.server.ctx.Err() != nil { // it may have ended in front of that
			x.isOver.Store(true)
		}
		x.in.lease.Yield(x.giveWay)
	}
	return head[n:]
}

// hearHello reads the hello in what has come. head is all of that; it is b, or kept.
func (x *fastPath) hearHello(b []byte) (head []byte, hello sni.Hello, err error) {
	if x.partial == nil {
		hello, err = sni.Parse(b)
		if err != sni.ErrIncomplete || len(b) == 0 {
			return b, hello, err
		}
	}
	head = x.keep(b)
	if x.partial.listener == nil {
		x.partial.listener = sni.NewListener(x.in.service.Limits.HelloBytes)
	}
	hello, err = x.partial.listener.Hear(head)
	return head, hello, err
}

// keep keeps b until there is more, and returns all that is kept. Where that of all connections takes too
// much, the oldest of them go.
func (x *fastPath) keep(b []byte) []byte {
	if x.partial == nil {
		x.partial = new(partial)
	}
	x.partial.head = append(x.partial.head, b...)
	for x.server.partialBytes.Add(int64(len(b))) > partialBytes && x.server.limiter.TakeOldest() {
		b = nil
	}
	return x.partial.head
}

// forgetPartial counts what has come no more, and returns it.
func (x *fastPath) forgetPartial() (head []byte) {
	if x.partial != nil {
		head = x.partial.head
		x.server.partialBytes.Add(-int64(len(head)))
		x.partial = nil
	}
	return head
}

// giveWay ends the wait for the PROXY header or the hello. Where nobody waits, what is done at that moment
// goes on, and the next wait ends.
func (x *fastPath) giveWay() {
	x.isOver.Store(true)
	if x.down.Cancel() {
		x.refuse(helloDisplaced, errDisplaced)
	}
}

// refuse ends a connection that has said nothing to the end: there is no one to be told.
func (x *fastPath) refuse(reason string, err error) {
	x.stage = decided
	x.forgetPartial()
	x.in.id = cmp.Or(x.in.id, flow.NewID())
	x.server.helloRefused(x.in, "", reason, err)
	x.down.Reset()
	x.in.release()
}

// reject ends a connection that may not come in, as refuseConn does. Where tailscaled must be asked before
// that can be said, it takes the slow path, after head.
func (x *fastPath) reject(err error, head []byte) {
	x.forgetPartial()
	if x.in.asker.mustAsk {
		x.takeSlowPath(head)
		return
	}
	x.stage = decided
	x.server.connRefused(x.in, err)
	x.down.Reset()
	x.in.release()
}

// decide goes on with what was read: hello, nil on a tcp listener, or err. more: there may be yet more to be
// read at once.
func (x *fastPath) decide(head []byte, hello *sni.Hello, err error, more bool) {
	s := x.in.service
	if err != nil || len(head) > s.Limits.HelloBytes || more || s.Mode == "https" {
		x.takeSlowPath(head)
		return
	}
	r, err := x.in.decide(hello)
	switch {
	case err != nil && hello == nil:
		x.reject(err, head)
	case err != nil:
		x.takeSlowPath(head)
	default:
		x.stage = decided // from here on x is the relay's, and may be used on another goroutine
		x.connect(x.in.newCourse(r), hello, head)
	}
}

// connect goes on to the next target of c. Where that is not a plain one, or all were tried, the slow path
// does, which tries the others before those that were. x is decided.
func (x *fastPath) connect(c *course, hello *sni.Hello, head []byte) {
	if next := c.peek(); next != nil && next.IsPlain() && !x.server.disabled.Has(next.Written) &&
		x.server.ctx.Err() == nil {
		x.relay(c, hello, head)
		return
	}
	if c.rule.Several != nil && c.next != nil {
		c.again = len(c.tried)
		x.in.course = c
	}
	go x.server.slowPath(x.in, x.down, bytes.Clone(head))
}

// relay begins to connect to the next target of c, and gives the relay both, with head, which is not kept.
func (x *fastPath) relay(c *course, hello *sni.Hello, head []byte) {
	srv, in, r := x.server, x.in, c.take()
	began := time.Now()
	fail := func(head []byte, err error) { // the slow path dials anew, and may never see why
		if errors.Is(err, dial.ErrSelf) { // not on the loop: a log may be slow
			go srv.limited.Warn("self "+r.Written, "a socket was connected to itself instead of to the target: connecting again",
				"listener", in.listener.name, "route", r.Name, "target", r.Written, "err", err)
		}
		switch {
		case r.Health != nil && err == nil: // slow: the slow path has others beside it
			c.takeBack()
			in.course = c
			go srv.slowPath(in, x.down, bytes.Clone(head))
			return
		case r.Health != nil:
			srv.attemptFailed(in, r, err, time.Since(began))
		}
		x.connect(c, hello, head)
	}
	if in.id == "" {
		in.id = flow.NewID()
	}
	up, err := dial.Begin(r.Literal, r.Written, &srv.targets)
	if err != nil {
		fail(head, err)
		return
	}
	in.stopCancel()
	if r.SendProxy && !in.local.IsValid() {
		in.local = tcpsock.Local(x.down.FD())
	}
	within, check := fastDial, up.Check
	if r.Health != nil {
		check = noting(r.Health, up)
		if len(c.tried) < len(c.rule.Several) {
			within = r.To.HeadStart()
		}
	}
	fl, o, done := srv.begin(in, r, hello, r.Literal.String())
	o.Head = head
	srv.opts.Relay.RunConnecting(srv.ctx, x.down, relay.Connecting{FD: up.FD, Connected: up.Connected, Check: check,
		Within: within, Failed: func(head []byte, err error) {
			if why := o.Counters.Killed(); why != nil {
				x.down.Reset()
				done(relay.Result{End: relay.EndKilled, Err: why, Datapath: userspace})
				return
			}
			srv.flows.Remove(fl)
			fail(head, err)
		}}, o, done)
}

// noting is up.Check, which notes that a target was reached.
func noting(h *balance.Health, up *dial.Attempt) func() (bool, error) {
	if up.Connected {
		h.Worked()
	}
	return func() (connected bool, err error) {
		if connected, err = up.Check(); connected {
			h.Worked()
		}
		return connected, err
	}
}

// attemptFailed notes that r's target has failed with err after it took some time: another one is tried.
func (srv *Server) attemptFailed(in *conn, r *plan.Rule, err error, took time.Duration) {
	failed := r.Dialer.Explain(srv.ctx, r.To, err, took)
	if isAvoided(r, failed) {
		srv.noteFailed(in.listener.name, r, failed)
		go srv.limited.Warn("dial "+r.Written, lostText, lostAttrs(in, r, failed)...) // not on the loop
	}
}
