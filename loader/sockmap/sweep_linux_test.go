package sockmap

import (
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// Who asks for sweeps has them soon, though the sweep that is under way asks for none.
func TestSweeperAsked(t *testing.T) {
	s, swept := newSweeper(), make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.run(func(time.Time) time.Duration {
			s.atLeast(time.Millisecond)
			select {
			case swept <- struct{}{}:
			case <-s.quit:
			}
			return time.Hour
		})
	}()
	defer func() { s.close(); <-done }()
	for range 4 {
		select {
		case <-swept:
		case <-time.After(loadertest.Patience):
			t.Fatal("no sweep is made")
		}
	}
}

// There are sweeps each second while there is a flow, in the sockmap or not, and few while there is none.
func TestSweepRests(t *testing.T) {
	l := open(t, nil, 16)
	want := func(what string, pause time.Duration) {
		t.Helper()
		if got := l.sweep(time.Now()); got != pause {
			t.Errorf("%s: the next sweep is in %v, want %v", what, got, pause)
		}
	}
	pause := func() time.Duration {
		l.sweeper.mu.Lock()
		defer l.sweeper.mu.Unlock()
		return l.sweeper.pause
	}
	rests := func() bool { return pause() == restEvery }
	want("without a flow", restEvery)
	loadertest.WaitFor(t, rests, "the sweeper to rest")
	client, d := loadertest.Connect(t, "tcp4")
	u, server := loadertest.Connect(t, "tcp4")
	defer client.Close()
	defer server.Close()
	forget := recordFlow(t, l, d, u, Flow{ID: "swept", Buffer: 1 << 20})
	if rests() {
		t.Error("it rests beside a flow")
	}
	want("with a flow that userspace has", sweepEvery)
	forget()
	want("without a flow once more", restEvery)
}
