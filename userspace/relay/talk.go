package relay

import (
	"runtime"
	"sync"
	"time"
)

// Which flows a kernel datapath has, of those that it may have.
//
// A flow is ping-pong when its sides send small messages in turn, quickly: then each is waited for, and the kernel
// passes it on sooner than a process that has to be woken. Larger ones it sends in pieces. With too many such flows
// they wait for each other: see docs/datapaths.md.
//
// A flow that prefers the datapath, since the configuration names it, goes there earlier: also for larger messages, with
// long pauses between them, with any number of others, and when it is quiet, since the kernel moves bytes that come now
// and then for less. One that moves much at a time stays, or comes back: splice(2) costs less for each byte.
const (
	talkBytes  = 2 << 10                // a message has so many at most
	talkTurns  = 32                     // so many in a row
	talkWithin = 100 * time.Millisecond // come within this; else the way between takes far longer than we do
	talkAgain  = 2048                   // turns until a flow that was refused is offered again
	talkPerCPU = 4                      // flows that talk, and are in the kernel, for each processor

	preferredBytes = 64 << 10 // talkBytes of a flow that prefers the datapath
	preferredTurns = 8        // and its talkTurns, however long they take

	calmBytes  = 1 << 20     // a flow that moves so many at most
	calmWithin = time.Second // in this time is quiet, and no work for pumps
	busyBytes  = 4 << 20     // a direction that moves so many in a second is busy, and goes back
)

// room is how many flows more d should have that talk.
func room(d Sockets) int {
	busy, ok := d.Busy()
	if !ok {
		return 0
	}
	return talkPerCPU*runtime.NumCPU() - busy
}

// talk is what is known of that. The loop's mutex guards it, but for within.
type talk struct {
	turn   *side // whose message came last
	turns  int
	since  time.Time // when turns was 0
	within int64     // the last stretch of talkWithin that it talked in; guarded by the talkerCount
}

// says is told of a message of s. It gives how many flows talk, this one included, if it has talked for a
// while; now and then.
func (t *talk) says(s *side, n int, talkers *talkerCount) int {
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

// A talkerCount counts the flows that talk and are relayed here: in the stretch of talkWithin that is not over, and
// in the one before.
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

// prefers is says for a flow that prefers the datapath.
func (t *talk) prefers(s *side, n int) bool {
	switch {
	case n > preferredBytes:
		t.turns = min(t.turns, 0)
	case t.turn != s:
		t.turn = s
		t.turns++
	}
	return t.turns >= preferredTurns
}

// gone is told that a flow that was counted talks elsewhere.
func (c *talkerCount) gone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.last = max(c.now-1, 0), max(c.last-1, 0)
}
