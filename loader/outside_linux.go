package loader

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A flow begins outside of the sockmap, by splice(2): to put it in takes longer than most flows have bytes for, and those that are busy would leave
// at once. It comes in when its sides talk with each other, a little at a time, or when bytes come now and then, since
// the kernel then moves them sooner and for less. What has left comes in again when it is quiet.
const (
	talkTurns  = 8           // come in: when it was the other side's turn so often
	talkBytes  = 64 << 10    // and no more than so many bytes came at a time
	talkNot    = -1 << 30    // turns of a flow that has left
	quietBytes = 1 << 20     // come in, also: when so many bytes at most came within quietFor, but some
	quietFor   = time.Second //
)

// talk is how often it was the other side's turn.
type talk struct {
	turns atomic.Int32
	side  atomic.Uint32 // whose turn it was
}

// talks is asked by a half that has moved all that came.
func (h *half) talks() bool {
	n := h.consumed - h.bulk.told
	h.bulk.told = h.consumed
	t := &h.f.talk
	switch {
	case n > talkBytes:
		t.turns.Store(min(t.turns.Load(), 0))
	case n > 0 && t.side.Swap(h.i) != h.i:
		t.turns.Add(1)
	}
	return t.turns.Load() >= talkTurns
}

// mayComeIn is asked likewise.
func (h *half) mayComeIn() bool {
	return h.bulk.left.Load() && (h.talks() || h.calm) && !h.fin && h.f.broken.Load() == nil
}

// isQuiet is the sweeper's look at a flow that is outside: has so little moved that it may come in?
func (f *flow) isQuiet(now time.Time, moved uint64) bool {
	if now.Sub(f.checked) < quietFor {
		return false
	}
	is := !f.checked.IsZero() && moved-f.was <= quietBytes
	f.checked, f.was = now, moved
	return is
}

// beginOutside is for a flow that nothing has moved of yet. Its events bring the bytes.
func (f *flow) beginOutside() {
	f.outside = true
	for i := range f.halves {
		h := &f.halves[i]
		h.bulk.behind = true
		h.bulk.left.Store(true)
		h.copying.Store(true)
		f.also[i] = unix.EPOLLIN
	}
}

// goOutside is told that a half that left has nothing behind it in the sockmap any more.
func (f *flow) goOutside(h *half) {
	f.outsideMu.Lock()
	defer f.outsideMu.Unlock()
	h.bulk.behind = true
	if !f.outside && f.halves[0].bulk.behind && f.halves[1].bulk.behind {
		f.setOutside(true)
		f.withdraw()
	}
}

// comeIn puts the source under the verdict. Userspace holds no byte of the half, and has read all there was.
// false: a stream is about to end, or the kernel does not take the socket, and the half stays as it is.
func (h *half) comeIn() bool {
	f := h.f
	h.releasePipe()
	f.outsideMu.Lock()
	defer f.outsideMu.Unlock()
	if f.stays || f.l.counts.isOff() {
		return false
	}
	why, ok := refusal(""), true
	if f.outside {
		why, ok = f.prepare()
		f.setOutside(false)
	}
	if ok {
		m := h.shared()
		m.Passed = m.Consumed
		if err := f.l.objects.Sources.Put(2*f.slot+h.i, uint64(h.source())); err != nil {
			why, ok = insertion(err), false
		}
	}
	if !ok {
		f.stays = true
		if f.halves[1-h.i].bulk.behind {
			f.setOutside(true)
			f.withdraw()
		}
		if why != refusedState {
			f.l.counts.refusal(f.l, why)
		}
		return false
	}
	h.calm, h.bulk.behind = false, false
	h.bulk.left.Store(false)
	h.copying.Store(false)
	f.l.counts.inserted.Add(1)
	h.source().kick() // for what came meanwhile
	if other := &f.halves[1-h.i]; other.bulk.left.Load() {
		other.wake(calm)
	}
	return true
}
