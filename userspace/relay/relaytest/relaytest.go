// Package relaytest is the table of cases that every datapath must pass.
//
// A case gets the two ends of flows from a [Path], and says nothing about what is in between: the relay
// in this process on loopback ([Loopback]), a kernel datapath behind it (Loopback with Options.Datapaths),
// or whole daemons in namespaces ([Through]). The cases check each byte, how each stream ends, and that
// nothing is left behind.
//
//	func TestCases(t *testing.T) {
//		relaytest.Run(t, relaytest.Loopback{}.Path(t), relaytest.DefaultSize())
//	}
//
// The table and its cases:
//
//	relaytest.go     the table; a flow, as a case sees it
//	data.go          cases of bytes
//	ends.go          cases of how streams end
//	options.go       cases of what a flow is told: buffers, limits, counters
//	stream.go        bytes that say where in the stream they belong
//	leak.go          nothing is left behind
//	loopback.go      flows on this host
//	hop.go           flows that go from one relay to another all the time
//	sock.go          what cases ask of sockets
//	window_linux.go  whether a window update was refused, for want of memory
//
// More that runs over the same flows:
//
//	wire_linux.go            segments by hand (package wire)
//	reach_linux.go           a cable that is pulled out
//	soak_linux.go            the table for an hour
//	stall_linux.go           flows that stand still and should not
//	pairs_linux.go           all orders of two events at both ends
//	programs_linux.go        random programs of both ends
//	programs_few_linux.go    the same ones each time
//	programs_many_linux.go   others each time, with the tag soak
//	program_linux.go         a program: its text, and how one is made up
//	program_run_linux.go     its run
//	program_model_linux.go   what its ends may see
//	program_shrink_linux.go  a shorter one that fails, too
package relaytest

