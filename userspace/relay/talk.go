package relay

import (
	"sync"
	"time"
)

// A flow talks when its sides send small messages in turn, quickly: then each is waited for, and the kernel
// passes it on sooner than a process that has to be woken. Larger ones it sends in pieces.
const (
	talkBytes  = 2 << 10                // a message has so many at most
	talkTurns  = 32                     // so many in a row
	talkWithin = 100 * time.Millisecond // come within this; else the way between takes far longer than we do
	talkAgain  = 2048                   // turns until a flow that was refused is offered again
)

// talk is what is known of that. The loop's mutex guards it, but for within.
type talk struct {
	turn   *side // whose message came last
	turns  int
	since  time.Time // when turns was 0
	within int64     // the last stretch of talkWithin that it talked in; guarded by talkers
}

// says is told of a message of s. It gives how many flows talk, this one included, if it has talked for a
// while; now and then.
func (t *talk) says(s *side, n int) int {
	switch {
	case n > talkBytes:
		t.turns = 0
		return 0
	case t.turn == s:
		return 0
	}
	t.turn = s
	if t.turns++; t.turns < talkTurns {
		return 0
	}
	now := time.Now()
	quick := now.Sub(t.since) < talkWithin
	t.turns, t.since = 0, now
	if !quick {
		return 0
	}
	return talkers.count(t, now)
}

// talkers counts the flows that talk and are relayed here: in the stretch of talkWithin that is not over, and
// in the one before.
var talkers talkerCount

type talkerCount struct {
	mu        sync.Mutex
	within    int64
	now, last int
}

// count counts t, once in each stretch. If t talked in the one before too, it gives how many did then.
func (c *talkerCount) count(t *talk, at time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if within := at.UnixNano() / int64(talkWithin); within != c.within {
		if within != c.within+1 {
			c.now = 0
		}
		c.within, c.now, c.last = within, 0, c.now
	}
	if t.within == c.within {
		return 0
	}
	before := t.within == c.within-1
	t.within = c.within
	c.now++
	if !before {
		return 0
	}
	return c.last
}

// gone is told that a flow that was counted talks elsewhere.
func (c *talkerCount) gone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.last = max(c.now-1, 0), max(c.last-1, 0)
}
