package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"
)

// FlowVersion is that of records of this program.
const FlowVersion = 1

// mostRest bounds in bytes what a record says to be read from a side and not yet written.
const mostRest = 64 << 10

// mostIdle bounds the idle time of a flow in a record: a configuration may have a year and more.
const mostIdle = 100 * 366 * 24 * time.Hour

// Flow is the record of a flow: what another process needs to go on with it, and to show it as before. Fields
// that this program does not know stay with it, and with each of its sides. Those of Kept do not: each
// process counts anew, so that the zero value of a field that is added there has to stand for what was done
// before.
type Flow struct {
	Version int    `json:"version"`
	Number  uint64 `json:"number"` // between two processes; its id may be that of several

	ID         string    `json:"id"`
	Listener   string    `json:"listener"`
	Route      string    `json:"route"`
	Name       string    `json:"name,omitempty"`
	Client     string    `json:"client"`
	Downstream string    `json:"downstream"`
	Upstream   string    `json:"upstream"`
	Target     string    `json:"target"`
	Started    time.Time `json:"started"`
	BytesUp    int64     `json:"bytes_up"`
	BytesDown  int64     `json:"bytes_down"`
	IdleSince  time.Time `json:"idle_since"`

	Source      string `json:"source,omitempty"` // the address that limits count it for; "": in all only
	Shared      bool   `json:"shared,omitempty"` // the client may be many
	Transparent bool   `json:"transparent,omitempty"`
	Container   string `json:"container,omitempty"`    // of the target's name; it may stop if unused
	Datapath    string `json:"datapath"`               // as the configuration has it
	Buffer      int64  `json:"buffer"`                 // bytes
	IdleTimeout int64  `json:"idle_timeout,omitempty"` // ms; 0: none

	Down Side `json:"down"`
	Up   Side `json:"up"`

	Kept *Balance `json:"kept,omitempty"` // of a record that is kept for the process after a crash; else nil

	// IsKilled is asked before another process is told to begin: where it is true the flow stays, to be
	// ended. nil: it never is.
	IsKilled func() bool `json:"-"`

	unknown map[string]json.RawMessage // those of a side are an object by the side's name
	encoded []byte                     // what MarshalJSON returns; nil: it is not known yet
}

// Side is one of a flow's two connections.
type Side struct {
	Conn    net.Conn `json:"-"`               // a *net.TCPConn or *net.UnixConn
	Rest    []byte   `json:"rest,omitempty"`  // read from it, and not yet written to the other
	IsEnded bool     `json:"ended,omitempty"` // the end of its stream was read
	IsShut  bool     `json:"shut,omitempty"`  // our stream to it has ended
}

// Close closes both connections, which leaves alone those of another process.
func (f *Flow) Close() {
	for _, s := range []*Side{&f.Down, &f.Up} {
		if s.Conn != nil {
			s.Conn.Close()
		}
	}
}

// Unknown are the fields of f that this program does not know, for a record that is made later; nil: none.
func (f *Flow) Unknown() map[string]json.RawMessage { return f.unknown }

// SetUnknown adds what Unknown of an earlier record returned.
func (f *Flow) SetUnknown(fields map[string]json.RawMessage) { f.unknown = fields }

// Adopt registers a flow that has come, and moves none of its bytes before begin is called. Either begin or
// forget is called once, and not before Adopt has returned. Whatever it returns, the connections are its own:
// with an error it has closed them, and the other process goes on with the flow.
type Adopt func(f *Flow) (begin, forget func(), err error)

// ErrLeft is an error of [Adopt]: none of those that come later is taken either.
var ErrLeft = errors.New("another process has taken over")

// The fields that this program knows.
var flowFields, sideFields = fieldsOf[Flow](), fieldsOf[Side]()

