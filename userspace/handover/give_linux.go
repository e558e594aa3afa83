package handover

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// mostFlows bounds the flows of a message, so that each waits for few others: nobody moves its bytes.
	mostFlows = 32
	// inlineRest is how many bytes of Rest, of both sides, go in the message itself.
	inlineRest = 2 << 10
	// answerTimeout is how long nobody moves a flow's bytes while the other process says nothing.
	answerTimeout = 2 * time.Second
	// mostUnread is how many bytes may be unread when flows are sent, so that there is room for begin and
	// keep.
	mostUnread = 64 << 10
)

var (
	errLost   = errors.New("the process that was to take it has ended")
	errLate   = errors.New("the process that was to take it does not answer")
	errClosed = errors.New("no flow is given any more")
	errKilled = errors.New("it was killed on its way")
)

// Giver gives flows to another process. Make it with [Link.Give].
type Giver struct {
	link *Link
	lost chan struct{} // closed when the other process is gone

	silent atomic.Bool // the other process has not answered in time, nor read what it was sent since

	// deciding is held while the state of offers changes, with what is said of that. It comes before mu.
	deciding sync.Mutex
	offers   map[uint64]*offer // that were sent, and not answered; guarded by deciding

	mu sync.Mutex
	// +checklocks:mu
	queue []*offer // to be sent
	// +checklocks:mu
	open int // flows that are not gone
	// +checklocks:mu
	isClosed bool
	woken    chan struct{}
}

// offer is a flow that a Giver was given.
type offer struct {
	flow  *Flow
	gone  func(error)
	state state
	since time.Time
}

// Give sends the other process the end of a connection by which flows come. The caller closes the Giver.
func (l *Link) Give() (*Giver, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	if err := l.Send(Message{Step: Flows, Sockets: []Socket{{Kind: KindFlows, File: theirs}}}); err != nil {
		ours.Close()
		return nil, err
	}
	ours.c.SetWriteBuffer(1 << 20) // as far as the kernel lets it
	g := &Giver{link: ours, lost: make(chan struct{}), offers: map[uint64]*offer{}, woken: make(chan struct{}, 1)}
	go g.hear()
	go g.send()
	return g, nil
}

// Lost is closed when the other process is gone, or takes no flows any more.
func (g *Giver) Lost() <-chan struct{} { return g.lost }

// Answers reports whether the other process is known to take flows now. Where it does not, each that is given
// stands still for a while, and stays.
func (g *Giver) Answers() bool { return !g.silent.Load() }

// Give gives away a flow whose bytes nobody moves. gone is called once, on any goroutine: without an error
// the other process has it, and else it is the caller's as before. Give does not block, and sets Number.
func (g *Giver) Give(f *Flow, gone func(error)) {
	g.mu.Lock()
	isClosed := g.isClosed
	if !isClosed {
		g.open++
		g.queue = append(g.queue, &offer{flow: f, gone: gone})
	}
	g.mu.Unlock()
	if isClosed {
		go gone(errClosed)
		return
	}
	g.wake()
}

func (g *Giver) wake() {
	select {
	case g.woken <- struct{}{}:
	default:
	}
}

// Close ends the connection. It waits until each flow is the caller's or the other process's: that one would
// take an earlier end for the death of this.
func (g *Giver) Close() {
	for g.isBusy() {
		time.Sleep(5 * time.Millisecond)
	}
	g.wake()
	g.link.Close()
	<-g.lost
}

// isBusy reports whether a flow is on its way. No more can be given.
func (g *Giver) isBusy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.isClosed = true
	return g.open > 0
}

// over tells the caller what has become of o; nil: it was given.
func (g *Giver) over(o *offer, err error) {
	o.gone(err)
	g.mu.Lock()
	g.open--
	g.mu.Unlock()
}

