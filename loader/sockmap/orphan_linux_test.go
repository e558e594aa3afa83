package sockmap

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// freeze makes the engine do nothing for the flow any more, as if its process were dead.
func (f *flow) freeze(t *testing.T) {
	t.Helper()
	for i := range f.directions {
		d := &f.directions[i]
		loadertest.WaitFor(t, func() bool { return d.bits.CompareAndSwap(0, isRunning) }, "the direction to rest")
	}
}

// orphaned is what another process finds of a flow that was frozen.
func orphaned(t *testing.T, l *Engine) *Orphan {
	t.Helper()
	dir, _ := pinnedAt.Load(l)
	o, err := OpenOrphan(dir.(string))
	loadertest.Must(t, err)
	t.Cleanup(func() { loadertest.Must(t, o.Close()) })
	return o
}

func (f *flow) recallBy(ctx context.Context, o *Orphan) (rest [2][]byte, found bool, err error) {
	up, down := &f.directions[0], &f.directions[1]
	return o.Recall(ctx, int(f.sockets[0]), int(f.sockets[1]), [2]uint64{up.written0 - up.read0, down.written0 - down.read0})
}

// takenOut fails the test if a socket of the flow is in a sockmap.
func (f *flow) takenOut(t *testing.T, o *Orphan) {
	t.Helper()
	for i, cookie := range f.cookies {
		if at := 2*f.slot + uint32(i); isIn(o.sources, at, cookie) || isIn(o.peers, at, cookie) {
			t.Errorf("the socket of %s is in a sockmap", sideName(uint32(i)))
		}
	}
	if _, found, err := f.recallBy(t.Context(), o); found || err != nil {
		t.Errorf("recalled again: %v, %v", found, err)
	}
}

// copyByHand copies what comes, rest first, until the test ends.
func (f *flow) copyByHand(t *testing.T, rest [2][]byte) {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	t.Cleanup(func() { cancel(); done.Wait() }) // before the sockets are closed
	for i, rest := range rest {
		done.Go(func() {
			for b := make([]byte, 64<<10); ctx.Err() == nil; {
				if len(rest) == 0 {
					n, _ := f.sockets[i].read(b)
					rest = b[:n]
				}
				n, _ := f.sockets[1-i].write(rest)
				if rest = rest[n:]; n == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
}

// What a flow was about when its process died decides whether it can be recalled, and it is whole if it can.
func TestRecall(t *testing.T) {
	data := prove.Pattern(1000)
	lose := func(t *testing.T, f *flow) []byte {
		b := make([]byte, 400)
		n, err := f.sockets[0].read(b)
		loadertest.Must(t, err)
		return b[:n]
	}
	for name, c := range map[string]struct {
		die  func(t *testing.T, f *flow, o *Orphan)
		want error
	}{
		"it copied nothing":            {func(*testing.T, *flow, *Orphan) {}, nil},
		"it had read, and not written": {func(t *testing.T, f *flow, _ *Orphan) { lose(t, f) }, errLost},
		"it had written, and not said so": {func(t *testing.T, f *flow, _ *Orphan) {
			_, err := f.sockets[1].write(lose(t, f))
			loadertest.Must(t, err)
		}, nil},
		"it had written a part": {func(t *testing.T, f *flow, _ *Orphan) {
			_, err := f.sockets[1].write(lose(t, f)[:300])
			loadertest.Must(t, err)
		}, errLost},
		"it had kept the verdict from what comes": {func(t *testing.T, f *flow, _ *Orphan) { f.sockets[0].hold() }, nil},
		"the verdict had given up": {func(t *testing.T, f *flow, _ *Orphan) {
			f.directions[1].shared().Fault = sockmapFaultFAULT_GAP
		}, errLost},
		"it went past TCP": {func(t *testing.T, f *flow, o *Orphan) {
			var err error
			o.pastTCP, err = o.sources.Clone()
			loadertest.Must(t, err)
		}, errPastTCP},
	} {
		t.Run(name, func(t *testing.T) {
			l, p := unread(t, data)
			f, o := l.onlyFlow(t), orphaned(t, l)
			c.die(t, f, o)
			_, err := p.Client.Write(data)
			loadertest.Must(t, err)

			rest, found, err := f.recallBy(t.Context(), o)
			if !found || !errors.Is(err, c.want) {
				t.Fatalf("%v, %v, want %v", found, err, c.want)
			}
			if err != nil {
				t.Log(err)
				return
			}
			f.takenOut(t, o)
			if n := len(rest[1]); n > 0 {
				t.Errorf("%d bytes of the other way", n)
			}
			f.copyByHand(t, rest)
			loadertest.Must(t, p.Server.SetDeadline(time.Now().Add(loadertest.Patience)))
			loadertest.Must(t, prove.Expect(p.Server, append(data[:1000:1000], data...)))
		})
	}
}

// unread has a flow that is frozen, with data passed to userspace, which has not read it.
func unread(t *testing.T, data []byte) (*Engine, *loadertest.Path) {
	l := open(t, new(Hooks).Without(ruleSweep), 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 1000))
	f := l.onlyFlow(t)
	f.freeze(t)
	d := &f.directions[0]
	pretendConsumed(d, 1<<62)
	_, err := p.Client.Write(data)
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool { return d.snapshot().passed == uint64(len(data)) }, "bytes to be passed")
	loadertest.WaitFor(t, d.source().readable, "bytes to be read")
	pretendConsumed(d, 0)
	return l, p
}

// A recall that is to end does so at once, and says what is missing.
func TestRecallIsCut(t *testing.T) {
	l, _ := unread(t, prove.Pattern(1000))
	f, o := l.onlyFlow(t), orphaned(t, l)
	_, err := f.sockets[0].read(make([]byte, 400))
	loadertest.Must(t, err)
	why := errors.New("it has taken too long")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, found, err := f.recallBy(ctx, o); !found || !errors.Is(err, errLost) || !errors.Is(err, why) {
		t.Errorf("%v, %v", found, err)
	}
}

// A recall waits for no reader: there is room for what waits for it in the kernel, and in front of bytes that
// go the other way.
func TestRecallBehind(t *testing.T) {
	l, p, data := behind(t, new(Hooks).Without(ruleSweep))
	f := l.onlyFlow(t)
	f.freeze(t)
	o := orphaned(t, l)
	if n := f.directions[1].shared().Redirected - (must(f.sockets[0].written()) - f.directions[1].written0); n < 1<<20 {
		t.Fatalf("%d bytes wait: this test proves nothing", n)
	}
	rest, found, err := f.recallBy(t.Context(), o)
	if !found || err != nil {
		t.Fatal(found, err)
	}
	f.takenOut(t, o)
	f.copyByHand(t, rest)
	for _, c := range []*net.TCPConn{p.Client, p.Server} {
		loadertest.Must(t, c.SetDeadline(time.Now().Add(loadertest.Patience)))
	}
	loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
	loadertest.Must(t, prove.Expect(p.Client, data))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// One direction of a flow may have left before.
func TestRecallOfLeaving(t *testing.T) {
	for side := range 2 {
		l := open(t, new(Hooks).Without(ruleSweep), 16)
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 1 << 40})
		loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 1000))
		f := l.onlyFlow(t)
		detachOne(t, l, f, side)
		f.freeze(t)
		o := orphaned(t, l)
		for _, c := range []*net.TCPConn{p.Client, p.Server} {
			_, err := c.Write([]byte("hello"))
			loadertest.Must(t, err)
		}
		rest, found, err := f.recallBy(t.Context(), o)
		if !found || err != nil {
			t.Fatal(found, err)
		}
		f.takenOut(t, o)
		f.copyByHand(t, rest)
		for _, c := range []*net.TCPConn{p.Server, p.Client} {
			loadertest.Must(t, c.SetDeadline(time.Now().Add(loadertest.Patience)))
			loadertest.Must(t, prove.Expect(c, []byte("hello")))
		}
	}
}

