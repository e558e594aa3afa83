package front

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// fastPath is the way of the usual connection: a tcp listener, or an sni listener; a target that
// is an address; a peer and a client whom tailscaled knows already, or need not know. It goes on a
// loop from event to event, with no goroutine. At the first thing that is not usual it takes the slow path,
// serve, with the bytes that were read: only that asks, explains, retries. PROXY headers and hellos wait here
// until they are whole, those of https listeners too.
type fastPath struct {
	front    *Front
	in       *conn
	down, up *loop.Socket

	header bool  // what is awaited is a PROXY header, or something that is none
	part   *part // nil: nothing has come, or all of it at once

	rule  *plan.Rule
	hello *sni.Hello // nil: none is read
	head  []byte
	began time.Time // the dial
}

// A part is a PROXY header or a hello that has not come whole.
type part struct {
	head     []byte        // what has come
	listener *sni.Listener // to a hello
}

const (
	fastHello = 16 << 10 // bytes; what does not fit takes the slow path
	// fastDial is how long a connect may take here: whatever takes longer needs to be retried, or explained.
	fastDial = time.Second

	// waitingCost is what a connection that waits for a hello takes of the machine's memory, kernel included:
	// bytes.
	waitingCost = 8 << 10
	// partBytes is how many bytes of PROXY headers and hellos that are not whole may wait in all.
	partBytes = 16 << 20
)

// mostWaiting is how many connections may wait for a hello: they get an eighth of the machine's memory.
func mostWaiting() int64 {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return math.MaxInt64
	}
	return int64(uint64(i.Totalram) * uint64(i.Unit) / 8 / waitingCost)
}

var hellos = sync.Pool{New: func() any { return new([fastHello]byte) }}

// takeFastPath takes in, if it may go the fast path. On http listeners a goroutine waits for requests anyhow.
func (f *Front) takeFastPath(in *conn, down accepted) bool {
	if in.service.Mode == "http" {
		return false
	}
	x := &fastPath{front: f, in: in, down: down, header: in.service.Trust != nil}
	in.asker = in.newAsker()
	in.asker.onLoop = true
	if x.header {
		if err := in.meet(); err != nil {
			x.reject(err, nil)
			return true
		}
	} else if in.service.Mode == "tcp" {
		x.decide(nil, nil, nil, false)
		return true
	}
	in.stopCancel = context.AfterFunc(f.ctx, x.down.Expire)
	in.lease.Yield(x.giveWay)
	if int64(f.limiter.Yielding()) > f.mostWaiting.Load() {
		f.limiter.TakeOldest()
	}
	if x.await() == nil {
		return true
	}
	in.lease.Keep()
	return false
}

// takeSlowPath goes on by the slow path, after what was read.
func (x *fastPath) takeSlowPath(head []byte) {
	if x.up != nil {
		x.up.Close()
	}
	go x.front.slowPath(x.in, x.down, bytes.Clone(head))
}

func (x *fastPath) await() error {
	left := x.in.timeForHello()
	if x.header {
		left = max(1, x.in.service.Limits.HelloTimeout-time.Since(x.in.accepted))
	}
	return x.down.AwaitBytes(left, x.read)
}

func (x *fastPath) read(timedOut bool) {
	if x.front.ctx.Err() != nil {
		x.refuse(shutdown, x.front.ctx.Err())
		return
	}
	buf := hellos.Get().(*[fastHello]byte)
	defer hellos.Put(buf)
	for {
		n, err := unix.Read(x.down.FD(), buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			switch {
			case timedOut && x.header: // and not because a busy loop comes late to what has arrived
				x.reject(proxyheader.ErrTimeout, nil)
				return
			case timedOut:
				x.refuse(helloTimeout, sni.ErrTimeout)
				return
			case !x.in.lease.Yields(): // its place was wanted while it had the loop
				x.refuse(helloDisplaced, errDisplaced)
				return
			case x.await() == nil:
				return
			}
			x.in.lease.Keep()
			x.takeSlowPath(x.forgetPart())
			return
		case err != nil:
			err = os.NewSyscallError("read", err)
		case n == 0:
			err = io.EOF
		}
		header := x.header
		if !x.take(buf[:max(n, 0)], err, n == len(buf)) {
			return
		} // else on, until the socket says that there is no more, or an end
		timedOut = timedOut && x.header == header // a hello has time of its own
	}
}

// take goes on with b, which has just been read, or without any more, for ended. full says that there may be
// yet more to be read at once. It is true while more is awaited.
func (x *fastPath) take(b []byte, ended error, full bool) bool {
	if x.header {
		head := b
		if x.part != nil {
			head = x.keep(b)
		}
		h, n, err := proxyheader.Parse(head, x.in.service.Limits.HelloBytes)
		if err == proxyheader.ErrIncomplete {
			if ended == nil {
				if x.part == nil {
					x.keep(b)
				}
				return true
			}
			err = proxyheader.Ended(head, ended)
		}
		x.in.lease.Keep()
		x.forgetPart()
		if err == nil {
			err = x.in.hear(h)
		}
		if err != nil {
			x.reject(err, head)
			return false
		}
		b, x.header = head[n:], false
		if x.in.service.Mode == "tcp" {
			x.decide(b, nil, nil, full)
			return false
		}
		x.in.lease.Yield(x.giveWay)
		if len(b) == 0 {
			return true
		}
	}
	head, hello, err := x.hearHello(b)
	if err == sni.ErrIncomplete && ended == nil {
		return true
	}
	x.in.lease.Keep()
	x.forgetPart()
	x.decide(head, &hello, err, full)
	return false
}