// send sends what is to be given, several flows at a time, and takes back what is not answered.
func (g *Giver) send() {
	tick := time.NewTicker(answerTimeout / 20)
	defer tick.Stop()
	number, lost := uint64(0), g.lost
	for {
		select {
		case <-lost: // what is still to come is returned, as nothing can be sent
			lost = nil
		case <-tick.C:
			g.takeBack()
		case <-g.woken:
		}
		for {
			g.mu.Lock()
			n := min(len(g.queue), mostFlows)
			some := slices.Clone(g.queue[:n])
			g.queue = slices.Delete(g.queue, 0, n)
			isOver := g.isClosed && g.open == 0 // else there may be some to take back
			g.mu.Unlock()
			if n == 0 && isOver {
				return
			} else if n == 0 {
				break
			}
			for len(some) > 0 {
				for _, o := range some {
					number++
					o.flow.Number, o.flow.Version = number, max(o.flow.Version, FlowVersion)
				}
				some = some[g.offer(some):]
			}
		}
	}
}

// offer sends some flows, as many of the first ones as a message takes, and returns how many it has seen to.
func (g *Giver) offer(some []*offer) int {
	m := Message{Step: FlowStep}
	var files []io.Closer
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	size := 0
	for i, o := range some {
		own, err := o.flow.pack()
		files = append(files, own.files...)
		if err == nil && own.size > mostBytes-overhead {
			err = fmt.Errorf("its record is too large: %d bytes", own.size)
		}
		if err != nil {
			if i > 0 {
				some = some[:i] // it is the first next time
				break
			}
			g.over(o, err)
			return 1
		}
		if size += own.size; size > mostBytes-overhead || len(m.Sockets)+len(own.sockets) > mostFiles {
			some = some[:i]
			break
		}
		m.Flows, m.Sockets = append(m.Flows, own.flow), append(m.Sockets, own.sockets...)
	}
	if !g.hasRoom() {
		for _, o := range some {
			g.over(o, errLate)
		}
		return len(some)
	}
	g.deciding.Lock()
	for _, o := range some {
		o.state, _ = oldRules.at(kept, hasLeft)
		o.since = time.Now()
		g.offers[o.flow.Number] = o
	}
	g.deciding.Unlock()
	if err := g.link.Send(m); err != nil { // nobody has heard of them
		g.decide(numbers(some), isLost, err)
	}
	return len(some)
}

// hasRoom waits for room for flows, and more. If there is none the other process has stopped to read.
func (g *Giver) hasRoom() bool {
	for end := time.Now().Add(answerTimeout / 4); g.link.unread() > mostUnread; time.Sleep(time.Millisecond) {
		if g.silent.Load() || time.Now().After(end) {
			g.silent.Store(true)
			return false
		}
	}
	return true
}

func numbers(some []*offer) (all []uint64) {
	for _, o := range some {
		all = append(all, o.flow.Number)
	}
	return all
}

// overhead is what a message may have beside its flows, in bytes.
const overhead = 1 << 10

// packed is a flow as it goes in a message.
type packed struct {
	flow    *Flow
	sockets []Socket
	files   []io.Closer // to be closed when it is sent
	size    int         // bytes of the message
}

// pack makes a flow fit a message.
func (f *Flow) pack() (p packed, err error) {
	own := *f
	p.flow = &own
	for _, side := range []struct {
		*Side
		kind, rest string
	}{{&own.Down, KindDown, KindDownRest}, {&own.Up, KindUp, KindUpRest}} {
		c, ok := side.Conn.(syscall.Conn)
		if !ok {
			return p, errors.New("it has a connection that is no socket")
		}
		p.sockets = append(p.sockets, Socket{Kind: side.kind, Flow: own.Number, sock: c})
		if len(f.Down.Rest)+len(f.Up.Rest) <= inlineRest || len(side.Rest) == 0 {
			continue
		}
		file, err := restFile(side.Rest)
		if err != nil {
			return p, err
		}
		p.files = append(p.files, file)
		p.sockets = append(p.sockets, Socket{Kind: side.rest, Flow: own.Number, File: file})
		side.Rest = nil
	}
	own.encoded, err = own.MarshalJSON()
	p.size = len(own.encoded) + len(p.sockets)*64
	return p, err
}

