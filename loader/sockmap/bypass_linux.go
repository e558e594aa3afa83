package sockmap

import "github.com/cilium/ebpf"

// Bypass moves a part of a flow's bytes past TCP, between downstream and the socket of a process on this host
// that is the other end of upstream. The flow calls it, also at the same time.
type Bypass interface {
	// Sources is the sockmap whose verdict the flow's sockets get.
	Sources() *ebpf.Map
	// Counts are those that the flow is counted in.
	Counts() *Counts
	// Prepare makes the flow known to the programs, by its slot and its downstream's cookie. Nothing moves
	// before Enable, and nothing more after Disable, which is called before downstream's socket is closed.
	Prepare(slot uint32, downstream uint64) error
	Enable()
	Disable()
	// WhenDisabled calls do, on another goroutine, when no program is at work that has not seen a Disable
	// before: what Moved gives does not grow any more. It never does so if that can't be known.
	WhenDisabled(do func())
	// Leave is called before Release for a flow that is given back: the process's socket, for which nothing
	// is past TCP, is one like any other then.
	Leave()
	// Release forgets the flow, which has ended. Undo is called instead for one that has not begun.
	Release()
	Undo()
	// FreeSlot gives a slot back when no program is at work on its flow.
	FreeSlot(slot uint32)
	// Moved is how many bytes of a direction went past TCP. Valid until Release.
	Moved(side uint32) uint64
	// HasBacklog reports whether bytes are on their way to the process's queue. Bytes, and an end, that go to
	// it by TCP now would overtake them.
	HasBacklog() bool
	// HasUnread reports whether bytes are past TCP that the process has not read, or may not have read when
	// it closed its socket. Only for who runs the direction to it.
	HasUnread() bool
	// ClosedUnread reports whether the process has closed its socket with bytes unread, which resets a
	// connection.
	ClosedUnread() bool
	// Settle corrects the count of what has moved past TCP to downstream, of a direction that rests. byTCP is
	// what came by TCP. It reports whether the count was too large.
	Settle(byTCP uint32) bool
}

// tcpOnly is the Bypass of a flow all of whose bytes go through TCP.
type tcpOnly struct{ *Engine }

func (t tcpOnly) Sources() *ebpf.Map         { return t.objects.Sources }
func (t tcpOnly) Counts() *Counts            { return &t.counts }
func (tcpOnly) Prepare(uint32, uint64) error { return nil }
func (tcpOnly) Enable()                      {}
func (tcpOnly) Disable()                     {}
func (tcpOnly) WhenDisabled(do func())       { go do() }
func (tcpOnly) Leave()                       {}
func (tcpOnly) Release()                     {}
func (tcpOnly) Undo()                        {}
func (tcpOnly) Moved(uint32) uint64          { return 0 }
func (tcpOnly) HasBacklog() bool             { return false }
func (tcpOnly) HasUnread() bool              { return false }
func (tcpOnly) ClosedUnread() bool           { return false }
func (tcpOnly) Settle(uint32) bool           { return false }

// isByTCP reports whether all of the flow's bytes go through TCP.
func (f *flow) isByTCP() bool { _, ok := f.bypass.(tcpOnly); return ok }
