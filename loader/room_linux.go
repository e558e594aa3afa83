package loader

import (
	"runtime"
	"time"
)

// talkersOf is for how many flows a processor's one worker moves each message sooner than a process would:
// with more of them, they wait for each other. See docs/datapaths.md.
const talkersOf = 4

// Room is how many flows more should be in the sockmap that talk. Those in there that rest don't count.
func (l *Loader) Room() int {
	if l.counts.isOff() {
		return 0
	}
	// The sweeper may know of some that have ended since.
	return talkersOf*runtime.NumCPU() - int(max(l.inside.Load()-l.resting.Load(), 0))
}

// setOutside is for a flow that goes in or out, under outsideMu.
func (f *flow) setOutside(is bool) {
	if f.outside = is; is {
		f.l.inside.Add(-1)
	} else {
		f.l.inside.Add(1)
	}
}

// rests is asked by the sweeper: is the flow inside, with nothing to move?
func (f *flow) rests(now time.Time) bool {
	f.outsideMu.Lock()
	defer f.outsideMu.Unlock()
	return !f.outside && now.Sub(f.lastMoved()) >= quietFor
}
