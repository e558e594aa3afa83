package main

import (
	"context"
	"errors"
	"net"
	"sync/atomic"

	"github.com/tailsplice/tailsplice/userspace/front"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// errNotYet is how a late datapath refuses flows.
var errNotYet = errors.New("it is not available yet")

// late is a datapath that a configuration names, and that can't be had now, for want of what the machine may
// have later. Until it is there it refuses all flows, which go through userspace.
type late[D relay.Datapath] struct {
	name string
	d    atomic.Pointer[D]
	why  atomic.Pointer[string] // it is not there
}

func newLate[D relay.Datapath](name, why string) *late[D] {
	l := &late[D]{name: name}
	l.why.Store(&why)
	return l
}

// Name is that of the datapath.
func (l *late[D]) Name() string { return l.name }

// Waits says that it is not there yet.
func (l *late[D]) Waits() bool { return l.d.Load() == nil }

// Splice is the datapath's, once that is there.
func (l *late[D]) Splice(ctx context.Context, down, up *net.TCPConn,
	f relay.Flow) (count func() (up, down int64), err error) {
	if d := l.d.Load(); d != nil {
		return (*d).Splice(ctx, down, up, f)
	}
	return nil, errNotYet
}

// Health says why it is not there, and then what the datapath says.
func (l *late[D]) Health() (off string, stalls uint64) {
	d := l.d.Load()
	if d == nil {
		return *l.why.Load(), 0
	}
	if h, ok := any(*d).(relay.Health); ok {
		return h.Health()
	}
	return "", 0
}

// ClampedSegments is the datapath's, once that is there.
func (l *late[D]) ClampedSegments() uint64 {
	if d := l.d.Load(); d != nil {
		if c, ok := any(*d).(front.Clamper); ok {
			return c.ClampedSegments()
		}
	}
	return 0
}

// lateSockets is late for a datapath that takes bare sockets.
type lateSockets struct{ *late[relay.Sockets] }

// SpliceSockets is the datapath's, once that is there.
func (l lateSockets) SpliceSockets(ctx context.Context, down, up int,
	f relay.Flow) (count func() (up, down int64), err error) {
	if d := l.d.Load(); d != nil {
		return (*d).SpliceSockets(ctx, down, up, f)
	}
	return nil, errNotYet
}

// Record is the datapath's, once that is there.
func (l lateSockets) Record(down, up int, f relay.Flow) (forget func(), err error) {
	if d := l.d.Load(); d != nil {
		return (*d).Record(down, up, f)
	}
	return nil, errNotYet
}

// Busy is the datapath's, once that is there.
func (l lateSockets) Busy() (flows int, ok bool) {
	if d := l.d.Load(); d != nil {
		return (*d).Busy()
	}
	return 0, false
}