// restFile is a file in memory that has b.
func restFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("tailsplice-rest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "rest")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// hear takes the answers until the other end is closed.
func (g *Giver) hear() {
	defer close(g.lost)
	for {
		m, isOver := g.link.receiveAny()
		if isOver {
			break
		}
		g.silent.Store(false)
		Close(m.Sockets)
		switch m.Step {
		case Taken:
			g.decide(m.Numbers, saysTaken, nil)
		case Refused:
			g.decide(m.Numbers, saysRefused, errors.New(m.Reason))
		}
	}
	g.deciding.Lock()
	var all []uint64
	for n := range g.offers {
		all = append(all, n)
	}
	g.deciding.Unlock()
	g.decide(all, isLost, errLost)
	g.mu.Lock()
	g.isClosed = true
	g.mu.Unlock()
}

// takeBack goes on with the flows that no answer has come for.
func (g *Giver) takeBack() {
	g.deciding.Lock()
	var late []uint64
	for n, o := range g.offers {
		if time.Since(o.since) >= answerTimeout {
			late = append(late, n)
		}
	}
	isIdle := len(g.offers) == 0
	g.deciding.Unlock()
	if len(late) > 0 {
		g.silent.Store(true)
	} else if isIdle && g.silent.Load() && g.link.unread() == 0 {
		g.silent.Store(false) // it reads
	}
	g.decide(late, isLate, errLate)
}

// decide lets an event happen to offers, of which the answered ones are known no more. why is why those that
// are kept were not given.
func (g *Giver) decide(all []uint64, e event, why error) {
	gone, stay := g.settle(all, e, why)
	if len(gone) > 0 { // their owner closes much, while the next answers are read
		go func() {
			for _, o := range gone {
				g.over(o, nil)
			}
		}()
	}
	for _, o := range stay {
		g.over(o.offer, o.why)
	}
}

// eventful is an offer and what happens to it, and why it is not given then.
type eventful struct {
	*offer
	event event
	why   error
}

// settle is decide without telling the owners of the flows.
func (g *Giver) settle(all []uint64, e event, why error) (gone []*offer, stay []*eventful) {
	g.deciding.Lock()
	defer g.deciding.Unlock()
	var some []*eventful
	for _, n := range all {
		if o := g.offers[n]; o != nil {
			x := &eventful{o, e, why}
			if e == saysTaken && o.flow.IsKilled != nil && o.flow.IsKilled() {
				x.event, x.why = isKilled, errKilled
			}
			some = append(some, x)
		}
	}
	g.answer(some)
	for _, o := range some {
		next, do := oldRules.at(o.state, o.event)
		if do == nothing {
			continue
		}
		o.state = next
		delete(g.offers, o.flow.Number)
		if next == given {
			gone = append(gone, o.offer)
		} else {
			stay = append(stay, o)
		}
	}
	return gone, stay
}

// answer tells the other process whose the flows are, as the rules have it. Where it can't be told, that one
// is lost.
func (g *Giver) answer(some []*eventful) {
	for step, send := range map[string]action{Begin: sendBegin, Keep: sendKeepAndMove} {
		var of []*eventful
		var numbers []uint64
		for _, o := range some {
			if _, do := oldRules.at(o.state, o.event); do == send {
				of, numbers = append(of, o), append(numbers, o.flow.Number)
			}
		}
		if len(of) > 0 && g.sayAtAnyTime(Message{Step: step, Numbers: numbers}) != nil {
			for _, o := range of {
				o.event, o.why = isLost, errLost
			}
		}
	}
}

// sayAtAnyTime sends what the other process has to read if it lives, however long it takes to that. The error
// is that it does not.
func (g *Giver) sayAtAnyTime(m Message) error {
	for {
		err := g.link.Send(m)
		for _, gone := range []error{nil, unix.EPIPE, unix.ECONNRESET, unix.ECONNREFUSED, unix.ENOTCONN, net.ErrClosed} {
			if errors.Is(err, gone) {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
}
