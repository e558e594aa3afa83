// Package handover passes the listening sockets of a process, and its live flows, to the one that takes
// its place, which is another program as a rule, and lets the two tell each other how far they are. Where
// a process ends without one that takes its place, the service manager keeps the sockets for the next: see
// [Store].
//
// A message is JSON in one packet of a pair of unix sockets, with descriptors beside it. The steps, in their
// order:
//
//	state    old to new  more of what goes with the sockets: before the last of them, and later what is new
//	sockets  old to new  what the old process listens on; with more, another message of them follows. The
//	                     last one says how many flows live
//	ready    new to old  the new process could start. It accepts nothing yet. taken: which sockets it uses.
//	                     sees_to_kept: it removes what is kept of flows, once it is the main one
//	yours    old to new  the old process accepts nothing any more: connections wait in the sockets' queues.
//	                     With it come the ends of the queue in which its flows are kept
//	serving  new to old  the new process accepts
//	main     old to new  the service manager was told that the new process is the main one
//	left     old to new  each second, what the old process still has to do, until it closes its end
//	newest   new to old  which process serves now, and whether it takes flows
//	end      new to old  the old process is to end within so many milliseconds
//	signal   old to new  a signal that the first process got, which is for the newest: one of them gets it
//	flows    old to new  the end of a connection by which flows come
//
// Until the old process has sent yours, the end of either process or of the connection is a failure, and the
// old one goes on. If the new process fails between yours and main, the old one accepts again: until the new
// one has said newest and served for a moment, and lives when the manager has heard of it, the old one has
// all that it had. If the old one ends after yours and before main, the new one is the main one all the same:
// it tells the service manager, and goes on with the flows that are kept.
//
// Live flows go by a connection that two processes have for themselves, so that its end is the end of the
// other. The old process stops moving a flow's bytes, and then, for one or several of them at a time:
//
//	flow     old to new  records of flows, each with its sockets. Nobody moves their bytes
//	taken    new to old  which of them the new process has registered
//	refused  new to old  which of them it does not take: the old one goes on with them
//	begin    old to new  which of them the new process has now: it begins to move bytes
//	keep     old to new  which of them the old process goes on with, because no answer came, or ends,
//	                     because they were killed meanwhile: they are forgotten
//
// The old process alone decides, by begin or keep. Where it dies first, the new one, which has read all that
// it has said, goes on with what is registered; where the new one dies, the old one goes on with what it has
// not let go. So nobody moves bytes that another has moved, and no flow is left that nobody moves: rules.go
// has these rules, and those of the steps before, which both processes act by, and tests explore them.
//
// For a process that ends without one that takes over, records of flows wait in a queue, each with its
// sockets: kept, from who has the flows to who comes after a crash. See [Queue].
//
// A message has the version of who sends it. Fields, steps and kinds of sockets that a process does not
// know are ignored, so that a newer one can say more: a step that must not be ignored gets another name.
// Fields of a flow's record, and of its sides, that a process does not know go on to the next one, which may.
//
// The files:
//
//	handover.go      messages
//	flow.go          records of flows
//	rules.go         who has a flow that is on its way, and which process is the main one
//	link_linux.go    messages go from one process to the other
//	start_linux.go   the new process, as the old one sees it
//	oom_linux.go     whom the kernel kills meanwhile where memory is short
//	take_linux.go    the old process, as the new one sees it
//	elders_linux.go  older processes that have not ended
//	store_linux.go   what the service manager keeps for the process that it starts after a crash
//	queue_linux.go   flows among that: a queue in the kernel, of which the manager has the ends
//	kept_linux.go    a flow of the queue goes on, or is reset
//	balance.go       how it is known whether bytes of a flow were lost
//	give_linux.go    flows go to another process
//	adopt_linux.go   flows come from another process
package handover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// Version is that of messages of this program.
const Version = 1

// The steps.
const (
	State   = "state"
	Sockets = "sockets"
	Ready   = "ready"
	Yours   = "yours"
	Serving = "serving"
	Main    = "main"
	Left    = "left"
	Newest  = "newest"
	End     = "end"
	Signal  = "signal"
	Flows   = "flows"

	FlowStep = "flow"
	Taken    = "taken"
	Refused  = "refused"
	Begin    = "begin"
	Keep     = "keep"

	keptStep = "kept"
)

// The kinds of a [Socket].
const (
	KindListener = "listener" // name: of the listener; address: as the configuration, or the tailnet, has it
	KindControl  = "control"  // address: the path
	KindMetrics  = "metrics"
	KindHealth   = "health"
	KindElder    = "elder" // the connection to an older process that has flows left; address: its process id
	KindFlows    = "flows" // the connection by which flows come

	KindDown     = "downstream" // of a flow: the connection that was accepted
	KindUp       = "upstream"
	KindDownRest = "downstream_rest" // a file that has the Rest of that side, where a message has no room
	KindUpRest   = "upstream_rest"

	// The ends of a queue of flows, of a generation: where they go in, and where they come out.
	KindFlowsIn  = "flows_in"
	KindFlowsOut = "flows_out"
)

// Socket is a descriptor on its way, and what it is for.
type Socket struct {
	Kind    string   `json:"kind"`
	Name    string   `json:"name,omitempty"`
	Address string   `json:"address,omitempty"`
	Tailnet bool     `json:"tailnet,omitempty"` // the address is this node's in the tailnet
	Flow    uint64   `json:"flow,omitempty"`    // the number of the flow that it is of
	File    *os.File `json:"-"`                 // of the message, closed by whoever receives it

	sock syscall.Conn // that is sent where there is no File
	conn net.Conn     // that was received in place of a File: a side of a flow
}

