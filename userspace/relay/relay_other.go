//go:build !linux

package relay

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

const maxPipe = 1 << 20

type pump struct {
	relay    *Relay
	src, dst *side
	moved    *atomic.Int64
	limit    int
}

func (p *pump) run() (bad *side, err error) { return p.copyAny() }

type (
	watcher    struct{}
	pipePool   struct{}
	holding    struct{}
	quietSweep struct{}
	sockConn   struct{ *net.TCPConn } // that was on a loop: there are none here
	handed     struct{}
)

// What follows is for Linux. Elsewhere there is nothing to be done, and an urgent byte is dropped.

const haveWatches = false

func (f *flow) cancelOn(*loop.Loop) { f.abort(EndCanceled, context.Cause(f.ctx)) }

func (*watcher) close()                     {}
func (*pipePool) drop()                     {}
func watchForReset(*side)                   {}
func watchForBytes(*side) bool              { return false }
func unwatch(*side)                         {}
func (*flow) attach() bool                  { return false }
func (*flow) reattach()                     {}
func (*flow) killOn(*loop.Socket)           {}
func (*flow) leaveLoop(*loop.Socket)        {}
func (*flow) depart()                       {}
func (*flow) beginBare(*Parcel) bool        { return false }
func pollable(c net.Conn) net.Conn          { return c }
func unspare(net.Conn)                      {}
func ungrown(_, _ net.Conn)                 {}
func unread(net.Conn) int                   { return 0 }
func (*side) keepUrgent()                   {}
func (*side) gone() bool                    { return false }
func (*side) unacked() int                  { return 0 }
func (*side) refuses() bool                 { return true }
func (*side) takeError() error              { return nil }
func (*Relay) LimitPipes(int)               {}
func (*Relay) SaveMemory(bool)              {}
func (*Relay) SaveSockets(bool)             {}
func (*Relay) SpareTCP(bool)                {}
func (*Relay) Piped() int64                 { return 0 }
func (*Relay) MeasureHeld(time.Time)        {}
func (*Counters) Held() (int64, time.Time)  { return 0, time.Time{} }
func (*Counters) Copies() (int, int, error) { return -1, -1, errors.ErrUnsupported }
