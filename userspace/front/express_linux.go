package front

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// express is the short way of the usual connection: a tcp listener, or an sni listener; a target that is an
// address. It goes on the relay's loop from event to event, with no goroutine. At the first thing that is not
// usual it takes the long way, serve, with the bytes that were read: only that refuses, explains, retries.
// Hellos wait here until they are whole, those of https listeners too.
type express struct {
	front    *Front
	in       *inbound
	down, up *relay.Socket

	part *partHello // nil: nothing has come, or all of it at once

	rule  *rule
	hello *sni.Hello // nil: none is read
	head  []byte
	began time.Time // the dial
}

// A partHello is a hello that has not come whole.
type partHello struct {
	head     []byte // what has come
	listener *sni.Listener
}

const (
	expressHello = 16 << 10 // bytes; what does not fit takes the long way
	// expressDial is how long a connect may take here: whatever takes longer needs to be retried, or explained.
	expressDial = time.Second

	// waitingCost is what a connection that waits for a hello takes of the machine's memory, kernel included:
	// bytes.
	waitingCost = 8 << 10
	// partBytes is how many bytes of hellos that are not whole may wait in all.
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

var hellos = sync.Pool{New: func() any { return new([expressHello]byte) }}

// express takes in, if it may go the short way.
func (f *Front) express(in *inbound, c newcomer) bool {
	s := in.service
	if s.trust != nil {
		return false
	}
	x := &express{front: f, in: in, down: c.(*relay.Socket)}
	switch {
	case s.mode == "sni", s.mode == "https":
		in.uncut = context.AfterFunc(f.ctx, x.down.Expire)
		in.lease.Yield(x.giveWay)
		if int64(f.limiter.Yielding()) > f.mostWaiting.Load() {
			f.limiter.TakeOldest()
		}
		if x.await() == nil {
			return true
		}
		in.lease.Keep()
	case s.mode == "tcp" && s.allow == nil && s.fallback != nil && s.fallback.plain():
		x.dial(s.fallback, nil)
		return true
	}
	return false
}

// detour goes the long way, after what was read.
func (x *express) detour(head []byte) {
	if x.up != nil {
		x.up.Close()
	}
	x.in.ahead, x.in.late = bytes.Clone(head), true
	go x.front.enter(x.in, x.down)
}

func (x *express) await() error {
	return x.down.AwaitBytes(max(1, x.in.service.helloTimeout()-time.Since(x.in.accepted)), x.readHello)
}

func (x *express) readHello(timedOut bool) {
	if x.front.ctx.Err() != nil {
		x.refuse(shutdown, x.front.ctx.Err())
		return
	}
	buf := hellos.Get().(*[expressHello]byte)
	defer hellos.Put(buf)
	for {
		n, err := unix.Read(x.down.FD(), buf[:])
		if err == unix.EAGAIN {
			switch {
			case timedOut: // and not because a busy loop comes late to what has arrived
				x.refuse(helloTimeout, sni.ErrTimeout)
				return
			case !x.in.lease.Yields(): // its place was wanted while it had the loop
				x.refuse(helloDisplaced, errDisplaced)
				return
			case x.await() == nil:
				return
			}
		}
		head, hello, perr := x.hear(buf[:max(n, 0)])
		if n > 0 && perr == sni.ErrIncomplete {
			continue // until the socket says that there is no more, or an end
		}
		x.in.lease.Keep()
		x.forgetPart()
		x.decide(head, hello, perr, n == len(buf))
		return
	}
}

// hear goes on with b. Where all hellos take too much, the oldest go. head is all that has come; it is b, or
// kept.
func (x *express) hear(b []byte) (head []byte, hello sni.Hello, err error) {
	limit := x.in.service.limits.HelloBytes
	if x.part == nil {
		hello, err = sni.Parse(b)
		if err != sni.ErrIncomplete || len(b) == 0 {
			return b, hello, err
		}
		x.part = &partHello{listener: sni.NewListener(limit)}
	}
	x.part.head = append(x.part.head, b...)
	for x.front.partBytes.Add(int64(len(b))) > partBytes && x.front.limiter.TakeOldest() {
		b = nil
	}
	hello, err = x.part.listener.Hear(x.part.head)
	return x.part.head, hello, err
}

// forgetPart counts what has come no more.
func (x *express) forgetPart() {
	if x.part != nil {
		x.front.partBytes.Add(-int64(len(x.part.head)))
		x.part = nil
	}
}

// giveWay ends the wait for the hello, unless it has just ended.
func (x *express) giveWay() {
	if x.down.Cancel() {
		x.refuse(helloDisplaced, errDisplaced)
	}
}

// refuse ends a connection that has said nothing to the end: there is no one to be told.
func (x *express) refuse(reason string, err error) {
	x.forgetPart()
	x.in.id = cmp.Or(x.in.id, flow.NewID())
	x.front.helloRefused(x.in, "", reason, err)
	x.down.Reset()
	x.in.release()
}

// decide goes on with what was read: hello, or err. more: there may be yet more to be read at once.
func (x *express) decide(head []byte, hello sni.Hello, err error, more bool) {
	s := x.in.service
	if err != nil || len(head) > s.limits.HelloBytes || more || s.mode != "sni" || s.allow != nil {
		x.detour(head)
		return
	}
	x.hello = &hello
	r, ok := s.names.Lookup(hello.ServerName, func(r *rule) bool { return r.accepts(hello.ALPN) })
	if !ok || !r.plain() {
		x.detour(head)
		return
	}
	x.in.name = hello.ServerName
	x.dial(r, head)
}

// plain says that r needs nothing but to be dialled.
func (r *rule) plain() bool {
	return r.literal.IsValid() && !r.transparent && r.allow == nil
}

// dial goes on to r's target with head, which is not kept.
func (x *express) dial(r *rule, head []byte) {
	x.rule, x.began = r, time.Now()
	fd, connected, err := dial.Begin(r.literal)
	if err != nil {
		x.complain(err)
		x.detour(head)
		return
	}
	x.up = relay.NewSocket(fd, x.down)
	x.head = head
	if connected {
		x.relay()
		return
	}
	x.head = bytes.Clone(head)
	if x.up.AwaitConnect(expressDial, x.connected) != nil {
		x.detour(x.head)
	}
}

func (x *express) connected(timedOut bool) {
	connected, err := dial.Connected(x.up.FD(), x.rule.literal)
	switch {
	case err == nil && connected:
		x.relay()
	case err == nil && !timedOut && x.up.AwaitConnect(expressDial-time.Since(x.began), x.connected) == nil:
	default:
		x.complain(err)
		x.detour(x.head)
	}
}

// complain tells what the long way, which dials anew, may never see.
func (x *express) complain(err error) {
	if errors.Is(err, dial.ErrSelf) { // not on the loop: a log may be slow
		go x.front.complain.Warn("self "+x.rule.written, "a connection to the target was made with itself, and is made again",
			"listener", x.in.listener.name, "route", x.rule.name, "target", x.rule.written, "err", err)
	}
}

func (x *express) relay() {
	f, in := x.front, x.in
	in.uncut()
	f.metrics.DialTime.Observe(time.Since(x.began).Seconds())
	in.id = flow.NewID()
	var rtt [2]time.Duration
	if f.log.Enabled(f.ctx, slog.LevelInfo) { // only the log wants it
		rtt = [2]time.Duration{roundTripFD(x.down.FD()), roundTripFD(x.up.FD())}
	}
	if x.rule.sendProxy {
		if local, err := unix.Getsockname(x.down.FD()); err == nil {
			in.local = sockaddrPort(local)
		}
	}
	o, done := f.begin(in, x.rule, x.hello, x.rule.literal.String(), rtt)
	o.Head = x.head
	relay.RunSockets(f.ctx, x.down, x.up, o, done)
}
