//go:build !linux

package relay

import (
	"net"
	"sync/atomic"
	"time"
)

const maxPipe = 1 << 20

type pump struct {
	relay    *Relay
	src, dst *side
	moved    *atomic.Int64
	limit    int
}

func (p *pump) run() (bad *side, err error) { return p.copyAny() }

// LimitPipes is for Linux.
func (*Relay) LimitPipes(int) {}

type (
	watcher    struct{}
	pipePool   struct{}
	holding    struct{}
	quietSweep struct{}
)

func (*watcher) close() {}
func (*pipePool) drop() {}

const haveWatches = false

func watchForReset(*side)      {}
func watchForBytes(*side) bool { return false }
func unwatch(*side)            {}

type sockConn struct{ *net.TCPConn } // that was on a loop: there are none here

// keepUrgent: elsewhere an urgent byte is dropped.
func (*side) keepUrgent() {}

func (f *flow) attach() bool { return false }
func (f *flow) reattach()    {}

// SaveMemory is for Linux.
func (*Relay) SaveMemory(bool) {}

// SpareTCP is for Linux.
func (*Relay) SpareTCP(bool) {}

// Piped is for Linux.
func (*Relay) Piped() int64 { return 0 }

// MeasureHeld is for Linux.
func (*Relay) MeasureHeld(time.Time) {}

// Held is for Linux.
func (c *Counters) Held() (int64, time.Time) { return 0, time.Time{} }

func (s *side) gone() bool       { return false }
func (s *side) unacked() int     { return 0 }
func (s *side) refuses() bool    { return true }
func (s *side) takeError() error { return nil }
