// Package flow names flows and keeps the registry of those that live.
//
// A flow is one spliced pair of connections (for HTTP: one request and its answer). Its id is made by the
// first hop and kept by every hop of its path: one grep over the hops' logs shows the way of a connection.
//
//	flow.go     flows, and those that live
//	account.go  what they are counted in
//	query.go    which of them are shown
//	kill.go     which of them are ended
package flow

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"sync"
	"time"
)

// idBytes is a path id's entropy: 128 bits, so that ids of hops that don't know each other don't collide.
const idBytes = 16

// NewID returns a fresh path id: 32 lower-case hex digits.
func NewID() string {
	var b [idBytes]byte
	rand.Read(b[:]) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b[:])
}

// Flow is one live flow. Its fields are fixed before Add.
type Flow struct {
	ID         string // the path's id, shared by every hop
	Listener   string
	Route      string // how the config writes the route that matched
	Name       string // server name or host, "" when there is none
	Client     string // address of the client, as far back as it is believed
	Downstream string // peer address of the accepted connection
	Upstream   string // peer address of the dialled connection
	Target     string // how the config writes the target
	Started    time.Time
	// Datapath returns the datapath that has the flow now. It must be safe to call at any time.
	Datapath func() string
	// Bytes returns what has moved up (to the upstream) and down. It must be safe at any time, also later.
	Bytes func() (up, down int64)
	// Held returns how many bytes it holds for readers that have no room, as far as that was measured, and
	// since when they have taken nothing; nil: that is not known. It must be safe to call at any time.
	Held    func() (bytes int64, since time.Time)
	Killer  Killer   // ends it; nil: nothing does
	Account *Account // what the flow is counted in; may be nil
	// BeforeUp and BeforeDown are bytes that another process has moved, and counted: Account does not.
	BeforeUp, BeforeDown int64
	// Client may be a hop that does not say whom it speaks for, and so many clients
	Shared bool
	place  int32 // in Registry.live, from 1; 0: not there
}

func (f *Flow) bytes() (up, down int64) {
	if f.Bytes == nil {
		return 0, 0
	}
	return f.Bytes()
}

func (f *Flow) datapath() string {
	if f.Datapath == nil {
		return ""
	}
	return f.Datapath()
}

// FormatVersion of JSON (docs/reference/json.md) is raised when a field goes, or means another thing.
const FormatVersion = 1

// Snapshot is a Flow at one moment, as `tailsplice flows --json` prints it.
type Snapshot struct {
	Format     int       `json:"format_version"`
	ID         string    `json:"id"`
	Listener   string    `json:"listener"`
	Route      string    `json:"route"`
	Name       string    `json:"name,omitempty"`
	Client     string    `json:"client"`
	Downstream string    `json:"downstream"`
	Upstream   string    `json:"upstream"`
	Target     string    `json:"target"`
	Datapath   string    `json:"datapath"`
	Started    time.Time `json:"started"`
	BytesUp    int64     `json:"bytes_up"`
	BytesDown  int64     `json:"bytes_down"`
}

func (f *Flow) snapshot(up, down int64) Snapshot {
	return Snapshot{Format: FormatVersion, ID: f.ID, Listener: f.Listener, Route: f.Route, Name: f.Name, Client: f.Client,
		Downstream: f.Downstream, Upstream: f.Upstream, Target: f.Target, Datapath: f.datapath(),
		Started: f.Started, BytesUp: up, BytesDown: down}
}

// Registry holds the flows that live, and the accounts that they are counted in. The zero value is not
// usable: call NewRegistry. All methods are safe for concurrent use.
type Registry struct {
	mu sync.Mutex
	// +checklocks:mu
	live []*Flow
	// +checklocks:mu
	accounts accounts
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	return &Registry{accounts: accounts{named: map[Route]*Account{}}}
}

// Add registers f until Remove(f).
func (r *Registry) Add(f *Flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live = append(r.live, f)
	f.place = int32(len(r.live))
	if f.Account != nil { // Configured may have dropped it since it was looked up
		f.Account = r.accounts.of(Route{f.Account.Listener, f.Account.Route})
		f.Account.live++
		f.Account.add(-f.BeforeUp, -f.BeforeDown)
	}
}

// Remove forgets f, whose bytes are final. Removing it twice is harmless.
func (r *Registry) Remove(f *Flow) {
	up, down := f.bytes()
	r.mu.Lock()
	defer r.mu.Unlock()
	if f.place == 0 {
		return
	}
	last := len(r.live) - 1
	moved := r.live[last]
	r.live[f.place-1], moved.place = moved, f.place
	r.live[last], f.place = nil, 0
	r.live = r.live[:last]
	if f.Account != nil {
		f.Account.live--
		f.Account.add(up, down)
	}
}

// Len is the number of live flows.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.live)
}

// Live are the flows that live now, in no order. Making snapshots of thousands takes longer.
func (r *Registry) Live() []*Flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.live)
}

// Snapshot lists the live flows that q takes, oldest first.
func (r *Registry) Snapshot(q Query) []Snapshot {
	live := slices.DeleteFunc(r.Live(), func(f *Flow) bool { return !q.takes(f) })
	slices.SortFunc(live, func(a, b *Flow) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID))
	})
	if q.Limit > 0 {
		live = live[:min(len(live), q.Limit)]
	}
	out := make([]Snapshot, 0, len(live))
	for _, f := range live {
		out = append(out, f.snapshot(f.bytes()))
	}
	return out
}
