package relay

import (
	"slices"
	"testing"
)

// TestStates walks the table: each state is reached, each leads to the end, and what is not in it is told.
func TestStates(t *testing.T) {
	reached := []state{inTransit}
	for i := 0; i < len(reached); i++ {
		for _, s := range next[reached[i]] {
			if !slices.Contains(reached, s) {
				reached = append(reached, s)
			}
		}
	}
	for s := range states {
		if stateNames[s] == "" || !slices.Contains(reached, s) {
			t.Errorf("state %d, %q, is never reached or has no name", s, stateNames[s])
		}
		leads, seen := []state{s}, false
		for i := 0; i < len(leads) && !seen; i++ {
			seen = leads[i] == done
			for _, s := range next[leads[i]] {
				if !slices.Contains(leads, s) {
					leads = append(leads, s)
				}
			}
		}
		if !seen {
			t.Errorf("what is %s never ends", stateNames[s])
		}
		if slices.Contains(next[s], s) || s == done && len(next[s]) > 0 {
			t.Errorf("what is %s may become so again, or go on after its end", stateNames[s])
		}
	}
	f := &flow{relay: new(Relay)}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enter(onLoop)
	if change := f.relay.Illegal(); change != nil {
		t.Errorf("%s is in the table", *change)
	}
	f.enter(parked)
	f.enter(onLoop)
	if change := f.relay.Illegal(); change == nil || *change != "on a loop to parked" {
		t.Errorf("a loop does not park flows, and the first illegal change is %v", change)
	}
}
