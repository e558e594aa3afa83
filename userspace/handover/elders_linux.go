package handover

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Elders are the older processes of a daemon, whose flows have not all ended. The zero value has none.
type Elders struct {
	// OnSignal gets the signals that the first process passes on. It is set before Add.
	OnSignal func(os.Signal)
	// OnMain is called when this process is the main one, once, before the process that it has taken over
	// from is forgotten. isAlone: that one has ended without a word of it, and may not have told the service
	// manager. It is set before Add.
	OnMain func(isAlone bool)
	// OnFlow takes the flows that they give; nil: none does. It is set before Add.
	OnFlow Adopt
	// OnState gets what comes to the state of one later; nil: nobody does. It is set before Add.
	OnState func(json.RawMessage)

	mu sync.Mutex
	// +checklocks:mu
	all []*elder
}

type elder struct {
	link    *Link
	remains Remains // guarded by Elders.mu
	here    state   // of this process, as far as it depends on that one: accepts or isMain
}

// Add follows what is left of the process that this one has taken over from by its connection, which is
// closed at its end, and tells it that this process is the newest.
func (e *Elders) Add(l *Link) { e.add(&elder{link: l, here: accepts}) }

func (e *Elders) add(a *elder) {
	e.mu.Lock()
	e.all = append(e.all, a)
	e.mu.Unlock()
	a.link.Send(Message{Step: Newest, PID: os.Getpid(), TakesFlows: e.OnFlow != nil})
	go e.follow(a)
}

// AddFile is Add for the connection to an older process, which was handed over; it closes the file.
func (e *Elders) AddFile(f *os.File) error {
	l, err := newLink(f)
	if err == nil {
		e.add(&elder{link: l, here: isMain})
	}
	return err
}

func (e *Elders) follow(a *elder) {
	a.link.Hear(func(m *Message) {
		switch {
		case m.Step == Flows && e.OnFlow != nil:
			e.takeFlows(m.Sockets)
		case m.Step == Signal && e.OnSignal != nil:
			e.OnSignal(syscall.Signal(m.Signal))
		case m.Step == State && m.State != nil && e.OnState != nil:
			e.OnState(m.State)
		case m.Step == Main:
			e.hear(a, saysMain)
		case m.Step == Left && m.Remains != nil:
			e.mu.Lock()
			a.remains = *m.Remains
			e.mu.Unlock()
		}
	})
	e.hear(a, isLost)
	e.mu.Lock()
	e.all = slices.DeleteFunc(e.all, func(o *elder) bool { return o == a })
	e.mu.Unlock()
	a.link.Close()
}

// hear lets an event happen to a, which follow alone does.
func (e *Elders) hear(a *elder, what event) {
	next, do := newProcess.at(a.here, what)
	if a.here = next; do == beMain && e.OnMain != nil {
		e.OnMain(what == isLost)
	}
}

// takeFlows takes the flows that come by the connection which is among sockets.
func (e *Elders) takeFlows(sockets []Socket) {
	for i := range sockets {
		if s := &sockets[i]; s.Kind == KindFlows {
			if l, err := newLink(s.File); err == nil {
				go takeFlows(l, e.OnFlow)
			}
			s.File = nil
		}
	}
}

// List says what is left of each, the oldest first.
func (e *Elders) List() (out []Remains) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.all {
		if !a.remains.Ended && a.remains.PID != 0 {
			out = append(out, a.remains)
		}
	}
	return out
}

// Sockets are copies of the connections, for the next process. The caller closes them.
func (e *Elders) Sockets() (out []Socket, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.all {
		f, err := a.link.File()
		if err != nil {
			Close(out)
			return nil, err
		}
		out = append(out, Socket{Kind: KindElder, Address: strconv.Itoa(a.remains.PID), File: f})
	}
	return out, nil
}

// Leave closes the connections: process newest has them now, which may be told later than this one ends.
func (e *Elders) Leave(newest int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.all {
		a.link.Send(Message{Step: Newest, PID: newest})
		a.link.Close()
	}
}

// End tells all to end within a time, for this process is about to.
func (e *Elders) End(within time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.all {
		a.link.Send(Message{Step: End, Within: min(within, mostWithin).Milliseconds()})
	}
}

// isAny says whether any has something left, or has not said what.
func (e *Elders) isAny() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.ContainsFunc(e.all, func(a *elder) bool { return !a.remains.Ended })
}

// Wait waits until nothing is left of any, or ctx ends.
func (e *Elders) Wait(ctx context.Context) {
	for e.isAny() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}