// Remains is what a process has left to do.
type Remains struct {
	PID         int       `json:"pid"`
	Version     string    `json:"version"`     // of its program
	Flows       int       `json:"flows"`       // that live
	Connections int       `json:"connections"` // of clients, those of flows included
	Deadline    time.Time `json:"deadline"`    // when it cuts what is left
	Ended       bool      `json:"-"`           // nothing is left, but it waits for the newest one's end
}

// Message is one step.
type Message struct {
	Version int      `json:"version"`
	Step    string   `json:"step"`
	Sockets []Socket `json:"sockets,omitempty"` // each has a descriptor, in this order
	More    bool     `json:"more,omitempty"`
	// State is what else goes with the sockets, in the last message of them, and in those of state; handover
	// does not read it.
	State   json.RawMessage `json:"state,omitempty"`
	Taken   []Socket        `json:"taken,omitempty"`   // without descriptors
	Remains *Remains        `json:"remains,omitempty"` // of left; of sockets: flows alone
	Ended   bool            `json:"ended,omitempty"`   // Remains.Ended
	PID     int             `json:"pid,omitempty"`     // of newest
	Within  int64           `json:"within,omitempty"`  // milliseconds
	Signal  int             `json:"signal,omitempty"`  // its number, of signal

	TakesFlows bool     `json:"takes_flows,omitempty"` // of newest
	Flows      []*Flow  `json:"flows,omitempty"`       // of flow
	Numbers    []uint64 `json:"numbers,omitempty"`     // of flows, where a step is about several
	Reason     string   `json:"reason,omitempty"`      // of refused
	// SeesToKept, of ready, is that the new process removes what is kept of flows, once it is the main one.
	SeesToKept bool `json:"sees_to_kept,omitempty"`
}

// mostBytes bounds a message, and mostFiles the descriptors beside it, of which the kernel takes 253.
const (
	mostBytes = 64 << 10
	mostFiles = 100
)

// encode is the reverse of Parse.
func (m Message) encode() ([]byte, error) {
	flows := m.Flows
	m.Flows = nil
	b, err := json.Marshal(m)
	if err != nil || len(flows) == 0 {
		return b, err
	}
	b = append(b[:len(b)-1], `,"flows":[`...) // by hand, since package json would read each record once more
	for i, f := range flows {
		record, err := f.MarshalJSON()
		if err != nil {
			return nil, err
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, record...)
	}
	return append(b, `]}`...), nil
}

// Parse reads a message that came with so many descriptors. Who sends it may be a program of any age, or
// broken: what does not fit together is an error.
func Parse(b []byte, files int) (*Message, error) {
	m, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("no message: %w", err)
	}
	switch {
	case m.Version < 1 || m.Step == "":
		return nil, errors.New("no message: it has no version or no step")
	case len(m.Sockets) != files:
		return nil, fmt.Errorf("message %q names %d sockets, and has %d", m.Step, len(m.Sockets), files)
	case m.Signal < 0 || m.Signal > 64 || m.PID < 0 || m.Within < 0 || time.Duration(m.Within) > mostWithin/time.Millisecond:
		return nil, fmt.Errorf("message %q has a number that can't be", m.Step)
	}
	for _, s := range m.Sockets {
		if s.Kind == "" {
			return nil, fmt.Errorf("message %q has a socket without a kind", m.Step)
		}
	}
	if r := m.Remains; r != nil {
		if r.PID < 0 || r.Flows < 0 || r.Connections < 0 {
			return nil, fmt.Errorf("message %q has a number that can't be", m.Step)
		}
		r.Ended = m.Ended
	}
	if err := checkFlows(m); err != nil {
		return nil, fmt.Errorf("message %q: %w", m.Step, err)
	}
	return m, nil
}

// decode reads a message, in which a newer program may say more.
func decode(b []byte) (*Message, error) {
	known := struct {
		Message
		Flows []*knownFlow `json:"flows"` // so that each is read once
	}{}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if dec.Decode(&known) == nil && !dec.More() {
		for _, f := range known.Flows {
			known.Message.Flows = append(known.Message.Flows, (*Flow)(f))
		}
		return &known.Message, nil
	}
	m := new(Message)
	dec = json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(m); err != nil {
		return nil, err
	}
	if dec.More() {
		return nil, errors.New("something follows it")
	}
	return m, nil
}

// mostWithin bounds how long a process may be told to take to its end.
const mostWithin = 30 * 24 * time.Hour

// Find returns the first of sockets of a kind that has the name and the address, or nil.
func Find(sockets []Socket, kind, name, address string) *Socket {
	for i, s := range sockets {
		if s.Kind == kind && s.Name == name && s.Address == address {
			return &sockets[i]
		}
	}
	return nil
}

// IsOfFlows reports whether s is an end of a [Queue].
func IsOfFlows(s Socket) bool { return s.Kind == KindFlowsIn || s.Kind == KindFlowsOut }

// Close closes the descriptors.
func Close(sockets []Socket) {
	for _, s := range sockets {
		if s.File != nil {
			s.File.Close()
		}
		if s.conn != nil {
			s.conn.Close()
		}
	}
}
