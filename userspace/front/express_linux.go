package front

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// express is the short way of the usual connection: a tcp listener, or an sni listener and the hello whole in one read; a target that is an address.
// It goes on the relay's loop from event to event, with no goroutine. At the first thing that is not usual it takes the
// long way, serve, with the bytes that were read: only that refuses, explains, retries.
type express struct {
	front    *Front
	in       *inbound
	down, up *relay.Socket

	rule  *rule
	hello *sni.Hello // nil: none is read
	head  []byte
	began time.Time // the dial
}

const (
	expressHello = 16 << 10 // bytes; what does not fit takes the long way
	// expressDial is how long a connect may take here: whatever takes longer needs to be retried, or explained.
	expressDial = time.Second
)

var hellos = sync.Pool{New: func() any { return new([expressHello]byte) }}

// express takes in, if it may go the short way.
func (f *Front) express(in *inbound, c newcomer) bool {
	s := in.service
	if s.trust != nil || s.allow != nil {
		return false
	}
	x := &express{front: f, in: in, down: c.(*relay.Socket)}
	switch {
	case s.mode == "sni" && s.limits.HelloTimeout > 0:
		in.uncut = context.AfterFunc(f.ctx, x.down.Expire)
		return x.down.AwaitBytes(s.limits.HelloTimeout, x.readHello) == nil
	case s.mode == "tcp" && s.fallback != nil && s.fallback.plain():
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
	x.in.ahead, x.in.waited = bytes.Clone(head), time.Since(x.in.accepted)
	go x.front.enter(x.in, x.down)
}

func (x *express) readHello(timedOut bool) {
	if timedOut {
		x.detour(nil)
		return
	}
	buf := hellos.Get().(*[expressHello]byte)
	defer hellos.Put(buf)
	n, err := unix.Read(x.down.FD(), buf[:])
	if err != nil {
		n = 0
	}
	head, limits := buf[:n], x.in.service.limits
	hello, err := sni.Parse(head)
	if err != nil || n > limits.HelloBytes || n == len(buf) {
		x.detour(head)
		return
	}
	x.hello = &hello
	r, ok := x.in.service.names.Lookup(hello.ServerName, func(r *rule) bool { return r.accepts(hello.ALPN) })
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
