package moment

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
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
