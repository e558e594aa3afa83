package relaytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// Hands are where a flow is when an order of its ends begins: with a loop, with pumps, parked, in a kernel
// datapath. What the order brings may make it change hands again.
type Hands struct {
	Name string
	Path Path // with Connect

	// Take brings the flow there. It may send bytes both ways, so many in all, and has read all of them when
	// it returns.
	Take func(t testing.TB, f *Flow, moved *relay.Counters) (up, down int64)

	// Rest, when not nil, waits until the flow is there again, after a step of the order: as far as it can be
	// while nothing comes from end, and anything from the other one.
	Rest func(t testing.TB, f *Flow, moved *relay.Counters, end net.Conn)

	// Fast: the ends have the windows of Path, since small ones let too little through for Take, or for that
	// network.
	Fast bool

	// Usual: the relay's sockets have the buffers that the kernel gives them, where a program runs.
	Usual bool

	// Most, when not 0, is how many programs may run at once.
	Most int

	// Alone: its flows are told apart by what the datapath counts, so that no two may live at once.
	Alone bool
}

// The bytes of a burst, for ends with small windows and the buffers that runPair gives the relay: few fit
// into the send buffer towards a reader that has stopped, and many do not, but are all acknowledged.
const (
	few  = 45_000
	many = 125_000
)

// SmallWindow is the receive buffer of an end, in bytes.
const SmallWindow = 16 << 10

// A pair is an order of ends, resets and bursts that comes to a flow in certain hands. a is the end that acts
// first.
type pair struct {
	t     *testing.T
	hands Hands
	f     *Flow
	moved relay.Counters
	a, b  net.Conn
	sent  [2]int64 // bytes up and down
}

// An order says what TCP promises the two ends when nobody is between them: what was sent before a proper end
// arrives, and then the end; what was acknowledged before a reset arrives where somebody reads, and then the
// reset.
type order struct {
	name string
	end  string // of the flow: "eof", "a" or "b" for a reset by that one, "" for any reset
	// most: what was sent need not have been moved, since who was to read it is gone.
	most bool
	slow bool // it takes its time, and hits no moment
	run  func(x *pair)
}

func orders() []order {
	return []order{
		{name: "nothing, both end", end: "eof", run: func(x *pair) {
			x.finish(x.a, x.b)
			x.wantEOF(x.a, x.b)
		}},
		{name: "end, burst, end, and then it is read", end: "eof", run: func(x *pair) {
			x.halfClose(x.a)
			x.rest(x.a)
			s := x.burst(x.b, few, true)
			x.over()
			s.readToEnd()
		}},
		{name: "end, long burst, end", end: "eof", run: func(x *pair) {
			x.halfClose(x.a)
			x.burst(x.b, many, true).readToEnd()
		}},
		{name: "burst and end of both at once, and then it is read", end: "eof", run: func(x *pair) {
			s, r := x.bursts(few)
			x.over()
			s.readToEnd()
			r.readToEnd()
		}},
		{name: "long burst and end of both at once", end: "eof", run: func(x *pair) {
			s, r := x.bursts(many)
			s.readToEnd()
			r.readToEnd()
		}},
		{name: "burst and end, answer and end", end: "eof", run: func(x *pair) {
			s := x.burst(x.a, many, true)
			x.rest(x.b)
			s.readToEnd()
			x.rest(x.a)
			x.burst(x.b, many, true).readToEnd()
		}},
		{name: "end while the other way is full", end: "eof", run: func(x *pair) {
			s := x.burst(x.b, many, false)
			x.rest(x.a)
			x.halfClose(x.a)
			x.finish(x.b)
			s.readToEnd()
		}},
		{name: "reset", end: "a", run: func(x *pair) {
			abort(x.a)
			x.wantReset(x.b)
		}},
		{name: "both reset", run: func(x *pair) {
			abort(x.a)
			abort(x.b)
		}},
		{name: "burst, reset", end: "a", run: func(x *pair) {
			s := x.burst(x.a, few, false)
			abort(x.a)
			s.readToReset()
		}},
		{name: "long burst, reset", end: "a", run: func(x *pair) {
			s := x.burst(x.a, many, false)
			x.rest(x.b)
			abort(x.a)
			s.readToReset()
		}},
		{name: "long burst, reset, and it is read slowly", end: "a", slow: true, run: func(x *pair) {
			s := x.burst(x.a, many, false)
			abort(x.a)
			const steps = 6 // for longer than a reader may stop
			s.n /= steps
			for range steps {
				time.Sleep(500 * time.Millisecond)
				s.read()
			}
			s.n = many % steps
			s.readToReset()
		}},
		{name: "burst around an urgent byte, reset", end: "a", most: true, run: func(x *pair) {
			s := x.send(x.a, many, false)
			s.wait()
			x.must(sendUrgent(x.a, '!'))
			out := newStream()
			in := *out
			x.must(out.send(x.a, few))
			s.acked()
			abort(x.a)
			s.read()
			x.must(in.receiveAround(x.b, '!', few))
			x.wantReset(x.b)
		}},
		{name: "burst, end, and then a reset", end: "a", run: func(x *pair) {
			x.send(x.a, few, true).readToEnd()
			x.rest(x.b)
			abort(x.a)
			x.wantBroken(x.b)
		}},
		{name: "long burst and end, with a reset behind", end: "a", run: func(x *pair) {
			s := x.burst(x.a, many, true)
			x.rest(x.b)
			abort(x.a)
			s.readToEnd()
			x.wantBroken(x.b)
		}},
		{name: "end, long burst and reset by the other", end: "b", run: func(x *pair) {
			x.halfClose(x.a)
			x.rest(x.a)
			s := x.burst(x.b, many, false)
			abort(x.b)
			s.readToReset()
		}},
		{name: "end, long burst, end, and a reset that has no effect any more", end: "eof",
			run: func(x *pair) {
				x.halfClose(x.a)
				s := x.burst(x.b, many, true)
				abort(x.b)
				s.readToEnd()
			}},
		{name: "long burst and end, which the other resets", end: "b", most: true, run: func(x *pair) {
			x.burst(x.a, many, true)
			abort(x.b)
			x.wantBroken(x.a)
		}},
		{name: "burst, reset while the other sends", end: "a", most: true, run: func(x *pair) {
			x.flood(x.b)
			s := x.burst(x.a, few, false)
			abort(x.a)
			s.read()
			x.wantOver(x.b)
		}},
		{name: "upload that is answered early", end: "b", most: true, run: func(x *pair) {
			x.rest(x.a)
			x.flood(x.a)
			x.must(waitReadable(x.b))
			s := x.send(x.b, 1000, false)
			s.wait()
			x.b.Close() // which is a reset, with bytes unread
			s.read()
			x.wantOver(x.a)
		}},
		{name: "reset while the reader has stopped", end: "a", most: true, run: func(x *pair) {
			fill(x.a, newStream())
			x.rest(x.b)
			abort(x.a)
			x.wantBroken(x.b)
		}},
		{name: "close with bytes unread", end: "a", most: true, run: func(x *pair) {
			x.burst(x.b, few, false)
			x.must(waitReadable(x.a))
			x.a.Close()
			x.wantBroken(x.b)
		}},
	}
}

