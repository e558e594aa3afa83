package moment

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

// TestMoment: a moment is the time that it was made of, with its reading of the monotonic clock.
func TestMoment(t *testing.T) {
	now := time.Now()
	m := Of(now)
	if got := m.Time(); !got.Equal(now) || !strings.Contains(got.String(), " m=") {
		t.Errorf("%v, want %v", got, now)
	}
	if age := m.Age(Of(now.Add(time.Minute))); age != time.Minute {
		t.Errorf("after a minute it is %v ago", age)
	}
	if age := Now().Since(); age < 0 || age > time.Minute {
		t.Errorf("now was %v ago", age)
	}
	if Of(base) == 0 {
		t.Error("the first moment is never")
	}
	if early := base.Add(-time.Hour); !Of(early).Time().Equal(early) {
		t.Errorf("an hour before the first moment is %v, want %v", Of(early).Time(), early)
	}
}

// TestClockIsSet: the time of a moment is by the clock of the machine as that is now, and ages are by the
// monotonic one, however the machine's has been set since the start.
func TestClockIsSet(t *testing.T) {
	defer func(is time.Time) { base = is }(base)
	for _, by := range []time.Duration{-time.Hour, time.Hour} {
		base = shifted(base, by)
		m, now := Now(), time.Now()
		if off := m.Time().Round(0).Sub(now.Round(0)).Abs(); off > time.Minute {
			t.Errorf("the clock was set by %v, and now is off by %v", -by, off)
		}
		if age := Of(now.Add(-time.Second)).Since(); age < time.Second || age > time.Minute {
			t.Errorf("the clock was set by %v, and a second ago is %v ago", -by, age)
		}
	}
}

// shifted is t as the clock of the machine has it that differs by so much, at the same time of the monotonic
// one.
func shifted(t time.Time, by time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t)) // time.Time: a flag, 33 bits of seconds, and 30 of nanoseconds
	*wall += uint64(by/time.Second) << 30
	return t
}

func TestNever(t *testing.T) {
	var never Moment
	if age := never.Age(Now()); age < 100*365*24*time.Hour || !never.Time().IsZero() {
		t.Errorf("never was %v ago, at %v", age, never.Time())
	}
}

// TestBubble: it is of a bubble's clock in a bubble.
func TestBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := Now()
		time.Sleep(time.Hour)
		if age := m.Age(Now()); age != time.Hour {
			t.Errorf("an hour later it is %v ago", age)
		}
		if !m.Time().Add(time.Hour).Equal(time.Now()) {
			t.Errorf("%v", m.Time())
		}
	})
}
