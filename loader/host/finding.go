package host

import "time"

// State is how a Finding came out.
type State string

const (
	StateOK       State = "ok"
	StateDegraded State = "degraded" // works, but less well, or could not be seen
	StateMissing  State = "missing"  // the datapath can't work without it
)

// Finding is one thing that was looked at, for people: by a probe about the machine, by the self-test about a
// datapath.
type Finding struct {
	Name   string        `json:"name"`
	State  State         `json:"state"`
	Detail string        `json:"detail,omitempty"` // what was seen
	Advice string        `json:"advice,omitempty"` // what to do; empty where nothing has to be done
	Took   time.Duration `json:"took_ns,omitempty"`

	// Lacks: the machine lacks something, and may have it later.
	Lacks bool `json:"-"`
}

// Degraded is f with that state.
func (f Finding) Degraded(detail, advice string) Finding {
	f.State, f.Detail, f.Advice = StateDegraded, detail, advice
	return f
}

// Missing is f with that state.
func (f Finding) Missing(detail, advice string) Finding {
	f.State, f.Detail, f.Advice = StateMissing, detail, advice
	return f
}
