package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// socketsTimeout is for the first message.
const socketsTimeout = 10 * time.Second

// Predecessor is the process that this one takes over from, as this one sees it.
type Predecessor struct {
	*Link
	sockets []Socket // not taken yet
	kept    []Socket // that came with yours
	state   json.RawMessage
	more    []json.RawMessage
	flows   int
	taken   []Socket
	stderr  *os.File
	yours   chan error
}

// Inherit returns the process that has started this one to take over, or nil if none has. lost is called if
// that process ends, or takes back what it offers, before this one serves.
func Inherit(lost func(error)) (*Predecessor, error) {
	v, ok := os.LookupEnv(environ)
	if !ok {
		return nil, nil
	}
	os.Unsetenv(environ)
	fd, err := strconv.Atoi(v)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s=%q: it is set by a daemon that starts its successor, and by nobody else", environ, v)
	}
	unix.CloseOnExec(fd)
	unix.CloseOnExec(fd + 1)
	l, err := newLink(os.NewFile(uintptr(fd), "handover"))
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", environ, v, err)
	}
	p := &Predecessor{Link: l, stderr: os.NewFile(uintptr(fd+1), "stderr"), yours: make(chan error, 1)}
	var last *Message
	if p.sockets, last, p.more, err = l.receiveSockets(time.Now().Add(socketsTimeout)); err != nil {
		p.Close()
		return nil, ended(err)
	}
	if p.state = last.State; last.Remains != nil {
		p.flows = last.Remains.Flows
	}
	go func() {
		for {
			m, err := l.Receive(time.Time{})
			switch {
			case err != nil:
				err = ended(err)
				lost(err)
			case m.Step != Yours:
				Close(m.Sockets)
				continue
			default:
				p.kept = m.Sockets
			}
			p.yours <- err
			return
		}
	}()
	return p, nil
}

func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return errors.New("the daemon to take over from has ended, or goes on by itself")
	}
	return fmt.Errorf("the daemon to take over from: %w", err)
}

// Take returns the sockets of which want is true: the caller closes them. A nil Predecessor has none.
func (p *Predecessor) Take(want func(Socket) bool) (out []Socket) {
	if p == nil {
		return nil
	}
	var left []Socket
	for _, s := range p.sockets {
		if want(s) {
			out = append(out, s)
			p.taken = append(p.taken, Socket{Kind: s.Kind, Name: s.Name, Address: s.Address})
		} else {
			left = append(left, s)
		}
	}
	p.sockets = left
	return out
}

// All are the sockets that nobody has taken, for whoever looks only.
func (p *Predecessor) All() []Socket { return p.sockets }

// State is what has come with the sockets; a nil Predecessor has none.
func (p *Predecessor) State() json.RawMessage {
	if p == nil {
		return nil
	}
	return p.state
}

// More is the rest of the state, in parts.
func (p *Predecessor) More() []json.RawMessage { return p.more }

// Flows is how many flows lived there when this process was started; older programs do not say it. A nil
// Predecessor has none.
func (p *Predecessor) Flows() int {
	if p == nil {
		return 0
	}
	return p.flows
}

// Output is where this process writes once it serves, which stays the Predecessor's; standard error of a
// nil one.
func (p *Predecessor) Output() *os.File {
	if p == nil {
		return os.Stderr
	}
	return p.stderr
}

// Ready says that this process could start, and returns once it has to serve. The ends of the Queue in which
// the old one keeps its flows are among the sockets from then on, for who is left alone before it is the main
// one.
func (p *Predecessor) Ready() error {
	if err := p.Send(Message{Step: Ready, Taken: p.taken, SeesToKept: true}); err != nil {
		return ended(err)
	}
	err := <-p.yours
	p.sockets = append(p.sockets, p.kept...)
	return err
}

// Serve says that this process serves, and has it write to where the old one does. What was not taken is
// closed. The connection stays open.
func (p *Predecessor) Serve() error {
	Close(p.sockets)
	p.sockets = nil
	err := os.NewSyscallError("dup3", unix.Dup3(int(p.stderr.Fd()), 2, 0))
	p.stderr.Close()
	return errors.Join(err, p.Send(Message{Step: Serving, PID: os.Getpid()}))
}
