package handover

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// adopted is a flow that has come, and is not begun.
type adopted struct {
	state         state
	begin, forget func()
}

// takeFlows takes the flows that come by l, which it closes, until there is nobody who sends any.
func takeFlows(l *Link, adopt Adopt) {
	defer l.Close()
	flows := map[uint64]*adopted{}
	isLeft := false
	at := func(numbers []uint64, e event) {
		for _, n := range numbers {
			a := flows[n]
			if a == nil {
				continue
			}
			next, do := newRules.at(a.state, e)
			a.state = next
			switch do {
			case move:
				delete(flows, n)
				a.begin()
			case forget:
				delete(flows, n)
				a.forget()
			}
		}
	}
	for !isLeft || len(flows) > 0 {
		m, isOver := l.receiveAny()
		if isOver { // and with it the other process, or all its flows
			var all []uint64
			for n := range flows {
				all = append(all, n)
			}
			at(all, isLost)
			return
		}
		switch m.Step {
		case Begin:
			at(m.Numbers, saysBegin)
		case Keep:
			at(m.Numbers, saysKeep)
		case FlowStep:
			var taken []uint64
			refused := map[string][]uint64{}
			for _, f := range m.Flows {
				a, err := adoptOne(f, m.Sockets, adopt)
				if err != nil {
					isLeft = isLeft || errors.Is(err, ErrLeft)
					refused[err.Error()] = append(refused[err.Error()], f.Number)
					continue
				}
				a.state, _ = newRules.at(none, saysFlow)
				flows[f.Number] = a
				taken = append(taken, f.Number)
			}
			// Where nothing can be sent the other process has ended, which is read behind what it has sent.
			if len(taken) > 0 {
				l.Send(Message{Step: Taken, Numbers: taken})
			}
			for why, numbers := range refused {
				l.Send(Message{Step: Refused, Numbers: numbers, Reason: why})
			}
		}
		Close(m.Sockets)
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
