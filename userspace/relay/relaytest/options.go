package relaytest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

func head(t *testing.T, p Path, s Size) {
	for _, size := range []int64{0, 1, 517, 64 << 10} {
		preface := []byte("PROXY and so on\r\n")
		if size == 1 {
			preface = nil
		}
		out := newStream()
		out.pos -= out.pos % int64(len(pattern())) // so that the head is one piece
		in := *out
		head := bytes.Clone(out.next(size))
		out.pos += size

		f := p.Connect(t)
		f.Start(context.Background(), relay.Options{Preface: preface, Head: head})
		got := make([]byte, len(preface))
		_, err := io.ReadFull(f.Server, got)
		must(t, err)
		if !bytes.Equal(got, preface) {
			t.Fatalf("preface: %q", got)
		}
		must(t, out.send(f.Client, 1000))
		must(t, in.receive(f.Server, size+1000))
		must(t, Exchange(f.Client, f.Server, 0, 2000))
		if r := f.Result(t); r.Up != size+1000 || r.Down != 2000 || r.End != relay.EndEOF || r.Err != nil {
			t.Errorf("%+v with a head of %d bytes", r, size)
		}
	}
}

// sentBefore: bytes, and the FIN as well, are in the receive queues before the relay is there.
func sentBefore(t *testing.T, p Path, s Size) {
	for _, n := range []int64{1, 1000, 60_000} {
		for _, fin := range []bool{false, true} {
			f := p.Connect(t)
			out := newStream()
			in := *out
			must(t, out.send(f.Client, n))
			if fin {
				must(t, closeWrite(f.Client))
			}
			f.Start(context.Background(), relay.Options{})
			must(t, in.receive(f.Server, n))
			if !fin {
				must(t, transfer(f.Client, f.Server, 1000))
				must(t, closeWrite(f.Client))
			}
			must(t, wantEOF(f.Server))
			must(t, transferAll(f.Server, f.Client, 1000))
			f.Client.Close()
			f.Server.Close()
		}
	}
}

func result(t *testing.T, p Path, s Size) {
	for _, c := range []struct {
		end relay.End
		how func(f *Flow)
	}{
		{relay.EndEOF, func(f *Flow) { closeWrite(f.Client); wantEOF(f.Server); closeWrite(f.Server) }},
		{relay.EndEOF, func(f *Flow) { closeWrite(f.Server); wantEOF(f.Client); closeWrite(f.Client) }},
		{relay.EndDownstreamReset, func(f *Flow) { abort(f.Client) }},
		{relay.EndUpstreamReset, func(f *Flow) { abort(f.Server) }},
	} {
		f := p.Connect(t)
		f.Start(context.Background(), relay.Options{})
		must(t, transfer(f.Client, f.Server, 12_345))
		must(t, transfer(f.Server, f.Client, 2_345_678))
		c.how(f)
		r := f.Result(t)
		if r.End != c.end || r.Up != 12_345 || r.Down != 2_345_678 ||
			(r.Err == nil) != (r.End == relay.EndEOF) {
			t.Errorf("%+v, and not %s", r, c.end)
		}
		f.Client.Close()
		f.Server.Close()
	}
}

func counters(t *testing.T, p Path, s Size) {
	var c relay.Counters
	f := p.Connect(t)
	f.Start(context.Background(), relay.Options{Counters: &c, Preface: []byte("preface"),
		Head: []byte("head")})
	got := make([]byte, len("prefacehead"))
	_, err := io.ReadFull(f.Server, got)
	must(t, err)
	up, down := int64(len("head")), int64(0)
	for _, n := range []int64{1, 100_000, 3_000_000} {
		must(t, transfer(f.Client, f.Server, n))
		must(t, transfer(f.Server, f.Client, 2*n))
		up, down = up+n, down+2*n
		eventually(t, func() bool {
			u, d := c.Load()
			return u == up && d == down
		}, "counters do not reach %d up, %d down", up, down)
	}
	must(t, Exchange(f.Client, f.Server, 0, 0))
	r := f.Result(t)
	if u, d := c.Load(); u != up || d != down || r.Up != up || r.Down != down {
		t.Errorf("after the end the counters are %d and %d, the result's %d and %d; moved: %d and %d", u, d,
			r.Up, r.Down, up, down)
	}
}

func eventually(t testing.TB, f func() bool, format string, args ...any) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf(format, args...)
		}
	}
}

// bufferBound: with a reader that has stopped, what was taken from one socket and not yet given to the other
// is within the bound, and nothing of it is lost.
func bufferBound(t *testing.T, p Path, s Size) {
	if p.NoReset {
		return // TCP_INFO is what we measure by
	}
	for _, bound := range []int64{4 << 10, 64 << 10, 200 << 10, 1 << 20, relay.DefaultBuffer} {
		for _, role := range []string{"client", "server"} {
			f := p.Connect(t)
			from, to, src, dst := f.Client, f.Server, f.Down, f.Up
			if role == "server" {
				from, to, src, dst = f.Server, f.Client, f.Up, f.Down
			}
			held, closeHeld := watchHeld(t, src, dst)
			f.Start(context.Background(), relay.Options{Buffer: bound})
			out := newStream()
			in := *out
			var n int64
			for range 2 {
				n += fill(from, out)
				if h := held(); h > bound {
					t.Errorf("%d bytes held with a bound of %d, from %s", h, bound, role)
				}
				must(t, in.receive(to, n/2))
				n -= n / 2
			}
			closeHeld()
			must(t, in.receive(to, n))
			must(t, Exchange(f.Client, f.Server, 1000, 1000))
		}
	}
}

