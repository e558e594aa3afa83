package datapath

import (
	"runtime"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// A flow is ping-pong when its sides send small messages in turn, quickly: then each is waited for, and the
// kernel passes it on sooner than a process that has to be woken. Larger ones it sends in pieces. With too
// many such flows they wait for each other: see docs/datapaths.md.
//
// A flow that prefers the datapath, since the configuration names it, goes there earlier: also for larger
// messages, with long pauses between them, with any number of others, and when it is quiet, since the kernel
// moves bytes that come now and then for less. One that moves much at a time stays, or comes back: splice(2)
// costs less for each byte.
const (
	pingPongBytes = 2 << 10 // a message has so many at most
	pingPongTurns = 32      // so many in a row
	// come within this; else the way between takes far longer than we do
	pingPongWithin = 100 * time.Millisecond
	pingPongPerCPU = 4 // ping-pong flows in the kernel, for each processor

	preferredBytes = 64 << 10 // pingPongBytes of a flow that prefers the datapath
	preferredTurns = 8        // and its pingPongTurns, however long they take

	quietBytes = 1 << 20 // a flow that moves so many at most in QuietWithin is quiet, and no work for pumps

	refusedTurns = 2048        // after which a flow that was refused is offered again, if it is ping-pong
	refusedFor   = time.Minute // and if it is quiet
)

const (
	QuietWithin = time.Second
	BusyBytes   = 4 << 20 // a direction that moves so many in a second is busy, and goes back
)

// A Chooser counts the ping-pong flows that one relay has: in the stretch of pingPongWithin that is not over,
// and in the one before. The zero value is ready.
type Chooser struct {
	mu sync.Mutex
	// +checklocks:mu
	stretch int64
	// +checklocks:mu
	now int
	// +checklocks:mu
	last int
}

// A Choice is what is known of one flow. Whoever has the flow has the Choice to itself.
type Choice struct {
	Of      []Returner // that may have the flow when it is ping-pong, best first
	Prefers bool       // to be in the first of them whenever it is ping-pong or quiet

	turn    Side // whose message came last
	turns   int
	since   moment.Moment // when turns was 0
	stretch int64         // the last stretch of the Chooser's in which the flow was ping-pong

	refused moment.Moment // when a datapath refused the flow last
}

// A Side is one of a flow's two, as one that sends.
type Side uint8

const (
	_ Side = iota
	Downstream
	Upstream
)

// Message is told of a message of n bytes. It gives the datapath that is to have the flow now, or nil.
func (ch *Chooser) Message(c *Choice, from Side, n int) Returner {
	if c.Prefers {
		if c.takesTurns(from, n) {
			return c.Of[0]
		}
	} else if flows := ch.pingPong(c, from, n); flows > 0 {
		for _, d := range c.Of {
			// NumCPU, not GOMAXPROCS: each processor has a worker of the kernel's, which no quota binds.
			if active, ok := d.Active(); ok && pingPongPerCPU*runtime.NumCPU()-active >= flows {
				return d
			}
		}
	}
	return nil
}

// takesTurns is pingPong for a flow that prefers the datapath.
func (c *Choice) takesTurns(from Side, n int) bool {
	switch {
	case n > preferredBytes:
		c.turns = min(c.turns, 0)
	case c.turn != from:
		c.turn = from
		c.turns++
	}
	return c.turns >= preferredTurns
}

// pingPong gives how many flows are ping-pong, this one included, if it has been for a while; now and then.
func (ch *Chooser) pingPong(c *Choice, from Side, n int) (flows int) {
	switch {
	case n > pingPongBytes:
		c.turns = 0
		return 0
	case c.turn == from:
		return 0
	}
	c.turn = from
	if c.turns++; c.turns < pingPongTurns {
		return 0
	}
	now := moment.Now()
	isQuick := c.since.Age(now) < pingPongWithin
	c.turns, c.since = 0, now
	if !isQuick {
		return 0
	}
	return ch.count(c, now)
}

// count counts c, once in each stretch. If the flow was ping-pong in the one before too, it gives how many
// were then.
func (ch *Chooser) count(c *Choice, at moment.Moment) (flows int) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if stretch := int64(at) / int64(pingPongWithin); stretch != ch.stretch {
		if stretch != ch.stretch+1 {
			ch.now = 0
		}
		ch.stretch, ch.now, ch.last = stretch, 0, ch.now
	}
	if c.stretch == ch.stretch {
		return 0
	}
	wasBefore := c.stretch == ch.stretch-1
	c.stretch = ch.stretch
	ch.now++
	if !wasBefore {
		return 0
	}
	return ch.last
}

// Taken is told that a datapath has the flow that Message has chosen one for.
func (ch *Chooser) Taken(c *Choice) {
	if c.Prefers {
		return
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.now, ch.last = max(ch.now-1, 0), max(ch.last-1, 0)
}

// Refused is told that the datapath that was chosen has refused the flow.
func (c *Choice) Refused() { c.turns, c.refused = -refusedTurns, moment.Now() }

// MayBeOffered reports whether a flow that is quiet may be offered now: it was not refused lately.
func (c *Choice) MayBeOffered(now time.Time) bool {
	return c.Prefers && c.refused.Age(moment.Of(now)) >= refusedFor
}

// IsQuiet reports whether a flow that has moved so many bytes in so long is quiet.
func IsQuiet(bytes int64, within time.Duration) bool {
	return bytes <= int64(quietBytes*within.Seconds()/QuietWithin.Seconds())
}
