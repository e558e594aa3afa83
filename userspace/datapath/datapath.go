// Package datapath says what a kernel datapath is, and which flows it gets.
//
//	datapath.go  the contract of a datapath and the relay
//	choose.go    which flows a datapath has, of those that it may have, and when
//
// A [Chooser] has one lock, under which nothing else is locked. A [Choice] has none.
package datapath

import (
	"context"
	"time"
)

// A Datapath moves a flow's bytes without the relay: in the kernel, between the two sockets. The interface
// uses standard library types only, so that an implementation needs no import of this package; the main
// package asserts that they fit.
//
// Implementations must be safe for concurrent use.
type Datapath interface {
	// Name is the word that configuration, logs and metrics use for it: "sockmap", "sk_msg".
	Name() string

	// Splice takes the flow between two TCP sockets, or refuses it. It returns soon: it never waits for the
	// flow to end, so a flow that was taken needs no goroutine.
	//
	// What the caller promises: both descriptors are non-blocking and in nobody's poller; the sockets are
	// established and no direction has ended; no byte of the flow is held in this process (whatever was read
	// from one socket was written to the other); nobody else reads, writes or closes them until the flow is
	// given back. The receive queues may hold bytes that nobody has read. Where the first skb in them was
	// read in part, no more than 256 KiB were: a verdict gets whole skbs, and can cut off so much.
	//
	// A nil error: the datapath owns both descriptors and calls exactly one of h.Ended and h.Returned, once,
	// from any goroutine (possibly before Splice has returned). It keeps the promises of the relay:
	// half-close in both orders, a reset passed on as a reset, h.Buffer, h.Idle, and ctx: when ctx is
	// canceled it resets both sides and ends the flow promptly. count is cheap, safe for concurrent use, and
	// valid also after the end: it gives the bytes moved each way, h.Up and h.Down included.
	//
	// An error: the flow is refused. No byte was read or written, the sockets are in no map and have their
	// old options, and neither h.Ended nor h.Returned is ever called. The error is the reason: its text is
	// short, and one of few, since it is counted by its text. One with a method Later(isNew bool) bool that
	// gives true is no answer for good: the flow may be offered again. isNew: it has been nowhere else
	// before.
	Splice(ctx context.Context, down, up int, h Handoff) (count func() (up, down int64), err error)
}

// A Returner is a [Datapath] that has flows while they are ping-pong or quiet, gives them back when they are
// busy, and may have each again. Another has a flow from its begin to its end.
type Returner interface {
	Datapath

	// Record shows a flow that prefers this datapath in the datapath's tables, from its begin to forget,
	// whoever moves its bytes. An error is a refusal, as Splice's is: the flow stays with the relay then.
	// forget may be called when the datapath has been closed.
	Record(down, up int, h Handoff) (forget func(), err error)

	// Active is how many of its flows moved something lately. Cheap. ok is false where it takes no flow at
	// all.
	Active() (flows int, ok bool)
}

// Health is what a [Datapath] has besides if it can say how it is, to be shown in `tailsplice status` and the
// metrics.
type Health interface {
	// Health gives why the datapath takes no more flows ("": it does), and how often since its start a flow
	// had come to rest with bytes to move, and went on only because somebody looked. Cheap, and safe for
	// concurrent use.
	Health() (off string, stalls uint64)
}

// Leaver is a [Datapath] that new flows of another process have to do with.
type Leaver interface {
	// Leave is called once, when new flows begin in another process. Those that are here go on, and no more
	// are taken.
	Leave()
}

// A Handoff is what a [Datapath] is told about a flow, and how it answers. It is an alias of a struct literal
// so that an implementation in a package that may not import this one can write down the identical type; a
// difference is a compile error where the two are joined.
type Handoff = struct {
	// ID and Route name the flow in the datapath's own tables. For people to read; may be empty.
	ID, Route string

	// Up and Down are the bytes that the flow has moved so far (downstream to upstream, and back): where the
	// datapath's counts begin.
	Up, Down int64

	// Buffer bounds in bytes what one direction may hold outside of the sockets' own buffers. > 0.
	Buffer int64

	// Idle ends the flow when no byte has moved either way for so long; 0 = never. Coarse: a flow may live up
	// to 1/4 longer.
	Idle time.Duration

	// LastMoved is when a byte was last seen to move; the zero Time is not known.
	LastMoved time.Time

	// Moved gives, as from count, what has moved while the relay has the flow. Cheap.
	Moved func() (up, down int64)

	// Busy is in bytes per second. A flow one of whose directions moves as much for a while is given back, if
	// the datapath can; 0 = never.
	Busy int64

	// Ended reports that the flow is over and that both sockets are closed. end is the text of the relay's
	// End: "eof", "downstream_reset", "upstream_reset", "idle", "canceled" or "error"; err says more, and is
	// nil with "eof". up and down are the final counts, as from count. It does not block.
	Ended func(up, down int64, end string, err error)

	// Recallable, when not nil, is called once, before Splice returns, by a datapath that gives a flow back
	// when it is asked to. recall asks, and does not block. It may be called from any goroutine, also when
	// the flow is over. The flow is given back as soon as that can be.
	Recallable func(recall func())

	// Returned gives the flow back, to go on in userspace: the sockets are out of every map, and each byte
	// that was taken from one socket was given to the other's TCP, or read by a process that it went to past
	// TCP, but for downRest and upRest, which were read from downstream and upstream last, are within Buffer,
	// and are not in upBytes and downBytes. The descriptors are non-blocking and in nobody's poller; the
	// relay owns them from here on. Neither stream has ended (a FIN may wait in a receive queue, unread), but
	// where the flow was recalled: then the end of one may have been passed on, and our stream to the other
	// side has ended, as TCP tells. lastMoved is as LastMoved, now. The flow stays in the datapath's tables,
	// as by Record, until forget, if that is not nil. It does not block.
	Returned func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, lastMoved time.Time,
		forget func(), reason error)
}
