//go:build !linux

package relay

import "sync/atomic"

const maxPipe = 1 << 20

type pump struct {
	src, dst *side
	moved    *atomic.Int64
	limit    int
}

func (p *pump) run() (bad *side, err error) { return p.copyAny() }

const haveWatches = false

func watchForReset(*side)      {}
func watchForBytes(*side) bool { return false }
func unwatch(*side)            {}

func (s *side) gone() bool   { return false }
func (s *side) unacked() int { return 0 }
