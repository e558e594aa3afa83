package loader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sendPart is send without the end.
func sendPart(from, to *net.TCPConn, seed uint64, n int64) error {
	type sum struct {
		hash [32]byte
		err  error
	}
	sent := make(chan sum, 1)
	go func() {
		hash, err := stream(from, seed, n)
		sent <- sum{hash, err}
	}()
	end := time.Now().Add(time.Minute)
	errs := errors.Join(from.SetWriteDeadline(end), to.SetReadDeadline(end))
	hash, got, err := drain(io.LimitReader(to, n))
	s := <-sent
	if err := errors.Join(errs, s.err, err); err != nil || got != n || hash != s.hash {
		return fmt.Errorf("%d of %d bytes arrived, the same: %v, %w", got, n, hash == s.hash, err)
	}
	return nil
}

// A busy flow is given back, and may be spliced again at once, again and again, with every byte in its place.
func TestBulk(t *testing.T) {
	l := open(t, nil, 16)
	p := splicePath(t, l, pathOptions{busy: 4 << 20})
	size := int64(256 << 20)
	if os.Getenv("RELAYTEST") == "slow" {
		size = 32 << 20
	}
	// On a busy machine fewer directions count as busy.
	for round := 0; round < 3 || p.returns.Load() < 3 && round < 30; round++ {
		up, down := make(chan error, 1), make(chan error, 1)
		go func() { up <- sendPart(p.client, p.server, uint64(2*round), size) }()
		go func() { down <- sendPart(p.server, p.client, uint64(2*round+1), size) }()
		if err := errors.Join(<-up, <-down); err != nil {
			t.Errorf("round %d: %v, %+v, %+v", round, err, l.Stats(), l.Flows())
			t.Fatalf("it ended with %+v", p.wait(patience))
		}
		t.Logf("%d times, %+v %+v", p.returns.Load(), l.Stats(), l.Flows())
	}
	if n := p.returns.Load(); n < 3 {
		t.Errorf("it was given back %d times", n)
	}
	must(t, errors.Join(sendPart(p.client, p.server, 1, 1<<20), sendPart(p.server, p.client, 2, 1<<20)))
}

// A reset that something else was told of looks like the end of the stream to who reads, and is none.
func TestResetOfBulk(t *testing.T) {
	r := new(hooks).without(ruleReset) // nobody looks
	l := open(t, r, 16)
	for side := range 2 {
		p := splicePath(t, l, pathOptions{busy: 1 << 40})
		f := l.onlyFlow(t)
		detachOne(t, l, f, side)
		from, to := p.client, p.server
		if side == 1 {
			from, to = to, from
		}
		f.mu.Lock()
		from.SetLinger(0)
		from.Close()
		var err error
		for end := time.Now().Add(patience); err == nil && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
			err = f.sockets[side].fault()
		}
		f.mu.Unlock()
		if err != unix.ECONNRESET {
			t.Fatalf("the reset was told as %v", err)
		}
		to.SetDeadline(time.Now().Add(patience))
		if n, err := to.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("side %d: it arrived as %d bytes and %v", side, n, err)
		}
		to.Close()
		waitFor(t, func() bool { return l.Stats().Flows == 0 }, "the flow's end")
	}
}

// What is passed behind bytes of the other way is charged to nobody: the clamp bounds it, and all arrives in
// the end.
func TestIngressClamp(t *testing.T) {
	r := new(hooks).without(ruleSweep) // nobody makes way
	if n := pushBehind(t, r); n > 24<<20 {
		t.Errorf("%d MiB were taken behind a backlog", n>>20)
	}
}

func TestRuleClampOff(t *testing.T) {
	r := new(hooks).without(ruleSweep, ruleClamp)
	if n := pushBehind(t, r); n < 64<<20 {
		t.Errorf("only %d MiB were taken behind a backlog: this test proves nothing", n>>20)
	}
}

// pushBehind sends up what is taken, until nothing is for a second, behind a backlog of the other way, and
// gives how much that was.
func pushBehind(t *testing.T, r *hooks) int64 {
	l, p, data := behind(t, r)
	n := int64(0)
	for m := int64(1 << 20); m == 1<<20 && n < 96<<20; n += m {
		p.client.SetWriteDeadline(time.Now().Add(time.Second))
		m, _ = io.Copy(p.client, io.LimitReader(zeroes{}, 1<<20))
	}
	t.Logf("%d MiB were taken, %+v", n>>20, l.Stats())
	if n := l.Stats().Clamped; (n > 0) != r.keeps(ruleClamp) {
		t.Errorf("%d segments were clamped", n)
	}
	p.server.SetDeadline(time.Now().Add(patience))
	p.client.SetDeadline(time.Now().Add(patience))
	must(t, expect(p.client, data))
	must(t, expect(p.server, []byte("hello")))
	if got, err := io.Copy(io.Discard, io.LimitReader(p.server, n)); got != n || err != nil {
		t.Errorf("%d of %d bytes arrived, %v", got, n, err)
	}
	must(t, errors.Join(send(p.client, p.server, 1, 1<<20), send(p.server, p.client, 2, 1<<20)))
	return n
}

// While one way passes, the other one does not put bytes in front of what is passed.
func TestCoupled(t *testing.T) {
	if s := other(t, nil); s.passed != 5 || s.redirected != 0 {
		t.Errorf("%+v", s)
	}
}

func TestRuleCoupleOff(t *testing.T) {
	r := new(hooks).without(ruleMutual)
	if s := other(t, r); s.passed != 0 || s.redirected != 5 {
		t.Errorf("%+v: this test proves nothing", s)
	}
}

// other sends 5 bytes down while the way up is passing.
func other(t *testing.T, r *hooks) snapshot {
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{})
	f := l.live[firstLive(l)].Load()
	must(t, sendPart(p.client, p.server, 1, 5)) // the verdict has begun
	up, down := &f.directions[0], &f.directions[1]
	atomic.StoreUint64(&up.shared().Consumed, 1<<62)
	must(t, sendPart(p.server, p.client, 2, 5))
	s := down.snapshot()
	atomic.StoreUint64(&up.shared().Consumed, 0)
	must(t, errors.Join(send(p.client, p.server, 3, 1<<20), send(p.server, p.client, 4, 1<<20)))
	return s
}

// Where TCP is short of memory all is passed, since nothing redirected may be taken.
func TestShortOfMemory(t *testing.T) {
	r := &hooks{pressure: 1 << 63} // less than any number of pages
	l := open(t, r, 16)
	p := splicePath(t, l, pathOptions{})
	f := l.live[firstLive(l)].Load()
	must(t, sendPart(p.client, p.server, 1, 1<<20))
	must(t, sendPart(p.server, p.client, 1, 1<<20))
	for i := range f.directions {
		if s := f.directions[i].snapshot(); s.redirected != 0 || s.passed != 1<<20 {
			t.Errorf("direction %d: %+v", i, s)
		}
	}
}
