// Package relay is the userspace datapath: it copies the bytes of a flow between two connections, and hands
// the flow to a kernel [datapath.Datapath] where there is one that takes it.
//
// It is always there, needs no privilege, and is the oracle for every other datapath: package relaytest holds
// the table of cases that all of them pass.
//
// On Linux, between TCP and unix sockets, a flow begins on a loop, one goroutine with an epoll for many
// flows, where small messages are one read and one write. One that is ping-pong or quiet may be handed off to
// the kernel from there (package datapath decides), and comes back there when it is busy. A flow with more to
// move, or one that breaks, leaves the loop for two pumps: there bulk goes through a pipe with splice(2). A
// direction that waits for bytes holds neither a buffer nor a pipe, and pumps that have been idle for a
// while have no goroutine either: one epoll for all of them waits. A flow that a kernel datapath may have
// goes back to a loop when its pumps have little to do.
//
//	relay.go         what callers see: a relay, the options of a flow, its counters and its result
//	state.go         who has a flow, and which changes of that there are
//	flow.go          a flow between its two sides, its pumps, and its end
//	connect_linux.go a flow whose upstream is still connecting
//	onloop_linux.go  a flow on a loop: from its first bytes until it is detached or has ended
//	trial_linux.go   how much is read of a side at once, until its other side's reader is seen to read
//	pump_linux.go    a goroutine for a direction: reads and writes, or splice(2) through a pipe
//	shrink_linux.go  how sockets' buffers are kept from growing while memory is short
//	pipe_linux.go    the pipes
//	copy.go          a goroutine for a direction, for connections that are no bare sockets
//	park.go          timers, and sides that wait without a goroutine
//	cancel.go        flows are ended by their context
//	kill.go          a flow is ended by an operator, whoever has it
//	parcel.go        a flow leaves its relay, whoever has it, and goes on in another
//	leave_linux.go   how loops and pumps stop for that, at a moment when little is held
//	copies_linux.go  further descriptors of a flow's sockets, whoever has it
//	watch_linux.go   the epoll that waits for the sides that wait without a goroutine
//	handoff_linux.go from the begin to a loop, to a datapath and back, and from pumps to a loop
//	held_linux.go    what flows hold for readers that have no room
//
// Locks are taken in this order: that of a loop, flow.mu, and then one of those of watcher, quietSweep,
// pipePool, cancellations and [datapath.Chooser], under which nothing else is locked. holding.measuring comes
// before that of watcher. What a datapath is asked, and what a caller has given to be called, is called with
// no lock held, but for datapath.Returner's Active, and count.
package relay

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// A Relay relays flows, and has what they share. Make it with [New].
type Relay struct {
	loops   *loop.Reactor
	watches watcher
	pipes   pipePool
	buffers sync.Pool // of *[bufferSize]byte, lent for as long as bytes are in them
	chooser datapath.Chooser
	quiet   quietSweep
	cancels cancellations
	holding holding
	illegal atomic.Pointer[string]
}

// New makes a Relay whose flows begin on loops. The caller closes it, before loops.
func New(loops *loop.Reactor) *Relay {
	return &Relay{loops: loops, buffers: sync.Pool{New: func() any { return new([bufferSize]byte) }}}
}

// Close gives back what is kept for further flows. There must be none any more.
func (r *Relay) Close() {
	r.watches.close()
	r.pipes.drop()
}

// DefaultBuffer is Options.Buffer where it is 0, in bytes.
const DefaultBuffer = 2 << 20

// Options say how a flow is to be relayed. The zero value is a plain relay.
type Options struct {
	// Preface is written to upstream before everything else, and is not counted: a PROXY header.
	Preface []byte

	// Head is what was already read from downstream: it goes to upstream after Preface, in the same segment
	// where possible, and is counted as the flow's bytes.
	Head []byte

	// Buffer bounds in bytes what one direction of the flow may hold in this process and its pipe; the
	// sockets' own buffers are bounded by sysctls. 0 = DefaultBuffer.
	Buffer int64

	// Idle ends the flow when no byte has moved either way for so long; 0 = never. Coarse: the flow may live
	// up to 1/4 longer. A flow whose reader has stopped is idle too.
	Idle time.Duration

	// MeasureRTT asks for Result.RTT.
	MeasureRTT bool

	// Counters, when not nil, can be read while the flow lives.
	Counters *Counters

	// Copied says that Counters are asked for Copies, which a flow that a datapath has gives only then.
	Copied bool

	// ID and Route name the flow in a kernel datapath's tables.
	ID, Route string

	// Datapaths are offered the flow, in this order, as it begins. The first that takes it has it; one that
	// is a [datapath.Returner] records it, and has it while it is ping-pong or quiet. Only flows between two
	// TCP sockets are offered, on Linux.
	Datapaths []datapath.Datapath

	// WhenPingPong are offered the flow, in this order, when it is found to be ping-pong: small messages go
	// back and forth, quickly. Until then, and when they refuse, it is relayed here, and offered again later.
	// Only flows between two TCP sockets, on Linux.
	WhenPingPong []datapath.Returner

	// Refused, when not nil, hears of each datapath that refuses the flow, or gives it back later. It may be
	// called from any goroutine and must not block.
	Refused func(datapath string, reason error)

	parkAfter time.Duration // for tests; 0 = parkAfter
}

