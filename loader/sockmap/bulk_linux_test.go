package sockmap

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// A busy flow is given back, and may be spliced again at once, again and again, with every byte in its place.
func TestBulk(t *testing.T) {
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 4 << 20})
	size := int64(256 << 20)
	if os.Getenv("RELAYTEST") == "slow" {
		size = 32 << 20
	}
	// On a busy machine fewer directions count as busy.
	for round := 0; round < 3 || p.Returns.Load() < 3 && round < 30; round++ {
		up, down := make(chan error, 1), make(chan error, 1)
		go func() { up <- loadertest.SendPart(p.Client, p.Server, uint64(2*round), size) }()
		go func() { down <- loadertest.SendPart(p.Server, p.Client, uint64(2*round+1), size) }()
		if err := errors.Join(<-up, <-down); err != nil {
			t.Errorf("round %d: %v", round, err)
			t.Fatalf("it ended with %+v", p.Wait(loadertest.Patience))
		}
		t.Logf("%d times", p.Returns.Load())
	}
	if n := p.Returns.Load(); n < 3 {
		t.Errorf("it was given back %d times", n)
	}
	loadertest.Must(t, errors.Join(loadertest.SendPart(p.Client, p.Server, 1, 1<<20), loadertest.SendPart(p.Server, p.Client, 2, 1<<20)))
}

// A reset that something else was told of looks like the end of the stream to who reads, and is none.
func TestResetOfBulk(t *testing.T) {
	r := new(Hooks).Without(ruleReset) // nobody looks
	l := open(t, r, 16)
	for side := range 2 {
		p := loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 1 << 40})
		f := l.onlyFlow(t)
		detachOne(t, l, f, side)
		from, to := p.Client, p.Server
		if side == 1 {
			from, to = to, from
		}
		f.mu.Lock()
		from.SetLinger(0)
		from.Close()
		var err error
		for end := time.Now().Add(loadertest.Patience); err == nil && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
			err = f.sockets[side].fault()
		}
		f.mu.Unlock()
		if err != unix.ECONNRESET {
			t.Fatalf("the reset was told as %v", err)
		}
		to.SetDeadline(time.Now().Add(loadertest.Patience))
		if n, err := to.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("side %d: it arrived as %d bytes and %v", side, n, err)
		}
		to.Close()
		loadertest.WaitFor(t, func() bool { return l.flows() == 0 }, "the flow's end")
	}
}

// What is passed behind bytes of the other way is charged to nobody: the clamp bounds it, and all arrives in
// the end.
func TestIngressClamp(t *testing.T) {
	r := new(Hooks).Without(ruleSweep) // nobody makes way
	if n := pushBehind(t, r); n > 24<<20 {
		t.Errorf("%d MiB were taken behind a backlog", n>>20)
	}
}

func TestRuleClampOff(t *testing.T) {
	r := new(Hooks).Without(ruleSweep, ruleClamp)
	if n := pushBehind(t, r); n < 64<<20 {
		t.Errorf("only %d MiB were taken behind a backlog: this test proves nothing", n>>20)
	}
}

// pushBehind sends up what is taken, until nothing is for a second, behind a backlog of the other way, and
// gives how much that was.
func pushBehind(t *testing.T, r *Hooks) int64 {
	l, p, data := behind(t, r)
	n := int64(0)
	for m := int64(1 << 20); m == 1<<20 && n < 96<<20; n += m {
		p.Client.SetWriteDeadline(time.Now().Add(time.Second))
		m, _ = io.Copy(p.Client, io.LimitReader(loadertest.Zeroes{}, 1<<20))
	}
	t.Logf("%d MiB were taken", n>>20)
	if n := l.ClampedSegments(); (n > 0) != r.Keeps(ruleClamp) {
		t.Errorf("%d segments were clamped", n)
	}
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
	loadertest.Must(t, prove.Expect(p.Client, data))
	loadertest.Must(t, prove.Expect(p.Server, []byte("hello")))
	if got, err := io.Copy(io.Discard, io.LimitReader(p.Server, n)); got != n || err != nil {
		t.Errorf("%d of %d bytes arrived, %v", got, n, err)
	}
	loadertest.Must(t, errors.Join(loadertest.Send(p.Client, p.Server, 1, 1<<20), loadertest.Send(p.Server, p.Client, 2, 1<<20)))
	return n
}

// While one way passes, the other one does not put bytes in front of what is passed.
func TestCoupled(t *testing.T) {
	if s := other(t, nil); s.passed != 5 || s.redirected != 0 {
		t.Errorf("%+v", s)
	}
}

func TestRuleCoupleOff(t *testing.T) {
	r := new(Hooks).Without(ruleMutual)
	if s := other(t, r); s.passed != 0 || s.redirected != 5 {
		t.Errorf("%+v: this test proves nothing", s)
	}
}

// other sends 5 bytes down while the way up is passing.
func other(t *testing.T, r *Hooks) snapshot {
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	f := l.live[firstLive(l)].Load()
	loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 5)) // the verdict has begun
	up, down := &f.directions[0], &f.directions[1]
	pretendConsumed(up, 1<<62)
	loadertest.Must(t, loadertest.SendPart(p.Server, p.Client, 2, 5))
	s := down.snapshot()
	pretendConsumed(up, 0)
	loadertest.Must(t, errors.Join(loadertest.Send(p.Client, p.Server, 3, 1<<20), loadertest.Send(p.Server, p.Client, 4, 1<<20)))
	return s
}

// Where TCP is short of memory all is passed, since nothing redirected may be taken.
func TestShortOfMemory(t *testing.T) {
	r := &Hooks{Pressure: 1 << 63} // less than any number of pages
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	f := l.live[firstLive(l)].Load()
	loadertest.Must(t, loadertest.SendPart(p.Client, p.Server, 1, 1<<20))
	loadertest.Must(t, loadertest.SendPart(p.Server, p.Client, 1, 1<<20))
	for i := range f.directions {
		if s := f.directions[i].snapshot(); s.redirected != 0 || s.passed != 1<<20 {
			t.Errorf("direction %d: %+v", i, s)
		}
	}
}
