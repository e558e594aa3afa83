package health

import "time"

const (
	// flapWithin is how soon a target that came back must go down again for that to count as flapping.
	flapWithin = 10 * time.Minute
	// mostHeld bounds how long one that flaps is kept down.
	mostHeld = 5 * time.Minute
)

// state is what the checks of a target have led to. The zero state is that of one that is up.
type state struct {
	isDown     bool
	rise, fall int       // checks in a row that succeeded, or failed
	last       error     // of the last check
	at         time.Time // of it; zero before the first
	since      time.Time // of isDown; zero before the first check
	falls      int       // how often it has gone down, each time soon after it had come back
	until      time.Time // when it may come back
	told       time.Time // when isNews was true last
}

// note counts a check that went so, and reports whether isDown has changed.
//
//	up   -> down  Fall checks in a row have failed
//	down -> up    Rise checks in a row have succeeded, and it is time
//
// It is time as soon as Rise checks can have been made, and each time that the target goes down within
// flapWithin of its coming back, it takes twice as long as before, up to mostHeld.
func (s *state) note(by *Spec, now time.Time, err error) (changed bool) {
	if s.since.IsZero() {
		s.since = now
	}
	if s.last, s.at = err, now; err == nil {
		s.rise, s.fall = s.rise+1, 0
	} else {
		s.rise, s.fall = 0, s.fall+1
	}
	switch {
	case !s.isDown && s.fall >= by.Fall:
		if s.falls > 0 && now.Sub(s.since) > flapWithin {
			s.falls = 0
		}
		s.until = now.Add(held(by, s.falls))
		s.falls++
	case s.isDown && s.rise >= by.Rise && !now.Before(s.until):
	default:
		return false
	}
	s.isDown, s.since = !s.isDown, now
	return true
}

// held is how long a target stays down at least that has flapped so often.
func held(by *Spec, flaps int) time.Duration {
	if flaps == 0 {
		return 0
	}
	d := time.Duration(by.Rise) * by.Every
	for range flaps {
		if d >= mostHeld {
			break
		}
		d = min(2*d, mostHeld)
	}
	return d
}