func fieldsOf[T any]() (names []string) {
	for t, i := reflect.TypeFor[T](), 0; i < t.NumField(); i++ {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// unknownOf are the fields of the object b that are none of known; nil: there are none.
func unknownOf(b []byte, known []string) (all map[string]json.RawMessage, err error) {
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for name := range all {
		// Names are compared as encoding/json does it.
		if slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, name) }) {
			delete(all, name)
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	return all, nil
}

// knownFlow is a Flow without fields that this program does not know.
type knownFlow Flow

// UnmarshalJSON reads a record.
func (f *Flow) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, (*knownFlow)(f)); err != nil {
		return err
	}
	var sides struct{ Down, Up json.RawMessage }
	err := json.Unmarshal(b, &sides)
	if err == nil {
		f.unknown, err = unknownOf(b, flowFields)
	}
	for name, side := range map[string]json.RawMessage{"down": sides.Down, "up": sides.Up} {
		if err != nil || side == nil {
			continue
		}
		var more map[string]json.RawMessage
		if more, err = unknownOf(side, sideFields); more == nil {
			continue
		}
		if f.unknown == nil {
			f.unknown = map[string]json.RawMessage{}
		}
		f.unknown[name], err = json.Marshal(more)
	}
	return err
}

// MarshalJSON writes a record.
func (f *Flow) MarshalJSON() ([]byte, error) {
	if f.encoded != nil {
		return f.encoded, nil
	}
	b, err := json.Marshal((*knownFlow)(f))
	if err != nil || len(f.unknown) == 0 {
		return b, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for name, more := range f.unknown {
		if side := all[name]; len(side) > len("{}") {
			more = append(append(side[:len(side)-1:len(side)-1], ','), more[1:]...)
		}
		all[name] = more
	}
	return json.Marshal(all)
}

// checkFlows says what of the flows of m can't be, or does not fit the sockets that it names.
func checkFlows(m *Message) error {
	hasFlows := m.Step == FlowStep || m.Step == keptStep
	if hasFlows && len(m.Flows) == 0 {
		return errors.New("it has no flow")
	}
	if !hasFlows && len(m.Flows) > 0 {
		return errors.New("it has flows")
	}
	for _, n := range m.Numbers {
		if n == 0 {
			return errors.New("it has the number 0")
		}
	}
	type part struct {
		flow uint64
		kind string
	}
	parts := map[part]bool{}
	for _, s := range m.Sockets {
		if s.Flow == 0 {
			continue
		}
		if p := (part{s.Flow, s.Kind}); parts[p] {
			return fmt.Errorf("flow %d has two of %s", s.Flow, s.Kind)
		} else {
			parts[p] = true
		}
	}
	seen := map[uint64]bool{}
	for _, f := range m.Flows {
		switch {
		case f == nil:
			return errors.New("a flow is null")
		case f.Number == 0 || seen[f.Number] || f.Version < 1:
			return fmt.Errorf("flow %d has no version, or is there twice", f.Number)
		case !parts[part{f.Number, KindDown}] || !parts[part{f.Number, KindUp}]:
			return fmt.Errorf("flow %d lacks a socket", f.Number)
		case f.BytesUp < 0 || f.BytesDown < 0 || f.Buffer < 0 || f.IdleTimeout < 0 ||
			f.IdleTimeout > int64(mostIdle/time.Millisecond):
			return fmt.Errorf("flow %d has a number that can't be", f.Number)
		case f.Down.isWrong(parts[part{f.Number, KindDownRest}]) || f.Up.isWrong(parts[part{f.Number, KindUpRest}]):
			return fmt.Errorf("flow %d has more than %d bytes that are to be written, or has them twice", f.Number, mostRest)
		case (f.Kept != nil) != (m.Step == keptStep):
			return fmt.Errorf("flow %d is no record for a message of this step", f.Number)
		}
		seen[f.Number] = true
	}
	return nil
}

func (s *Side) isWrong(inFile bool) bool { return len(s.Rest) > mostRest || inFile && len(s.Rest) > 0 }
