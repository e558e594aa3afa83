package dial

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"
)

// Disabled are targets to which an operator lets no new connection go. The zero value has none, and so has
// nil. It is safe for concurrent use.
type Disabled struct {
	changing sync.Mutex
	since    atomic.Pointer[map[string]time.Time] // by target
}

// Set disables a target, in the form that [Target.String] has, or enables it.
func (d *Disabled) Set(target string, disabled bool) {
	d.changing.Lock()
	defer d.changing.Unlock()
	all := d.Since()
	if _, is := all[target]; is == disabled {
		return
	}
	if all = maps.Clone(all); all == nil {
		all = map[string]time.Time{}
	}
	delete(all, target)
	if disabled {
		all[target] = time.Now()
	}
	d.since.Store(&all)
}

// SetAll disables targets, each since a time, and no others.
func (d *Disabled) SetAll(since map[string]time.Time) { d.since.Store(&since) }

// Since are the targets, and since when they are disabled. It must not be changed.
func (d *Disabled) Since() map[string]time.Time {
	if d == nil {
		return nil
	}
	if all := d.since.Load(); all != nil {
		return *all
	}
	return nil
}

// Has says whether a target is disabled.
func (d *Disabled) Has(target string) bool {
	_, is := d.Since()[target]
	return is
}

// Check is an [*Error] where a target is disabled that is written so.
func (d *Disabled) Check(t Target, written string) error {
	if !d.Has(written) {
		return nil
	}
	return &Error{Target: t, Reason: OffByHand, msg: fmt.Sprintf("an operator has disabled it: `tailsplice target enable %s` lets connections go there again", written)}
}
