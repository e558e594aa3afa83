package main

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// errNotYet is how a late datapath refuses flows.
var errNotYet = errors.New("it is not available yet")

// late is a datapath that a configuration names, and that can't be had now, for want of what the machine may
// have later. Until it is there it refuses all flows, which go through userspace.
type late[D datapath.Datapath] struct {
	name string
	d    atomic.Pointer[D]
	why  atomic.Pointer[string] // it is not there
	left atomic.Bool            // its process has left, which it is told when it is there
}

func newLate[D datapath.Datapath](name, why string) *late[D] {
	l := &late[D]{name: name}
	l.why.Store(&why)
	return l
}

// Name is that of the datapath.
func (l *late[D]) Name() string { return l.name }

// Waits says that it is not there yet.
func (l *late[D]) Waits() bool { return l.d.Load() == nil }

// Splice is the datapath's, once that is there.
func (l *late[D]) Splice(ctx context.Context, down, up int,
	h datapath.Handoff) (count func() (up, down int64), err error) {
	if d := l.d.Load(); d != nil {
		return (*d).Splice(ctx, down, up, h)
	}
	return nil, errNotYet
}

// Health says why it is not there, and then what the datapath says.
func (l *late[D]) Health() (off string, stalls uint64) {
	d := l.d.Load()
	if d == nil {
		return *l.why.Load(), 0
	}
	if h, ok := any(*d).(datapath.Health); ok {
		return h.Health()
	}
	return "", 0
}

// set is called with the datapath when that is there.
func (l *late[D]) set(d D) {
	l.d.Store(&d)
	if l.left.Load() {
		l.Leave()
	}
}

// Leave is the datapath's, once that is there.
func (l *late[D]) Leave() {
	l.left.Store(true)
	if d := l.d.Load(); d != nil {
		if x, ok := any(*d).(datapath.Leaver); ok {
			x.Leave()
		}
	}
}

// ClampedSegments is the datapath's, once that is there.
func (l *late[D]) ClampedSegments() uint64 {
	if d := l.d.Load(); d != nil {
		if c, ok := any(*d).(server.Clamper); ok {
			return c.ClampedSegments()
		}
	}
	return 0
}

// lateReturner is late for a datapath that gives flows back.
type lateReturner struct{ *late[datapath.Returner] }

// Record is the datapath's, once that is there.
func (l lateReturner) Record(down, up int, h datapath.Handoff) (forget func(), err error) {
	if d := l.d.Load(); d != nil {
		return (*d).Record(down, up, h)
	}
	return nil, errNotYet
}

// Active is the datapath's, once that is there.
func (l lateReturner) Active() (flows int, ok bool) {
	if d := l.d.Load(); d != nil {
		return (*d).Active()
	}
	return 0, false
}
