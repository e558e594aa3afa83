package health

import (
	"errors"
	"slices"
	"strings"
	"time"
)

// Record is what the checks of a target have led to, for another process that checks it in the same way.
// Fields that a process does not know are left out: what must not be has to change the name of the record.
type Record struct {
	Spec  Spec      `json:"spec"`
	At    time.Time `json:"at"`             // the last check
	Down  bool      `json:"down,omitempty"` // the rest is as in state
	Rise  int       `json:"rise,omitempty"`
	Fall  int       `json:"fall,omitempty"`
	Since time.Time `json:"since"`
	Falls int       `json:"falls,omitempty"`
	Until time.Time `json:"until,omitzero"`
	Error string    `json:"error,omitempty"`
}

const (
	// oldAfter is how long what was found lasts for another process, with the time of two checks.
	oldAfter = 10 * time.Minute
	// tellEvery is how often Set.Moved is called where what was found changes only in being newer.
	tellEvery = 5 * time.Minute
)

// MostBrief bounds what Brief returns, in bytes.
const MostBrief = 300

// Brief is the text of err, for another process: there is one of each target, and some are long.
func Brief(err error) string {
	text := err.Error()
	return strings.ToValidUTF8(text[:min(len(text), MostBrief)], "") // without half of a character
}

// Records are what another process should know of the targets: those that are down, were so not long ago, or
// have failed checks. Those that are down come first.
func (s *Set) Records() (all []Record) {
	now := time.Now()
	for _, c := range s.Running() {
		c.mu.Lock()
		if st := &c.state; !st.isPlain(&c.Spec, now) || st.fall > 0 {
			r := Record{Spec: c.Spec, At: st.at, Down: st.isDown, Rise: st.rise, Fall: st.fall,
				Since: st.since, Falls: st.falls, Until: st.until}
			if st.last != nil {
				r.Error = Brief(st.last)
			}
			all = append(all, r)
		}
		c.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Record) int {
		if a.Down != b.Down {
			if a.Down {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Spec.Target, b.Spec.Target)
	})
	return all
}

// Inherit has the next Use go on with what another process has found, unless that is too old by now. What it
// has of targets that are not checked, or are checked in another way, is forgotten then.
func (s *Set) Inherit(all []Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.found = map[Spec]*Record{}
	now := time.Now()
	for _, r := range all {
		if now.Sub(r.At).Abs() <= oldAfter+2*r.Spec.Every {
			s.found[r.Spec] = &r
		}
	}
}

// takeOver has c, which does not run yet, go on with r. The clock may have been set since then.
func (c *Check) takeOver(r *Record, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = state{isDown: r.Down, at: notAfter(now, r.At),
		rise: max(r.Rise, 0), fall: max(r.Fall, 0), falls: max(r.Falls, 0)}
	c.since = notAfter(now, r.Since)
	if r.Since.IsZero() {
		c.since = c.at
	}
	if left := r.Until.Sub(now); r.Down && left > 0 {
		c.until = now.Add(min(left, held(&c.Spec, c.falls-1)))
	}
	if r.Error != "" {
		c.last = errors.New(r.Error)
	}
	switch {
	case c.isDown:
		c.SetDown()
	case c.falls > 0: // it has come back
		c.SetUp(c.since, c.SlowStart)
	}
}

// notAfter is t, or now where that is earlier.
func notAfter(now, t time.Time) time.Time { return now.Add(min(t.Sub(now), 0)) }

// isPlain reports whether a target is up, as one is that has never been down.
func (s *state) isPlain(by *Spec, now time.Time) bool {
	return !s.isDown && (s.falls == 0 || now.Sub(s.since) > max(flapWithin, by.SlowStart))
}

// isNews reports whether another process should know of a check that is noted, after which isDown has changed
// or not.
func (s *state) isNews(by *Spec, now time.Time, changed bool) bool {
	if !changed && (s.isPlain(by, now) || now.Sub(s.told) < tellEvery) {
		return false
	}
	s.told = now
	return true
}
