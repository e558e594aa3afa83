package handover

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// adopted is a flow that has come, and is not begun.
type adopted struct {
	state         state
	begin, forget func()
}

// adopting is what comes from one process.
type adopting struct {
	link   *Link
	adopt  Adopt
	flows  map[uint64]*adopted // by number
	isLeft bool                // no more are taken
}

// takeFlows takes the flows that come by l, which it closes, until there is nobody who sends any.
func takeFlows(l *Link, adopt Adopt) {
	defer l.Close()
	a := adopting{link: l, adopt: adopt, flows: map[uint64]*adopted{}}
	for !a.isLeft || len(a.flows) > 0 {
		m, isOver := l.receiveAny()
		if isOver { // and with it the other process, or all its flows
			a.happens(slices.Collect(maps.Keys(a.flows)), isLost)
			return
		}
		switch m.Step {
		case Begin:
			a.happens(m.Numbers, saysBegin)
		case Keep:
			a.happens(m.Numbers, saysKeep)
		case FlowStep:
			a.take(m)
		}
		Close(m.Sockets)
	}
}

// happens lets an event happen to flows.
func (a *adopting) happens(numbers []uint64, e event) {
	for _, n := range numbers {
		f := a.flows[n]
		if f == nil {
			continue
		}
		next, do := newRules.at(f.state, e)
		f.state = next
		switch do {
		case move:
			delete(a.flows, n)
			f.begin()
		case forget:
			delete(a.flows, n)
			f.forget()
		}
	}
}

// take adopts the flows of m, and answers.
func (a *adopting) take(m *Message) {
	var taken []uint64
	refused := map[string][]uint64{}
	for _, f := range m.Flows {
		one, err := adoptOne(f, m.Sockets, a.adopt)
		if err != nil {
			a.isLeft = a.isLeft || errors.Is(err, ErrLeft)
			refused[err.Error()] = append(refused[err.Error()], f.Number)
			continue
		}
		one.state, _ = newRules.at(none, saysFlow)
		a.flows[f.Number] = one
		taken = append(taken, f.Number)
	}
	// Where nothing can be sent the other process has ended, which is read behind what it has sent.
	if len(taken) > 0 {
		a.link.Send(Message{Step: Taken, Numbers: taken})
	}
	for why, numbers := range refused {
		a.link.Send(Message{Step: Refused, Numbers: numbers, Reason: why})
	}
}

// adoptOne makes connections of the sockets of f.
func adoptOne(f *Flow, sockets []Socket, adopt Adopt) (a *adopted, err error) {
	for i := range sockets {
		s := &sockets[i]
		if s.Flow != f.Number || err != nil {
			continue
		}
		switch s.Kind {
		case KindDown:
			f.Down.Conn, err = s.takeConn()
		case KindUp:
			f.Up.Conn, err = s.takeConn()
		case KindDownRest:
			f.Down.Rest, err = readRest(s.File)
		case KindUpRest:
			f.Up.Rest, err = readRest(s.File)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	a = new(adopted)
	a.begin, a.forget, err = adopt(f)
	return a, err
}

// takeConn gives the conn of a side, which is the caller's then.
func (s *Socket) takeConn() (net.Conn, error) {
	c, ok := s.conn.(*tcpsock.Bare)
	if !ok {
		return nil, errors.New("it has no socket")
	}
	if err := c.Prepare(); err != nil {
		return nil, err
	}
	s.conn = nil
	return c, nil
}

// readRest reads a file that restFile has made.
func readRest(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, mostRest+1))
	if err == nil && len(b) > mostRest {
		err = fmt.Errorf("it has more than %d bytes that are to be written", mostRest)
	}
	return b, err
}
