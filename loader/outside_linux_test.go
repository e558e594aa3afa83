package loader

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

func outside() rules {
	r := allRules
	r.outside = true
	return r
}

func (f *flow) isInside() bool { return !f.halves[0].bulk.left.Load() && !f.halves[1].bulk.left.Load() }

// A flow that has one question and one answer never comes into the sockmap, nor does one that is busy.
func TestStaysOutside(t *testing.T) {
	l := open(t, outside(), 16)
	p := splicePath(t, l, pathOptions{})
	must(t, errors.Join(sendPart(p.client, p.server, 1, 300), sendPart(p.server, p.client, 2, 10000)))
	must(t, errors.Join(send(p.client, p.server, 1, 0), send(p.server, p.client, 1, 0)))
	must(t, bothWays(splicePath(t, l, pathOptions{}), 32<<20))
	if s := l.Stats(); s.Inserted != 0 || s.Bulk != 0 || s.Spliced != 2 {
		t.Errorf("%+v", s)
	}
}

// What comes now and then brings a flow in; what is idle stays where it is.
func TestComesInWhenQuiet(t *testing.T) {
	l := open(t, outside(), 16)
	p := splicePath(t, l, pathOptions{})
	f := l.onlyFlow(t)
	time.Sleep(2*sweepEvery + sweepEvery/2)
	if f.isInside() {
		t.Error("it came in, and nothing moves")
	}
	for end := time.Now().Add(patience); !f.isInside(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come in")
		}
		must(t, sendPart(p.server, p.client, 1, 100))
	}
	must(t, errors.Join(send(p.client, p.server, 1, 1<<20), send(p.server, p.client, 2, 1<<20)))
}

// Sides that talk bring their flow in; those that become busy send it out; and each byte arrives in its
// place, wherever the flow is. Both are as they may be, for many flows at a time, on more processors than
// there are.
func TestTalk(t *testing.T) {
	r := outside()
	r.watchers = 4
	l := open(t, r, 128)
	const flows = 50
	var all sync.WaitGroup
	for i := range uint64(flows) {
		p := splicePath(t, l, pathOptions{buffer: 256 << 10})
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(i, 5))
			for seed := range uint64(60) {
				most := int64(2000)
				if seed%20 > 16 {
					most = 3 << 20
				}
				up, down := sendPart(p.client, p.server, seed, 1+rnd.Int64N(most)), error(nil)
				if up == nil {
					down = sendPart(p.server, p.client, seed+i, 1+rnd.Int64N(most))
				}
				if err := errors.Join(up, down); err != nil {
					t.Errorf("flow %d, turn %d: %v", i, seed, err)
					return
				}
			}
			if err := errors.Join(send(p.client, p.server, 1, rnd.Int64N(1<<20)),
				send(p.server, p.client, 2, rnd.Int64N(1<<20))); err != nil {
				t.Errorf("flow %d: %v", i, err)
				return
			}
			if r := p.wait(patience); r.end != endEOF {
				t.Errorf("flow %d ended %+v", i, r)
			}
		})
	}
	all.Wait()
	if s := l.Stats(); s.Inserted < flows || s.Stalls != 0 || len(s.Refused) != 0 {
		t.Errorf("%+v", s)
	}
}

// A flow whose sockets the kernel does not take goes on outside; a burst of them switches the datapath off.
func TestRefusedWhenItComesIn(t *testing.T) {
	l := open(t, outside(), 2*burstFailures)
	must(t, l.objects.Sources.Freeze())
	for i := range burstFailures {
		p := splicePath(t, l, pathOptions{})
		for range 4 * talkTurns {
			must(t, errors.Join(sendPart(p.client, p.server, 1, 10), sendPart(p.server, p.client, 2, 10)))
		}
		if n := l.Stats().Refused[refusedInsert.Error()]; n != i+1 {
			t.Fatalf("%d of %d were refused", n, i+1)
		}
		if off, _ := l.Health(); (off != "") != (i == burstFailures-1) {
			t.Fatalf("after %d: %q", i+1, off)
		}
		p.client.Close()
		if got, err := io.ReadAll(p.server); len(got) != 0 || err != nil {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		p.server.Close()
		p.wait(patience)
	}
	if s := fmt.Sprint(l.Flows()); s != "[]" || l.Stats().Inserted != 0 {
		t.Errorf("%s, %+v", s, l.Stats())
	}
}

// A flow that has left is unknown to the programs, and leaves nothing behind when it ends.
func TestForgottenOutside(t *testing.T) {
	l := open(t, allRules, 16)
	p := splicePath(t, l, pathOptions{})
	f := l.onlyFlow(t)
	waitFor(t, func() bool {
		l.leaver.ask(f)
		f.outsideMu.Lock()
		defer f.outsideMu.Unlock()
		return f.outside
	}, "the flow to leave")
	var key uint64
	var place splicePlace
	if l.objects.Places.Iterate().Next(&key, &place) {
		t.Errorf("socket %d has a place, %+v", key, place)
	}
	must(t, bothWays(p, 1<<20))
}
