package relay

import "slices"

// A state says who has a flow. It changes by enter alone, as the table below allows.
//
//	onLoop ◄───► inTransit ◄───► handedOff
//	               │   ▲ ▲
//	               ▼   │ └──────── leaving ◄── pumping, parking, parked
//	              pumping ◄───► parking
//	               │   ▲           │
//	               │   │           ▼
//	               │   └──────── parked
//	               ▼               │
//	             ending ◄──────────┘        each but parked ───► done
//
// Where what is held for a reader is too much to leave with, leaving goes back to pumping, and where a side
// breaks, to ending.
//
// A flow that a datapath gives back, or that goes from pumps to a loop, goes on as another one, and the
// former is done, as is one that has left: timers and watches that come late find that it is, and leave the
// sockets alone.
type state uint8

const (
	inTransit state = iota // one goroutine has it, and is about to give it to a loop, a datapath or to pumps
	onLoop                 // a loop reads both sides: whoever has that to itself has the flow
	handedOff              // a datapath has it, or is being asked
	pumping                // a pump reads each side that is flowing
	parking                // pumping, and pumps were told to return as soon as they have nothing to write
	parked                 // no pump runs: watches looks out for bytes
	leaving                // pumps were told to return since the flow is to leave: see Counters.Leave
	ending                 // it is known how it ends, and pumps deliver what came before that
	// nothing of it runs any more; its result was reported, or it goes on as another, or has left
	done
	states
)

var stateNames = [states]string{"in transit", "on a loop", "handed off", "pumping", "parking", "parked", "leaving", "ending", "done"}

// next are the states that may follow each.
var next = [states][]state{
	inTransit: {onLoop, handedOff, pumping, ending, done},
	onLoop:    {inTransit, done},
	handedOff: {inTransit, done},
	pumping:   {inTransit, parking, parked, leaving, ending, done},
	parking:   {inTransit, pumping, parked, leaving, ending, done},
	parked:    {pumping, leaving, ending},
	leaving:   {inTransit, pumping, ending, done},
	ending:    {done},
}

// enter changes the state. An illegal change is made all the same, and told by [Relay.Illegal].
//
// +checklocks:f.mu
func (f *flow) enter(s state) {
	if !slices.Contains(next[f.state], s) {
		f.relay.illegal.CompareAndSwap(nil, new(stateNames[f.state]+" to "+stateNames[s]))
	}
	f.state = s
}

func (f *flow) isIn(s state) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state == s
}

// hasPumps: pumps have the flow, though none may run.
//
// +checklocks:f.mu
func (f *flow) hasPumps() bool { return f.state >= pumping && f.state < done }

// Illegal is the first change of a flow's state that is not in the table, which is a fault of this package;
// nil where there was none. For tests.
func (r *Relay) Illegal() *string { return r.illegal.Load() }
