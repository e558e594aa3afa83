package relay

import (
	"bytes"
	"context"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
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
// be connecting. The flow begins when it is connected; either done or up.Failed is called. o.Head is written,
// or copied, when it returns.
func (r *Relay) RunConnecting(ctx context.Context, down *loop.Socket, up Connecting, o Options, done func(Result)) {
	c := &connecting{Connecting: up, relay: r, ctx: ctx, down: down, up: down.Loop().NewSocket(up.FD), o: o, done: done}
	if up.Connected {
		c.run()
		return
	}
	c.o.Head = bytes.Clone(o.Head)
	c.until = time.Now().Add(up.Within)
	c.await()
}

// A connecting is a flow that begins when its upstream is connected.
type connecting struct {
	Connecting
	relay    *Relay
	ctx      context.Context
	down, up *loop.Socket
	until    time.Time
	o        Options
	done     func(Result)
}

func (c *connecting) await() {
	if c.up.AwaitConnect(time.Until(c.until), c.look) != nil {
		c.fail(nil)
	}
}

// look is called on the loop when the upstream is connected, has failed, or has taken too long.
func (c *connecting) look(timedOut bool) {
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
	if c.o.MeasureRTT {
		c.o.MeasureRTT = false // once
		c.done = withRTT(c.done, tcpsock.RoundTrip(c.down.FD()), tcpsock.RoundTrip(c.up.FD()))
	}
	c.relay.RunSockets(c.ctx, c.down, c.up, c.o, c.done)
}

func (c *connecting) fail(err error) {
	c.up.Close()
	c.Failed(c.o.Head, err)
}
