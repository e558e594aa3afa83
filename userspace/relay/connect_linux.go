package relay

import (
	"bytes"
	"context"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// Connecting is an upstream that a caller has begun to connect.
type Connecting struct {
	FD        int                                // its socket, non-blocking; the relay closes it
	Connected bool                               // it is connected already
	Check     func() (connected bool, err error) // reports how far it is, or why it has failed
	Within    time.Duration                      // how long it may take from now on

	// Failed is called when it can't be connected, or not in time, where err is nil: the downstream socket is
	// the caller's again, as is head, which was to be written.
	Failed func(head []byte, err error)
}

// RunConnecting is [Relay.Run] for a socket of a loop that nobody waits for, and an upstream that may still
// be connecting. Both have the options of [tcpsock.SetOptions]. The flow begins when it is connected; either
// done or up.Failed is called. o.Head is written, or copied, when it returns.
func (r *Relay) RunConnecting(ctx context.Context, down *loop.Socket, up Connecting, o Options, done func(Result)) {
	c := &connecting{Connecting: up, flow: r.newFlow(ctx, nil, nil, o, done), down: down, up: down.Loop().NewSocket(up.FD)}
	if up.Connected {
		c.run()
		return
	}
	c.flow.o.Head = bytes.Clone(o.Head)
	c.until = time.Now().Add(up.Within)
	c.await()
}

// A connecting is a flow that begins when its upstream is connected.
type connecting struct {
	Connecting
	flow     *flow
	down, up *loop.Socket
	until    time.Time
}

func (c *connecting) await() {
	if c.up.AwaitConnect(time.Until(c.until), c.check) != nil {
		c.fail(nil)
	}
}

// check is called on the loop when the upstream is connected, has failed, or has taken too long.
func (c *connecting) check(timedOut bool) {
	switch connected, err := c.Check(); {
	case err != nil || !connected && timedOut:
		c.fail(err)
	case connected:
		c.run()
	default:
		c.await()
	}
}

func (c *connecting) run() {
	f := c.flow
	if f.o.MeasureRTT {
		f.done = withRTT(f.done, tcpsock.RoundTrip(c.down.FD()), tcpsock.RoundTrip(c.up.FD()))
	}
	for _, d := range f.o.Datapaths {
		if _, ok := d.(datapath.Returner); !ok { // it may take the flow at once, which lasts
			c.down.Loop().Do(func() (then func()) {
				f.toPoller(c.down, c.up)
				return func() { go f.run() }
			})
			return
		}
	}
	f.begin(c.down, c.up)
}

func (c *connecting) fail(err error) {
	c.up.Close()
	c.flow.counters.flow.Store(nil)
	c.flow.counters.endLeave("not connected")
	c.Failed(c.flow.o.Head, err)
}