import (
	"context"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// A Path makes flows through what is tested.
type Path struct {
	// Dial makes a new flow and gives its two ends, which the case closes. *net.TCPConn, but for
	// paths that end in a unix socket. Safe for concurrent use.
	Dial func(t testing.TB) (client, server net.Conn)

	// Connect makes the sockets of a flow in this process, for a case that starts the relay itself, with
	// options. Where it is nil, the cases about options, results and memory are left out.
	Connect func(t testing.TB) *Flow

	// NoReset: the path has a unix socket in it, on which there is no reset.
	NoReset bool

	// Skip are the names of cases that the path can't show.
	Skip []string

	// Loses: the path loses packets, and with them resets, which nobody repeats: an end is told when a probe
	// of keepalive finds the other one gone. The daemon's come after a minute of silence, and then every 30
	// s.
	Loses bool

	// PIDs are the daemons in between. Their sockets are counted at the end. 0 is this process.
	PIDs []int
}

// A Flow is a flow in this process.
type Flow struct {
	Client, Server net.Conn // the ends
	Down, Up       net.Conn // the sockets of the relay, which owns them: to look at, by SyscallConn
	start          func(context.Context, relay.Options)
	result         chan relay.Result
}

// Start starts the relay.
func (f *Flow) Start(ctx context.Context, o relay.Options) { f.start(ctx, o) }

// Result waits for the flow to end.
func (f *Flow) Result(t testing.TB) relay.Result {
	t.Helper()
	select {
	case r := <-f.result:
		f.result <- r
		return r
	case <-time.After(patience):
		t.Fatal("the flow does not end")
		panic("unreachable")
	}
}

// Size says how much the cases do.
type Size struct {
	Big        int64         // bytes each way of the big transfer
	Behind     int64         // bytes that follow a half-close the other way
	Random     int           // flows of random size up to 4 MiB each way, one after the other
	Short      int           // short flows, one after the other
	Concurrent int           // flows at once
	Flow       int64         // bytes of a flow of random size, at most
	Rounds     int           // requests of one flow
	Repeat     int           // times that a case which has to hit a moment is tried
	Stop       time.Duration // how long a reader stops
	Stalled    int           // flows whose readers have stopped, at once
	Slow       bool          // the cases that mostly wait, too
}

// DefaultSize takes well under a minute with -race on two slow cores. RELAYTEST in the environment says
// otherwise: "soak" is what a release has to pass, "slow" is for machines of a tenth of the speed.
func DefaultSize() Size {
	switch os.Getenv("RELAYTEST") {
	case "slow":
		return SmallSize()
	case "soak":
		return Size{Big: 1 << 30, Behind: 32 << 20, Random: 200, Short: 5000, Concurrent: 500, Flow: 4 << 20,
			Rounds: 20000, Repeat: 20, Stop: 30 * time.Second, Stalled: 200, Slow: true}
	}
	return Size{Big: 32 << 20, Behind: 32 << 20, Random: 20, Short: 1000, Concurrent: 100, Flow: 256 << 10,
		Rounds: 1000, Repeat: 3, Stop: 300 * time.Millisecond, Stalled: 60, Slow: true}
}

// SmallSize is for the paths that differ little from one that DefaultSize has been through.
func SmallSize() Size {
	return Size{Big: 4 << 20, Behind: 4 << 20, Random: 4, Short: 50, Concurrent: 20, Flow: 256 << 10,
		Rounds: 200, Repeat: 1, Stop: 100 * time.Millisecond}
}

// patience is how long anything may take before it counts as stalled.
const patience = 60 * time.Second

// resetIn is how long an end may take to be told of a reset, where it is usual on a path that loses nothing.
func (p Path) resetIn(usual time.Duration) time.Duration {
	if p.Loses {
		return 4 * time.Minute
	}
	return usual
}

// A Case is one row of the table.
type Case struct {
	Name   string
	Slow   bool // only with Size.Slow
	Reset  bool // needs a path on which there are resets
	Inside bool // needs Path.Connect
	Waits  bool // mostly waits, and measures nothing: it runs at once with others that do
	Run    func(t *testing.T, p Path, s Size)
}

// Cases returns the table.
func Cases() []Case {
	return []Case{
		{Name: "random sizes", Run: randomSizes},
		{Name: "big both ways", Run: bigBothWays},
		{Name: "short flows", Run: shortFlows},
		{Name: "concurrent flows", Run: concurrentFlows},
		{Name: "request and response", Run: requestResponse},
		{Name: "bulk and quiet in turn", Run: bulkAndQuiet},
		{Name: "one byte a segment", Run: byteSegments},
		{Name: "reader stops and goes on", Run: readerStops},
		{Name: "zero window", Slow: true, Waits: true, Run: zeroWindow},
		{Name: "urgent byte", Reset: true, Run: urgentByte},
		{Name: "keepalive", Slow: true, Reset: true, Waits: true, Run: keepAlive},

		{Name: "half-close", Run: halfClose},
		{Name: "half-close at once", Run: halfCloseAtOnce},
		{Name: "fin with data", Reset: true, Run: finWithData},
		{Name: "reset", Reset: true, Run: reset},
		{Name: "reset behind data", Reset: true, Run: resetBehindData},
		{Name: "reset behind data that waits", Reset: true, Run: resetBehindWaiting},
		{Name: "reset behind data for a slow reader", Slow: true, Reset: true, Waits: true,
			Run: resetSlowReader},
		{Name: "reset holds the sender up", Slow: true, Reset: true, Waits: true, Run: resetHoldsSender},
		{Name: "reset mid-stream", Reset: true, Run: resetMidStream},
		{Name: "reset after half-close", Reset: true, Run: resetAfterHalfClose},
		{Name: "reset while the reader has stopped", Slow: true, Reset: true, Waits: true,
			Run: resetWhileStopped},
		{Name: "close with bytes unread", Reset: true, Run: closeUnread},

		{Name: "head", Inside: true, Run: head},
		{Name: "sent before the splice", Inside: true, Run: sentBefore},
		{Name: "result", Inside: true, Reset: true, Run: result},
		{Name: "counters", Inside: true, Run: counters},
		{Name: "buffer bound", Slow: true, Inside: true, Run: bufferBound},
		{Name: "stalled flows cost nothing", Slow: true, Inside: true, Run: stalledCost},
		{Name: "idle timeout", Inside: true, Waits: true, Run: idleTimeout},
		{Name: "idle timeout of a stalled flow", Inside: true, Waits: true, Run: idleStalled},
		{Name: "cancel", Inside: true, Run: cancelFlow},
		{Name: "kill", Inside: true, Run: killFlow},
	}
}

// Run runs every case that the path can show, and checks that nothing is left at the end.
func Run(t *testing.T, p Path, s Size) {
	if p.Dial == nil {
		p.Dial = func(t testing.TB) (client, server net.Conn) {
			f := p.Connect(t)
			f.Start(context.Background(), relay.Options{})
			return f.Client, f.Server
		}
	}
	before := take(p)
	var waiting []Case
	for _, c := range Cases() {
		if c.Inside && p.Connect == nil || c.Reset && p.NoReset || slices.Contains(p.Skip, c.Name) || c.Slow && !s.Slow {
			continue
		}
		if c.Waits {
			waiting = append(waiting, c)
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			c.Run(t, p, s)
			before.check(t, p)
		})
	}
	if len(waiting) > 0 {
		t.Run("at once", func(t *testing.T) { runAtOnce(t, p, s, waiting) }) // which ends when all have
		before.check(t, p)
	}
}

// runAtOnce runs cases that mostly wait.
func runAtOnce(t *testing.T, p Path, s Size, cases []Case) {
	var dialling sync.Mutex // as in eachRole
	one := p
	one.Dial = func(t testing.TB) (client, server net.Conn) {
		dialling.Lock()
		defer dialling.Unlock()
		return p.Dial(t)
	}
	if p.Connect != nil {
		one.Connect = func(t testing.TB) *Flow {
			dialling.Lock()
			defer dialling.Unlock()
			return p.Connect(t)
		}
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			c.Run(t, one, s)
		})
	}
}
