package front

import (
	"bytes"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/sni"
)

// express is the short way of the usual connection: an sni listener, the hello whole in one read, a target that is an address.
// It goes on the relay's loop from event to event, with no goroutine. At the first thing that is not usual it takes the
// long way, serve, with the bytes that were read: only that refuses, explains, retries.
type express struct {
	front    *Front
	in       *inbound
	down, up *relay.Socket

	rule  *rule
	hello sni.Hello
	head  []byte
	began time.Time // the dial
}

const (
	expressHello = 16 << 10 // bytes; longer hellos take the long way
	// expressDial is how long a connect may take here: whatever takes longer needs to be retried, or explained.
	expressDial = time.Second
)

var hellos = sync.Pool{New: func() any { return new([expressHello]byte) }}

// express takes in, if it may go the short way.
func (f *Front) express(in *inbound) bool {
	if s := in.service; s.mode != "sni" || s.trust != nil || s.allow != nil || s.limits.HelloTimeout <= 0 {
		return false
	}
	down := relay.Detach(in.TCPConn)
	if down == nil {
		return false
	}
	in.TCPConn = nil
	x := &express{front: f, in: in, down: down}
	if down.AwaitBytes(in.service.limits.HelloTimeout, x.readHello) != nil {
		x.detour(nil)
	}
	return true
}

// detour goes the long way, after what was read.
func (x *express) detour(head []byte) {
	in := x.in
	if x.up != nil {
		x.up.Close()
	}
	c, err := x.down.Conn()
	if err != nil {
		x.front.metrics.Refused.WithLabelValues(in.listener.name, "out_of_files").Inc()
		x.front.complain.Warn("out_of_files", "connection closed: out of file descriptors: raise LimitNOFILE= or `ulimit -n`, or lower limits.connections", "err", err)
		in.release()
		return
	}
	in.TCPConn, in.ahead, in.waited = c, bytes.Clone(head), time.Since(in.accepted)
	go x.front.serve(in)
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
	x.hello, err = sni.Parse(head)
	if err != nil || n > limits.HelloBytes {
		x.detour(head)
		return
	}
	r, ok := x.in.service.names.Lookup(x.hello.ServerName, func(r *rule) bool { return r.accepts(x.hello.ALPN) })
	if !ok || !r.literal.IsValid() || r.transparent || r.allow != nil || len(r.datapaths) > 0 {
		x.detour(head)
		return
	}
	x.rule, x.began = r, time.Now()
	fd, connected, err := dial.Begin(r.literal)
	if err != nil {
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
		x.detour(x.head)
	}
}

func (x *express) relay() {
	f, in := x.front, x.in
	f.metrics.DialTime.Observe(time.Since(x.began).Seconds())
	in.id, in.name = flow.NewID(), x.hello.ServerName
	var rtt [2]time.Duration
	if f.log.Enabled(f.ctx, slog.LevelInfo) { // only the log wants it
		rtt = [2]time.Duration{roundTripFD(x.down.FD()), roundTripFD(x.up.FD())}
	}
	o, done := f.begin(in, x.rule, &x.hello, x.rule.literal.String(), rtt)
	o.Head = x.head
	relay.RunSockets(f.ctx, x.down, x.up, o, done)
}
