package relay

import (
	"testing"
	"time"
)

// TestTalkers: a flow is told how many talk once in each tenth of a second, from the second one on in a row
// that it talks in.
func TestTalkers(t *testing.T) {
	var c talkerCount
	start := time.Unix(1000, 0)
	tenth := func(n int) time.Time { return start.Add(time.Duration(n)*talkWithin + time.Millisecond) }
	var a, b, late talk
	for i, step := range []struct {
		t    *talk
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
		if got := c.count(step.t, tenth(step.at)); got != step.want {
			t.Errorf("step %d: %d talk, want %d", i, got, step.want)
		}
	}
	c.gone()
	if got := c.count(&a, tenth(6)); got != 1 {
		t.Errorf("when one is gone: %d", got)
	}
}

// TestTalks: what is one, and what not.
func TestTalks(t *testing.T) {
	for _, c := range []struct {
		name  string
		size  int
		sides []int
		quick bool
		want  bool
	}{
		{"small messages, in turn", talkBytes, []int{0, 1}, true, true},
		{"large messages", talkBytes + 1, []int{0, 1}, true, false},
		{"one side only", 100, []int{0}, true, false},
		{"now and then", 100, []int{0, 1}, false, false},
	} {
		var sides [2]side
		var k talk
		var talkers talkerCount
		talking := 0
		long := 3 * talkWithin
		if c.want { // it ends when it is told, and a busy machine may pause
			long = time.Minute
		}
		for begin := time.Now(); time.Since(begin) < long && talking == 0; {
			for _, i := range c.sides {
				if !c.quick {
					k.since = k.since.Add(-talkWithin / talkTurns)
				}
				talking += k.says(&sides[i], c.size, &talkers)
			}
		}
		if (talking > 0) != c.want {
			t.Errorf("%s: told that %d talk", c.name, talking)
		}
	}
}
