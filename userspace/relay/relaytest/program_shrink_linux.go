package relaytest

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// shrinkPatience is how long a step may take in a program that is made shorter: what stands still does so for
// good.
const shrinkPatience = 10 * time.Second

// shrink leaves out of p what it fails without. fails tries a program, with more or less patience for one
// that fails rarely.
func shrink(p Program, fails func(p Program, tries int) bool) (_ Program, failed bool) {
	failed = fails(p, 20)
	for again := failed; again; {
		again = false
		for n := len(p.Client) + len(p.Server); n > 0; n /= 2 {
			for i := 0; i+n <= len(p.Client)+len(p.Server); {
				if short := without(p, i, n); fails(short, 4) {
					p, again = short, true
				} else {
					i += n
				}
			}
		}
		for i := range len(p.Client) + len(p.Server) {
			for less, ok := smaller(p, i); ok && fails(less, 4); less, ok = smaller(p, i) {
				p, again = less, true
			}
		}
	}
	return p, failed
}

// failsInHands gives the fails of shrink, until that time, for a program that fails in one way in the hands
// h. faults are the last that it saw.
func failsInHands(t testing.TB, h Hands, way string, until time.Time, faults *[]string) (
	fails func(p Program, tries int) bool,
) {
	return func(p Program, tries int) bool {
		for ; tries > 0 && time.Now().Before(until); tries-- {
			if f := tryMany(t, h, p, way); f != nil {
				*faults = f
				return true
			}
		}
		return false
	}
}

// tryMany runs p many times at once, since most failures are races, and gives the faults of one that failed
// in that way.
func tryMany(t testing.TB, h Hands, p Program, way string) (faults []string) {
	var all sync.WaitGroup
	var mu sync.Mutex
	for range h.atOnce() {
		all.Go(func() {
			if f := try(t, h, p, shrinkPatience); f != nil && kind(f) == way {
				mu.Lock()
				defer mu.Unlock()
				faults = f
			}
		})
	}
	all.Wait()
	return faults
}

// without is p without n steps from the i-th on; those of the server come behind those of the client.
func without(p Program, i, n int) Program {
	c := len(p.Client)
	cut := func(own, others []Op, from, to int) (_, _ []Op) {
		from, to = max(from, 0), min(to, len(own))
		if from >= to {
			return own, others
		}
		others = slices.Clone(others)
		for j, o := range others { // waits for what is left
			if o.Do == opWait && o.N > int64(from) {
				others[j].N = max(int64(from), o.N-int64(to-from))
			}
		}
		return slices.Delete(slices.Clone(own), from, to), others
	}
	p.Client, p.Server = cut(p.Client, p.Server, i, i+n)
	p.Server, p.Client = cut(p.Server, p.Client, i-c, i+n-c)
	return p
}

// smaller is p with a smaller number in its i-th step, if there is one.
func smaller(p Program, i int) (Program, bool) {
	p = Program{slices.Clone(p.Client), slices.Clone(p.Server)}
	ops := p.Client
	if i >= len(ops) {
		i, ops = i-len(ops), p.Server
	}
	o := &ops[i]
	if o.Do == opWait || o.N <= 1 {
		return p, false
	}
	o.N /= 2
	return p, true
}
