package front

import (
	"slices"

	"github.com/tailsplice/tailsplice/userspace/datapath"
)

// Offer makes d one that flows of `datapath: auto` are offered to from now on
// when they talk, behind those that were given before. Safe for concurrent
// use. d must not be closed before the Front.
func (f *Front) Offer(d datapath.Returner) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var auto []datapath.Returner
	if old := f.auto.Load(); old != nil {
		auto = slices.Clone(*old)
	}
	auto = append(auto, d)
	f.auto.Store(&auto)
}

// Lacks says why a datapath can't be had by its name. Safe for concurrent use.
func (f *Front) Lacks(name, why string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.missing[name] = why
}

// datapaths are those that work: named ones, and those for auto.
func (f *Front) datapaths() []datapath.Datapath {
	all := slices.Clone(f.opts.Datapaths)
	if auto := f.auto.Load(); auto != nil {
		for _, d := range *auto {
			if !slices.Contains(all, datapath.Datapath(d)) {
				all = append(all, d)
			}
		}
	}
	return all
}

// A waiter is a datapath that the configuration may name, and that may not be there yet: it refuses flows until it is,
// and Health says why.
type waiter interface {
	Waits() bool
}

func waits(d datapath.Datapath) bool {
	w, ok := d.(waiter)
	return ok && w.Waits()
}
