package health

import (
	"errors"
	"testing"
	"time"
)

var errDead = errors.New("dead")

// play has a target's checks go as word says, from a clock's time on: a letter a check, + for one that
// succeeds. It returns the same with the state behind each check: u for up, d for down.
func play(s *state, by *Spec, now *time.Time, word string) string {
	var got []byte
	for _, c := range word {
		*now = now.Add(by.Every)
		var err error
		if c != '+' {
			err = errDead
		}
		s.note(by, *now, err)
		if s.isDown {
			got = append(got, 'd')
		} else {
			got = append(got, 'u')
		}
	}
	return string(got)
}

func TestRiseAndFall(t *testing.T) {
	for _, c := range []struct {
		name       string
		rise, fall int
		checks     string
		want       string
	}{
		{"up until it has failed often enough", 2, 3, "+---", "uuud"},
		{"a success between sets it back", 2, 3, "--+--+---", "uuuuuuuud"},
		{"from the start", 2, 3, "---", "uud"},
		{"up after enough successes", 2, 3, "---++", "uuddu"},
		{"a failure between sets it back", 2, 3, "---+-++", "uuddddu"},
		{"each counts", 1, 1, "-+-", "dud"},
		{"patient", 5, 4, "----++++-+++++", "uuuddddddddddu"},
	} {
		var s state
		now := time.Unix(0, 0)
		if got := play(&s, &Spec{Every: 5 * time.Second, Rise: c.rise, Fall: c.fall}, &now, c.checks); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestFlapping: a target that dies each time as soon as it is back is down longer and longer, and after 100
// times it has had connections a few times only. Once it has been up for long, all is forgotten.
func TestFlapping(t *testing.T) {
	by := &Spec{Every: 5 * time.Second, Rise: 2, Fall: 3}
	var s state
	now := time.Unix(0, 0)
	var downs []time.Duration // how long it was down each time
	var since time.Time
	for range 100 { // answers for 10 s, fails for 15 s
		for _, c := range "++---" {
			was := s.isDown
			play(&s, by, &now, string(c))
			switch {
			case !was && s.isDown:
				since = now
			case was && !s.isDown:
				downs = append(downs, now.Sub(since))
			}
		}
	}
	if len(downs) < 7 || len(downs) > 13 { // 10 + 20 + 40 + ... + 160 s, and then 5 minutes each, of 2,500 s
		t.Errorf("it has come back %d times of 100: after %v", len(downs), downs)
	}
	for i, d := range downs[1:] {
		if least := min(20*time.Second<<i, mostHeld); d < least || d > mostHeld+25*time.Second {
			t.Errorf("time %d it was down for %s, want %s at least", i+2, d, least)
		}
	}
	if downs[0] > 15*time.Second {
		t.Errorf("the first time it was down for %s, though it has never flapped", downs[0])
	}
	for s.isDown {
		play(&s, by, &now, "+")
	}
	for range flapWithin/by.Every + 1 {
		play(&s, by, &now, "+")
	}
	if got := play(&s, by, &now, "---++"); got != "uuddu" {
		t.Errorf("after it was up for long: %s", got)
	}
}

// TestHeld: the time is bounded whatever the configuration says.
func TestHeld(t *testing.T) {
	for _, c := range []struct {
		every time.Duration
		rise  int
		flaps int
		want  time.Duration
	}{
		{5 * time.Second, 2, 0, 0},
		{5 * time.Second, 2, 1, 20 * time.Second},
		{5 * time.Second, 2, 1 << 40, mostHeld},
		{time.Hour, 100, 1 << 40, 100 * time.Hour}, // as long as the checks take anyway
	} {
		if got := held(&Spec{Every: c.every, Rise: c.rise}, c.flaps); got != c.want {
			t.Errorf("every %s, rise %d, after %d flaps: %s, want %s", c.every, c.rise, c.flaps, got, c.want)
		}
	}
}