// RunPairs runs every order for every hands, with the client as the one that acts first and with the server.
func RunPairs(t *testing.T, hands []Hands) {
	for _, h := range hands {
		t.Run(h.Name, func(t *testing.T) {
			before := take(h.Path)
			t.Run("orders", func(t *testing.T) { eachPair(t, h, orders(), !h.Alone) })
			before.check(t, h.Path)
		})
	}
}

// eachPair runs every order for h, all of them at once or one after the other.
func eachPair(t *testing.T, h Hands, orders []order, atOnce bool) {
	for _, o := range orders {
		for _, first := range []string{"client", "server"} {
			t.Run(o.name+"/"+first, func(t *testing.T) {
				if atOnce {
					t.Parallel()
				}
				runPair(t, h, o, first == "client")
			})
		}
	}
}

func runPair(t *testing.T, h Hands, o order, clientFirst bool) {
	x := &pair{t: t, hands: h, f: h.Path.Connect(t)}
	defer x.f.Client.Close()
	defer x.f.Server.Close()
	if !h.Fast {
		for _, c := range []net.Conn{x.f.Client, x.f.Server} {
			must(t, c.(*net.TCPConn).SetReadBuffer(SmallWindow))
		}
	}
	for _, c := range []net.Conn{x.f.Down, x.f.Up} {
		// The kernel takes twice as much.
		must(t, errors.Join(c.(*net.TCPConn).SetReadBuffer(128<<10), c.(*net.TCPConn).SetWriteBuffer(48<<10)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // so that a failure leaves nothing
	x.f.Start(ctx, relay.Options{Counters: &x.moved})
	x.sent[0], x.sent[1] = h.Take(t, x.f, &x.moved)
	ends := map[string]relay.End{
		"eof": relay.EndEOF,
		"a":   relay.EndUpstreamReset,
		"b":   relay.EndDownstreamReset,
	}
	x.a, x.b = x.f.Server, x.f.Client
	if clientFirst {
		x.a, x.b = x.b, x.a
		ends["a"], ends["b"] = ends["b"], ends["a"]
	}
	o.run(x)
	r := x.over()
	reset := r.End == relay.EndDownstreamReset || r.End == relay.EndUpstreamReset
	if want := ends[o.end]; r.End != want && !(o.end == "" && reset) {
		t.Errorf("the flow ended as %q, want %q: %+v", r.End, want, r)
	}
	up, down := x.moved.Load()
	if r.Up != up || r.Down != down {
		t.Errorf("the result has %d bytes up and %d down, the counters %d and %d", r.Up, r.Down, up, down)
	}
	if !o.most && (up != x.sent[0] || down != x.sent[1]) {
		t.Errorf("%d bytes up and %d down were moved, of %d and %d", up, down, x.sent[0], x.sent[1])
	}
}

func (x *pair) must(err error) {
	x.t.Helper()
	must(x.t, err)
}

func (x *pair) other(c net.Conn) net.Conn {
	if c == x.a {
		return x.b
	}
	return x.a
}

// rest lets the flow come to rest, with nothing to come from end.
func (x *pair) rest(end net.Conn) {
	if x.hands.Rest != nil {
		x.hands.Rest(x.t, x.f, &x.moved, end)
	}
}

// over waits for the end of the flow.
func (x *pair) over() relay.Result {
	x.t.Helper()
	return x.f.Result(x.t)
}

// A burst is on its way from one end to the other.
type burst struct {
	x        *pair
	from, to net.Conn
	in       stream
	n        int64
	sent     chan error
}

// send begins to send n bytes, and the end of the stream.
func (x *pair) send(from net.Conn, n int64, end bool) *burst {
	out := newStream()
	s := &burst{x: x, from: from, to: x.other(from), in: *out, n: n, sent: make(chan error, 1)}
	way := 0
	if from == x.f.Server {
		way = 1
	}
	x.sent[way] += n
	go func() {
		err := out.send(from, n)
		if end && err == nil {
			err = closeWrite(from)
		}
		s.sent <- err
	}()
	return s
}

// burst is send, and waits until the path has acknowledged all of it, the end too.
func (x *pair) burst(from net.Conn, n int64, end bool) *burst {
	x.t.Helper()
	s := x.send(from, n, end)
	s.acked()
	return s
}

// bursts is burst for both ends at once, with the end of both streams.
func (x *pair) bursts(n int64) (a, b *burst) {
	x.t.Helper()
	a, b = x.send(x.a, n, true), x.send(x.b, n, true)
	a.acked()
	b.acked()
	return a, b
}

// wait waits until the kernel has all of it.
func (s *burst) wait() {
	s.x.t.Helper()
	err := <-s.sent
	s.sent <- err
	s.x.must(err)
}

// acked waits until the path has acknowledged all of it, the end too.
func (s *burst) acked() {
	s.x.t.Helper()
	s.wait()
	s.x.must(waitAcked(s.from))
}

// read wants all of it at the other end.
func (s *burst) read() {
	s.x.t.Helper()
	s.x.must(s.in.receive(s.to, s.n))
}

// readToEnd wants all of it at the other end, and then the end of the stream.
func (s *burst) readToEnd() {
	s.x.t.Helper()
	s.read()
	s.x.wantEOF(s.to)
}

// readToReset wants all of it at the other end, and then a reset.
func (s *burst) readToReset() {
	s.x.t.Helper()
	s.read()
	s.x.wantReset(s.to)
}

// flood sends without end.
func (x *pair) flood(from net.Conn) {
	go newStream().send(from, 1<<40)
}

func (x *pair) finish(ends ...net.Conn) {
	x.t.Helper()
	for _, c := range ends {
		x.must(closeWrite(c))
	}
}

// halfClose ends the stream of end, which the other end is told.
func (x *pair) halfClose(end net.Conn) {
	x.t.Helper()
	x.finish(end)
	x.wantEOF(x.other(end))
}

func (x *pair) wantEOF(ends ...net.Conn) {
	x.t.Helper()
	for _, c := range ends {
		x.must(wantEOF(c))
	}
}

func (x *pair) wantReset(c net.Conn) {
	x.t.Helper()
	wantReset(x.t, x.hands.Path, c)
}

func (x *pair) wantBroken(c net.Conn) {
	x.t.Helper()
	x.must(waitBroken(x.hands.Path, c))
}

// wantOver wants a reset and nothing before it at an end that sends: its sender may have been told, and to
// the reader it looks like the end of the stream then.
func (x *pair) wantOver(c net.Conn) {
	x.t.Helper()
	c.SetReadDeadline(time.Now().Add(x.hands.Path.resetIn(patience)))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF && !saysReset(err) {
		x.t.Errorf("instead of a reset: %d bytes, %v", n, err)
	}
}

// waitReadable waits until bytes have come to c.
func waitReadable(c net.Conn) error {
	n := 0
	for p := (poll{}); p.again(patience); {
		if err := onSocket(c, func(fd int) (err error) {
			n, _, err = unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			return err
		}); err != nil && err != unix.EAGAIN {
			return err
		}
		if n > 0 {
			return nil
		}
	}
	return fmt.Errorf("no bytes come")
}