// hearHello reads the hello in what has come. head is all of that; it is b, or kept.
func (x *fastPath) hearHello(b []byte) (head []byte, hello sni.Hello, err error) {
	if x.part == nil {
		hello, err = sni.Parse(b)
		if err != sni.ErrIncomplete || len(b) == 0 {
			return b, hello, err
		}
	}
	head = x.keep(b)
	if x.part.listener == nil {
		x.part.listener = sni.NewListener(x.in.service.Limits.HelloBytes)
	}
	hello, err = x.part.listener.Hear(head)
	return head, hello, err
}

// keep keeps b until there is more, and returns all that is kept. Where that of all connections takes too
// much, the oldest of them go.
func (x *fastPath) keep(b []byte) []byte {
	if x.part == nil {
		x.part = new(part)
	}
	x.part.head = append(x.part.head, b...)
	for x.front.partBytes.Add(int64(len(b))) > partBytes && x.front.limiter.TakeOldest() {
		b = nil
	}
	return x.part.head
}

// forgetPart counts what has come no more, and returns it.
func (x *fastPath) forgetPart() (head []byte) {
	if x.part != nil {
		head = x.part.head
		x.front.partBytes.Add(-int64(len(head)))
		x.part = nil
	}
	return head
}

// giveWay ends the wait for the PROXY header or the hello, unless it has just ended.
func (x *fastPath) giveWay() {
	if x.down.Cancel() {
		x.refuse(helloDisplaced, errDisplaced)
	}
}

// refuse ends a connection that has said nothing to the end: there is no one to be told.
func (x *fastPath) refuse(reason string, err error) {
	x.forgetPart()
	x.in.id = cmp.Or(x.in.id, flow.NewID())
	x.front.helloRefused(x.in, "", reason, err)
	x.down.Reset()
	x.in.release()
}

// reject ends a connection that may not come in, as refuseConn does. Where tailscaled must be asked before
// that can be said, it takes the slow path, after head.
func (x *fastPath) reject(err error, head []byte) {
	x.forgetPart()
	if x.in.asker.mustAsk {
		x.takeSlowPath(head)
		return
	}
	x.front.connRefused(x.in, err)
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
	case err != nil, !r.IsPlain():
		x.takeSlowPath(head)
	default:
		x.hello = hello
		x.dial(r, head)
	}
}

// dial goes on to r's target with head, which is not kept.
func (x *fastPath) dial(r *plan.Rule, head []byte) {
	x.rule, x.began = r, time.Now()
	fd, connected, err := dial.Begin(r.Literal)
	if err != nil {
		x.tellSelf(err)
		x.takeSlowPath(head)
		return
	}
	x.up = x.down.Loop().NewSocket(fd)
	x.head = head
	if connected {
		x.relay()
		return
	}
	x.head = bytes.Clone(head)
	if x.up.AwaitConnect(fastDial, x.connected) != nil {
		x.takeSlowPath(x.head)
	}
}

func (x *fastPath) connected(timedOut bool) {
	connected, err := dial.Connected(x.up.FD(), x.rule.Literal)
	switch {
	case err == nil && connected:
		x.relay()
	case err == nil && !timedOut && x.up.AwaitConnect(fastDial-time.Since(x.began), x.connected) == nil:
	default:
		x.tellSelf(err)
		x.takeSlowPath(x.head)
	}
}

// tellSelf tells what the slow path, which dials anew, may never see.
func (x *fastPath) tellSelf(err error) {
	if errors.Is(err, dial.ErrSelf) { // not on the loop: a log may be slow
		go x.front.limited.Warn("self "+x.rule.Written, "a socket was connected to itself instead of to the target: connecting again",
			"listener", x.in.listener.name, "route", x.rule.Name, "target", x.rule.Written, "err", err)
	}
}

func (x *fastPath) relay() {
	f, in := x.front, x.in
	in.stopCancel()
	f.metrics.DialTime.Observe(time.Since(x.began).Seconds())
	f.targets.tried(x.rule.Written, nil)
	if in.id == "" {
		in.id = flow.NewID()
	}
	var rtt [2]time.Duration
	if f.log.Enabled(f.ctx, slog.LevelInfo) { // only the log wants it
		rtt = [2]time.Duration{tcpsock.RoundTrip(x.down.FD()), tcpsock.RoundTrip(x.up.FD())}
	}
	if x.rule.SendProxy && !in.local.IsValid() {
		in.local = tcpsock.Local(x.down.FD())
	}
	o, done := f.begin(in, x.rule, x.hello, x.rule.Literal.String(), rtt)
	o.Head = x.head
	f.opts.Relay.RunSockets(f.ctx, x.down, x.up, o, done)
}