// stalledCost: flows whose readers have stopped, both ways, wake nobody. What is allowed is what the process
// does by itself, however many they are.
func stalledCost(t *testing.T, p Path, s Size) {
	var flows []*Flow
	for range s.Stalled {
		f := p.Connect(t)
		for _, c := range []net.Conn{f.Client, f.Down, f.Up, f.Server} {
			// Else they grow to 20 MiB a flow, more than TCP has memory for on a small machine. Where that is
			// short, a flow tries again and again: nobody tells when there is some.
			b := c.(interface {
				SetReadBuffer(int) error
				SetWriteBuffer(int) error
			})
			must(t, errors.Join(b.SetReadBuffer(64<<10), b.SetWriteBuffer(64<<10)))
		}
		f.Start(context.Background(), relay.Options{})
		defer f.Client.Close()
		defer f.Server.Close()
		for _, c := range []net.Conn{f.Client, f.Server} {
			go func() { // until closed
				b := make([]byte, 64<<10)
				for {
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		}
		flows = append(flows, f)
	}
	const span = time.Second
	now := takeEffort()
	// The CPU time says little: a slow machine, or one that others use, makes it longer.
	isMuch := func(e effort) bool {
		return e.wakes > 40 || e.goroutines > 20 || e.cpu > span/4
	}
	took := effort{wakes: math.MaxInt64}
	// The buffers take a while to fill.
	for end := time.Now().Add(patience); isMuch(took) && time.Now().Before(end); {
		before := now
		time.Sleep(span)
		now = takeEffort()
		took = now.since(before)
	}
	say := t.Logf
	if isMuch(took) {
		say = t.Errorf
	}
	say("with %d stalled flows, in %v: %d wakes, %d goroutines started, %v of CPU", s.Stalled, span, took.wakes,
		took.goroutines, took.cpu)
	for _, f := range flows {
		abort(f.Server)
		abort(f.Client)
		f.Result(t)
	}
}

// wantBroken wants c to be told that the flow is over, without a proper end where there are resets.
func wantBroken(t testing.TB, p Path, c net.Conn) {
	t.Helper()
	if !p.NoReset {
		wantReset(t, p, c)
		return
	}
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not told of the end: %v", err)
	}
}

func idleTimeout(t *testing.T, p Path, s Size) {
	// A busy machine may be the one that pauses: then a longer timeout shows whether the relay is to blame.
	idle := 300 * time.Millisecond
	for err := idleAfter(t, p, idle); err != nil; err = idleAfter(t, p, idle) {
		if idle *= 4; idle > 20*time.Second {
			t.Fatalf("bytes one way do not keep a flow: %v", err)
		}
	}
}

// idleAfter keeps a flow for twice its idle timeout by bytes that go one way only, and then lets it be.
func idleAfter(t *testing.T, p Path, idle time.Duration) error {
	f := p.Connect(t)
	f.Start(context.Background(), relay.Options{Idle: idle})
	defer f.Client.Close()
	defer f.Server.Close()
	for i := range 20 {
		from, to := f.Client, f.Server
		if i >= 10 {
			from, to = to, from
		}
		if err := transfer(from, to, 1); err != nil {
			return err
		}
		time.Sleep(idle / 10)
	}
	wantBroken(t, p, f.Client)
	wantBroken(t, p, f.Server)
	if r := f.Result(t); r.End != relay.EndIdle || r.Up != 10 || r.Down != 10 {
		t.Errorf("%+v", r)
	}
	return nil
}

// idleStalled: a flow on which nothing can move is idle.
func idleStalled(t *testing.T, p Path, s Size) {
	f := p.Connect(t)
	f.Start(context.Background(), relay.Options{Idle: 500 * time.Millisecond})
	defer f.Client.Close()
	defer f.Server.Close()
	sent := make(chan error, 1)
	go func() { sent <- newStream().send(f.Client, 1<<30) }()
	if r := f.Result(t); r.End != relay.EndIdle {
		t.Errorf("%+v", r)
	}
	if err := <-sent; !isReset(err) {
		t.Errorf("sender, instead of a reset: %v", err)
	}
}

func cancelFlow(t *testing.T, p Path, s Size) { endQuickly(t, p, false) }

func killFlow(t *testing.T, p Path, s Size) { endQuickly(t, p, true) }

// endQuickly cancels flows, or kills them.
func endQuickly(t *testing.T, p Path, kill bool) {
	for _, busy := range []bool{false, true} {
		took := endOne(t, p, busy, kill)
		for try := 1; took > time.Second && try < 5; try++ { // one of a few is quick on a busy machine too
			took = endOne(t, p, busy, kill)
		}
		if took > time.Second {
			t.Errorf("took %v, again and again", took)
		}
	}
}

// endOne gives the time that a flow takes to end when it is cancelled, or killed.
func endOne(t *testing.T, p Path, busy, kill bool) time.Duration {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var c relay.Counters
	end, want, why := cancel, relay.EndCanceled, context.Canceled
	if kill {
		want, why = relay.EndKilled, errors.New("because")
		end = func() { c.Kill(why) }
	}
	f := p.Connect(t)
	f.Start(ctx, relay.Options{Counters: &c})
	defer f.Client.Close()
	defer f.Server.Close()
	must(t, transfer(f.Client, f.Server, 1000))
	if busy {
		fill(f.Client, newStream()) // the server doesn't read
	}
	start := time.Now()
	end()
	if r := f.Result(t); r.End != want || !errors.Is(r.Err, why) {
		t.Errorf("%+v", r)
	}
	took := time.Since(start)
	wantBroken(t, p, f.Client)
	if !busy {
		wantBroken(t, p, f.Server)
		return took
	}
	if _, err := io.Copy(io.Discard, f.Server); !p.NoReset && !isReset(err) {
		t.Errorf("server, instead of a reset: %v", err)
	}
	return took
}
