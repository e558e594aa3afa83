package memory

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// A greed is what a source has held when memory was short for the last time.
type greed struct {
	held    int64
	last    time.Time
	refused time.Duration // for so long after that
}

// again is the greed of a source that holds so much once more.
func (g greed) again(held int64, now time.Time) greed {
	switch {
	case g.last.IsZero():
		g.refused = greedyFor
	case g.isOver(now): // it was let in
		g.refused = min(2*g.refused, greedyMost)
	}
	g.held, g.last = held, now
	return g
}

// isOver reports whether the source is refused no more.
func (g greed) isOver(now time.Time) bool { return now.Sub(g.last) >= g.refused }

// noteGreedy notes the sources of connections that have stood still for a while and hold much: who takes a
// lot at a time has much held for a moment.
func (w *Watch) noteGreedy(now time.Time, all []stalled) {
	isRecent := func(s stalled) bool { return now.Sub(s.since) < stoppedForShort }
	standing := slices.DeleteFunc(slices.Clone(all), isRecent)
	for source, held := range greedySources(standing, greedyMin) {
		if w.greedy == nil {
			w.greedy = map[netip.Prefix]greed{}
		}
		w.greedy[source] = w.greedy[source].again(held, now)
	}
}

// refuse has the sources refused that have held much until a short while ago.
func (w *Watch) refuse(now time.Time, u Use) {
	for keep := greedyMost; ; keep /= 2 {
		maps.DeleteFunc(w.greedy, func(_ netip.Prefix, g greed) bool { return now.Sub(g.last) >= keep })
		if len(w.greedy) <= mostGreedy {
			break
		}
	}
	greedy := map[netip.Prefix]int64{}
	for source, g := range w.greedy {
		if !g.isOver(now) && !w.opts.MayBeMany(source.Addr()) { // as a configuration may say meanwhile
			greedy[source] = g.held
		}
	}
	if len(greedy) == 0 {
		w.refused.Store(nil)
		return
	}
	if w.refused.Swap(&greedy) == nil {
		most, held := greediest(greedy)
		w.limited.Warn("memory_greedy", "memory is short: sources that hold much of it for readers that have stopped "+
			"may open no more connections",
			"sources", len(greedy), "source", most, "held", held, "what", u.What,
			"used", u.Used, "total", u.Total)
	}
}

// greedySources are those that hold at least so much, of those that are one client each, and how much.
func greedySources(all []stalled, least int64) map[netip.Prefix]int64 {
	held := map[netip.Prefix]int64{}
	for _, s := range all {
		if s.owner.source.IsValid() {
			held[s.owner.source] += s.held
		}
	}
	maps.DeleteFunc(held, func(_ netip.Prefix, n int64) bool { return n < least })
	return held
}

// greediest is the source that holds most.
func greediest(sources map[netip.Prefix]int64) (source netip.Prefix, held int64) {
	for p, n := range sources {
		if n > held || n == held && p.Addr().Less(source.Addr()) {
			source, held = p, n
		}
	}
	return source, held
}
