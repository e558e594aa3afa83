package relay

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// A keeper takes flows, and does nothing with them.
type keeper struct {
	datapath.Returner
	flows chan datapath.Handoff
}

func (keeper) Name() string { return "keeper" }

func (k keeper) Splice(_ context.Context, _, _ int, h datapath.Handoff) (func() (int64, int64), error) {
	k.flows <- h
	return h.Moved, nil
}

// TestSparedComesBack: what a direction on trial is written less of where TCP's memory is scarce, it gets again
// when the trial has ended, also where a datapath had the flow in between.
func TestSparedComesBack(t *testing.T) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	r, done := New(loops), make(chan Result, 1)
	defer r.Close()
	r.SpareTCP(true)
	f := r.newFlow(t.Context(), nil, nil, Options{}, func(r Result) { done <- r })
	client, down := connected(t)
	server, up := connected(t)
	l := loops.Loop()
	f.attachTo(l.NewSocket(down), l.NewSocket(up))
	unsent := func() (bytes int) {
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		l.Do(func() func() { // what is set is set before the byte is written
			bytes, err = unix.GetsockoptInt(up, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return bytes
	}
	if n := unsent(); n != trialUnsent {
		t.Errorf("on trial there may be %d bytes unsent, want %d", n, trialUnsent)
	}
	k := keeper{flows: make(chan datapath.Handoff, 1)}
	l.Do(func() func() { return f.handOff(k) })
	(<-k.flows).Returned(down, up, nil, nil, 2*trialBytes, 0, time.Now(), nil, context.Canceled)
	if n := unsent(); n != 0 {
		t.Errorf("after the trial there may be %d bytes unsent, want what the sysctl says", n)
	}
	client.Close()
	server.Close()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("the flow does not end")
	}
}
