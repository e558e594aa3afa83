package loader

import (
	"sync"
	"sync/atomic"
	"time"
)

// sweeper looks at all flows from time to time: for idle ones, and for events that found no place in the ring.
type sweeper struct {
	every atomic.Int64 // nanoseconds
	poke  chan struct{}
	quit  chan struct{}
	once  sync.Once
}

func newSweeper() *sweeper {
	s := &sweeper{poke: make(chan struct{}, 1), quit: make(chan struct{})}
	s.every.Store(int64(sweepEvery))
	return s
}

// atLeast makes sweeps at least that frequent, within reason.
func (s *sweeper) atLeast(every time.Duration) {
	every = max(every, 10*time.Millisecond)
	for {
		now := s.every.Load()
		if now <= int64(every) {
			return
		}
		if s.every.CompareAndSwap(now, int64(every)) {
			select {
			case s.poke <- struct{}{}:
			default:
			}
			return
		}
	}
}

// run calls sweep until close. sweep gives the pause that the flows it saw need.
func (s *sweeper) run(sweep func(time.Time) time.Duration) {
	t := time.NewTimer(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-s.quit:
			return
		case <-s.poke:
		case now := <-t.C:
			s.every.Store(int64(sweep(now)))
		}
		t.Reset(time.Duration(s.every.Load()))
	}
}

func (s *sweeper) close() { s.once.Do(func() { close(s.quit) }) }

func (l *Loader) sweep(now time.Time) time.Duration {
	pause := sweepEvery
	for i := range l.live {
		f := l.live[i].Load()
		if f == nil {
			continue
		}
		if f.idle > 0 {
			pause = min(pause, max(f.idle/4, 10*time.Millisecond))
		}
		if f.sweep(now) {
			go f.finish(endIdle, nil)
		}
	}
	return pause
}

// sweep says whether the flow has been idle too long.
func (f *flow) sweep(now time.Time) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return false
	}
	var n uint64
	for i := range f.halves {
		h := &f.halves[i]
		m := h.shared()
		n += h.moved()
		if h.snapshot().passed != load64(&m.Consumed) || atomic.LoadUint32((*uint32)(&m.Fault)) != 0 {
			h.wake(0)
		}
	}
	if n != f.seen || f.moved.IsZero() {
		f.seen, f.moved = n, now
	}
	return f.idle > 0 && now.Sub(f.moved) >= f.idle
}
