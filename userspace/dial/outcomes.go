package dial

import (
	"errors"
	"maps"
	"sync"
)

// Outcomes remember how the last try to connect to each target went. They are safe for concurrent use.
type Outcomes struct {
	Most int                   // targets that are remembered; further ones are not
	Took func(seconds float64) // hears of each [Attempt] that succeeds how long it took

	mu sync.Mutex
	// +checklocks:mu
	last map[string]error
	// +checklocks:mu
	made map[string]int64
}

// Made counts a connection to a target that was made for a client, and notes it.
func (o *Outcomes) Made(target string) {
	o.Note(target, nil)
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.last[target]; !known {
		return
	}
	if o.made == nil {
		o.made = map[string]int64{}
	}
	o.made[target]++
}

// Counts are the targets that connections were made to, and how many.
func (o *Outcomes) Counts() map[string]int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.made)
}

// Note remembers how a try to connect to a target went, unless that says nothing about the target.
func (o *Outcomes) Note(target string, err error) {
	var de *Error
	if errors.As(err, &de) && (de.Reason == Canceled || de.Reason == Exhausted || de.Reason == OffByHand) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.last[target]; !known && len(o.last) >= o.Most {
		return
	}
	if o.last == nil {
		o.last = map[string]error{}
	}
	o.last[target] = err
}

// Keep forgets all targets but these.
func (o *Outcomes) Keep(targets map[string]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.last, func(target string, _ error) bool { return !targets[target] })
	maps.DeleteFunc(o.made, func(target string, _ int64) bool { return !targets[target] })
}

// Last are the targets that were tried, and how the last try went.
func (o *Outcomes) Last() map[string]error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.last)
}