// A recall ends with its context, and a flow that nobody knows is none.
func TestRecallCanceled(t *testing.T) {
	l := open(t, new(Hooks).Without(ruleSweep), 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 1000))
	f := l.onlyFlow(t)
	f.freeze(t)
	o := orphaned(t, l)
	down, up := int(f.sockets[0]), int(f.sockets[1])
	if _, found, err := o.Recall(t.Context(), up, down, [2]uint64{}); found || err != nil {
		t.Errorf("the sides are mistaken for each other: %v, %v", found, err)
	}
	f.directions[0].written0++ // as if a byte were lost
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, found, err := f.recallBy(ctx, o); !found || !errors.Is(err, context.Canceled) || !errors.Is(err, errLost) {
		t.Errorf("%v, %v", found, err)
	}
}

// While a reader has stopped, what is to be copied for it waits in the source's queue: in the hands of the
// process it would be lost with it.
func TestHandsAreEmpty(t *testing.T) {
	const flows = 8
	full := 0
	for range flows {
		l := open(t, nil, 16)
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
		f := l.onlyFlow(t)
		d := &f.directions[0]
		stop := make(chan struct{})
		go func() {
			defer close(stop)
			_, _ = p.Client.Write(make([]byte, 64<<20))
		}()
		moved, since := uint64(0), time.Now()
		loadertest.WaitFor(t, func() bool {
			if n := d.moved(); n != moved {
				moved, since = n, time.Now()
			}
			return d.snapshot().passed != load64(&d.shared().Consumed) && time.Since(since) > 100*time.Millisecond
		}, "the flow to stand still")
		f.freeze(t)
		if n := len(d.rest); n > 0 {
			t.Logf("%d bytes are in its hands", n)
			full++
		}
		p.Cancel()
		<-stop
	}
	if full == flows { // TCP may take less than it had room for, where it is short of memory
		t.Error("the hands of all are full")
	}
}