// Counters hold the bytes that a flow has moved so far. The zero value is ready for one flow.
type Counters struct {
	up, down atomic.Int64
	kernel   atomic.Pointer[holder] // the datapath that has the flow now; nil: this package
	flow     atomic.Pointer[flow]   // that is counted, while it lives
	killed   atomic.Pointer[error]  // why it is to end at once, or nil
	leave    atomic.Pointer[leaveRequest]

	held, sweep atomic.Int64 // what MeasureHeld has found, and when
	since       moment.Var
}

type holder struct {
	name   string
	count  func() (up, down int64)
	forget func() // takes the flow out of its tables, or nil
}

// Load gives the bytes that went to upstream and to downstream, without Options.Preface. Safe for concurrent
// use, also after the flow has ended.
func (c *Counters) Load() (up, down int64) {
	if k := c.kernel.Load(); k != nil {
		return k.count()
	}
	return c.up.Load(), c.down.Load()
}

// own is what this package has counted.
func (c *Counters) own() (up, down int64) { return c.up.Load(), c.down.Load() }

// Datapath names what has the flow now, as Result.Datapath does. Safe for concurrent use.
func (c *Counters) Datapath() string {
	if k := c.kernel.Load(); k != nil {
		return k.name
	}
	return userspace
}

// userspace names this package among the datapaths.
const userspace = "userspace"

// End says how a flow ended. Its values are stable words, fit for logs and metric labels.
type End string

const (
	EndEOF             End = "eof"              // both sides had sent all they wanted
	EndDownstreamReset End = "downstream_reset" // the side that was accepted reset the connection
	EndUpstreamReset   End = "upstream_reset"   // the side that was dialled did
	EndIdle            End = "idle"             // Options.Idle passed without a byte
	EndCanceled        End = "canceled"         // the context was canceled
	EndError           End = "error"            // a socket failed in another way: see Result.Err
)

// Result is what there is to say about a flow that has ended.
type Result struct {
	Up, Down int64  // bytes given to upstream's and to downstream's TCP, without Options.Preface
	End      End    //
	Err      error  // more about End; nil with EndEOF
	Datapath string // the datapath that had the flow last: "userspace" or the Name of a Datapath

	// RTT is TCP's estimate of the round trip time to downstream and to upstream as the flow began, 0 for
	// what is not TCP, and without Options.MeasureRTT.
	RTT [2]time.Duration
}

// Run copies between down and up until the flow ends, and closes both. It returns as soon as the flow is on
// its way; before that, Preface and Head may wait for upstream. done is called once, on any goroutine, when
// the flow has ended and both conns are closed; it must not block.
//
//   - The end of one side's stream is passed on as such (half-close), and the other direction goes on.
//   - A reset is passed on as a reset, at once also when the direction has already ended, or when the
//     other side's reader has stopped. What was received before it is still delivered, the end of the
//     stream too, until the reader has no room for 2 s. Meanwhile nothing more is taken from the other
//     side. Other failures of a socket reset the other side too.
//   - Idle timeout, a canceled ctx and [Counters.Kill] reset both sides.
//   - An urgent byte (MSG_OOB) arrives in its place in the stream, as an ordinary one.
//
// *net.TCPConn and *net.UnixConn must be given bare, not wrapped, for splice(2), and for idle flows to be
// cheap. Any other net.Conn works; where it has no CloseWrite, the end of the other side's stream closes it,
// which ends the flow. Only TCP can be reset: a unix socket is closed. On other systems than Linux, and on
// wrapped connections, a reset that comes after the end of that side's stream is noticed by the next write
// only.
func (r *Relay) Run(ctx context.Context, down, up net.Conn, o Options, done func(Result)) {
	if o.MeasureRTT {
		done = withRTT(done, roundTrip(down), roundTrip(up))
	}
	r.newFlow(ctx, down, up, o, done).run()
}

func roundTrip(c net.Conn) (rtt time.Duration) {
	tcpsock.Control(c, func(fd int) { rtt = tcpsock.RoundTrip(fd) })
	return rtt
}

func withRTT(done func(Result), down, up time.Duration) func(Result) {
	return func(r Result) {
		r.RTT = [2]time.Duration{down, up}
		done(r)
	}
}
