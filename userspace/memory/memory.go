// Package memory keeps what flows hold within a budget, and within what the kernel has for TCP.
//
// What the kernel has received for a reader who has stopped can't be given back but with the flow; and where
// TCP is short of memory it gives all others next to nothing. So a Watch looks at what is taken, and by whom:
// from half of the memory on little is taken at a time, from 5/8 on sources that hold much open no more
// connections, and from 3/4 on flows that have stood still for longest are ended, first those of the source
// that holds most.
//
// The watch measures, and decides. Who carries the flows is a [Relay], and what the watch asks of whoever
// accepts them, and tells it, is in [Options].
//
//	memory.go   the watch, as others use it
//	machine.go  how much memory there is
//	watch.go    when the watch looks, and what it does then
//	use.go      how much is taken of what there is
//	stalled.go  which connections stand still, and for how long
//	greedy.go   which sources are refused
//	end.go      which connections are ended
//
// All but machine.go is for Linux: elsewhere a Watch does nothing, and refuses nobody.
package memory

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
)

// What may be short: words of the metrics and of the log.
const (
	OfBudget = "memory"     // limits.memory
	OfTCP    = "tcp_memory" // net.ipv4.tcp_mem
)

// A Relay carries flows, and does with less memory when it is told to. Its methods are safe at any time.
type Relay interface {
	Piped() int64              // bytes that it holds itself, in pipes too
	MeasureHeld(now time.Time) // what [flow.Flow.Held] says next

	SaveMemory(isShort bool)  // whether it takes little at a time
	SaveSockets(isShort bool) // whether sockets' buffers grow no more
	SpareTCP(isScarce bool)   // whether readers that have not shown that they read are written less
}

// Options are what a Watch needs of others. Nothing of it may be nil, and all of it is safe at any time.
type Options struct {
	Log     *slog.Logger
	Limited Limited
	Relay   Relay
	Flows   *flow.Registry

	Connections func() int             // that there are
	Ports       func() map[uint16]bool // that connections were accepted at, also of flows that have ended
	// IsListeningAt reports whether connections are accepted at local.
	IsListeningAt func(local netip.AddrPort) bool
	// MayBeMany reports whether many clients may be behind an address.
	MayBeMany func(netip.Addr) bool
	// MayBeHere reports whether a target with that address may be on this machine, in a network namespace of
	// its own.
	MayBeHere func(netip.Addr) bool

	GiveUp func()                   // sockets of flows that have ended, since memory is short
	Ended  func(what string, n int) // so many connections, for want of OfBudget or OfTCP
}

// Limited logs what strangers cause: few lines of a kind.
type Limited interface {
	Info(kind, msg string, args ...any)
	Warn(kind, msg string, args ...any)
}

// A Watch keeps what flows hold within what there is. Make it with New; from Start to Close it looks. Until
// then, and afterwards, its answers are those of the last look.
type Watch struct {
	opts    Options
	log     *slog.Logger
	limited Limited
	budget  atomic.Int64 // bytes; 0: none
	// sources that open no connections, and what they hold; nil: there are none
	refused atomic.Pointer[map[netip.Prefix]int64]

	isIdle atomic.Bool // it looks again when wake says that somebody has connected
	wake   chan struct{}

	ctx    context.Context // until Close
	cancel context.CancelFunc
	looks  sync.WaitGroup
	state
}

// New returns a Watch without a budget, which does not look yet.
func New(o Options) *Watch {
	w := &Watch{opts: o, log: o.Log, limited: o.Limited, wake: make(chan struct{}, 1),
		state: state{proc: procfs, cgroups: cgroupfs}}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

// Start has it look from now on, until Close.
func (w *Watch) Start() { w.looks.Go(w.run) }

// Close ends that, and has the relay save nothing any more. It waits for a look that is under way.
func (w *Watch) Close() {
	w.cancel()
	w.looks.Wait()
	w.saveNothing()
}

// SetBudget says how much may be taken, in bytes; 0: that is not known.
func (w *Watch) SetBudget(bytes int64) { w.budget.Store(bytes) }

// Budget is the budget in force, in bytes; 0: none.
func (w *Watch) Budget() int64 { return w.budget.Load() }

// Connected says that somebody has connected. Cheap.
func (w *Watch) Connected() {
	if w.isIdle.Load() && w.isIdle.CompareAndSwap(true, false) {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// IsIdle reports whether it looks seldom until somebody connects.
func (w *Watch) IsIdle() bool { return w.isIdle.Load() }

// Refuse is a [*GreedyError] where source holds much of the memory while that is short. The zero Addr is
// nobody's. Cheap.
func (w *Watch) Refuse(source netip.Addr) error {
	sources := w.refused.Load()
	if sources == nil || !source.IsValid() {
		return nil
	}
	p := limit.PrefixOf(source)
	if _, ok := (*sources)[p]; ok {
		return &GreedyError{p}
	}
	return nil
}

// GreedyError says that a source holds much of the memory, while that is short.
type GreedyError struct{ Source netip.Prefix }

func (e *GreedyError) Error() string {
	return fmt.Sprintf("memory is short (limits.memory, net.ipv4.tcp_mem), "+
		"and readers of %s that have stopped hold much of it", e.Source)
}

// Status is what is taken of the memory that flows may take, in bytes. Saving says that so much is that less
// is buffered for each flow.
type Status struct {
	Used   int64 `json:"used"`   // by this process, its pipes and TCP sockets
	Budget int64 `json:"budget"` // limits.memory; 0: it is not known
	Saving bool  `json:"saving"`

	TCPUsed   int64 `json:"tcp_used"`   // by all TCP sockets of the machine
	TCPBudget int64 `json:"tcp_budget"` // the middle number of net.ipv4.tcp_mem; 0: it is not known
	TCPSaving bool  `json:"tcp_saving"`
}
