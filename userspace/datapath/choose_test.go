package datapath

import (
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// TestCount: it is told how many flows are ping-pong once in each tenth of a second, from the second one on in a row
// that a flow is so in.
func TestCount(t *testing.T) {
	var ch Chooser
	tenth := func(n int) moment.Moment { return moment.Moment(1000+n)*moment.Moment(pingPongWithin) + 1 }
	var a, b, late Choice
	for i, step := range []struct {
		c    *Choice
		at   int
		want int
	}{
		{&a, 0, 0}, {&b, 0, 0}, {&a, 0, 0}, // all are new
		{&a, 1, 2}, {&a, 1, 0}, {&late, 1, 0}, {&b, 1, 2},
		{&late, 2, 3}, {&b, 2, 3},
		{&a, 3, 0}, {&b, 3, 2}, // a has paused
		{&a, 5, 0}, {&b, 5, 0}, // all have
		{&b, 6, 2},
	} {
		if got := ch.count(step.c, tenth(step.at)); got != step.want {
			t.Errorf("step %d: %d are ping-pong, want %d", i, got, step.want)
		}
	}
	ch.Taken(&late)
	if got := ch.count(&a, tenth(6)); got != 1 {
		t.Errorf("when one is gone: %d", got)
	}
}

// TestPingPong: what is so, and what not.
func TestPingPong(t *testing.T) {
	for _, c := range []struct {
		name  string
		size  int
		sides []Side
		quick bool
		want  bool
	}{
		{"small messages, in turn", pingPongBytes, []Side{Downstream, Upstream}, true, true},
		{"large messages", pingPongBytes + 1, []Side{Downstream, Upstream}, true, false},
		{"one side only", 100, []Side{Downstream}, true, false},
		{"now and then", 100, []Side{Downstream, Upstream}, false, false},
	} {
		var k Choice
		var ch Chooser
		flows := 0
		long := 3 * pingPongWithin
		if c.want { // it ends when it is told, and a busy machine may pause
			long = time.Minute
		}
		for begin := time.Now(); time.Since(begin) < long && flows == 0; {
			for _, from := range c.sides {
				if !c.quick {
					k.since -= moment.Moment(pingPongWithin / pingPongTurns)
				}
				flows += ch.pingPong(&k, from, c.size)
			}
		}
		if (flows > 0) != c.want {
			t.Errorf("%s: told that %d are ping-pong", c.name, flows)
		}
	}
}

// TestOfferedAgain: a flow that sends one way only takes no turns. When it was refused while it was quiet it is offered
// again all the same, after a while.
func TestOfferedAgain(t *testing.T) {
	c, now := Choice{Of: []Returner{nil}, Prefers: true}, time.Now()
	if !c.MayBeOffered(now) {
		t.Error("a flow that was never refused is not offered")
	}
	c.Refused()
	var ch Chooser
	for range 2 * refusedTurns {
		if ch.Message(&c, Upstream, 100) != nil {
			t.Fatal("one side alone sends, and it is taken for ping-pong")
		}
	}
	if c.MayBeOffered(now.Add(refusedFor / 2)) {
		t.Error("it is offered again too soon")
	}
	if !c.MayBeOffered(time.Now().Add(refusedFor)) {
		t.Error("it is never offered again")
	}
	if other := (Choice{Of: c.Of}); other.MayBeOffered(now) {
		t.Error("a flow that does not prefer the datapath is offered for being quiet")
	}
}
