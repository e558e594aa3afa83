package health

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

// errSilent is an error of checks that count for nothing.
var errSilent = errors.New("out of files")

// quiet is a Set whose own checks count for nothing while they fail so.
func quiet() *Set {
	return &Set{Log: (&logs.Log{}).Logger(), Tells: func(err error) bool { return err != errSilent }}
}

// list has s list c as if that ran.
func list(s *Set, c *Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = map[Spec]*running{c.Spec: {c, func() {}}}
}

// handOver gives what s has found to another Set, as JSON, which has it so much later.
func handOver(t *testing.T, s *Set, later time.Duration, by Spec, probe func(context.Context) error) (*Set, *Check) {
	t.Helper()
	b, err := json.Marshal(s.Records())
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(later)
	var all []Record
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	next := quiet()
	next.Inherit(all)
	c := next.Of(by, probe)
	next.Use(t.Context(), []*Check{c})
	return next, c
}

// TestInherit: another process goes on with what was found, as if it had made the checks, whatever the state
// of the target is.
func TestInherit(t *testing.T) {
	by := spec("a:1")
	by.Every = time.Hour
	var fresh target
	fresh.fail(errSilent) // so that no check counts but those of the test
	for _, c := range []struct {
		name   string
		before string        // a letter a check, a second each: + for one that succeeds
		later  time.Duration // until the other process has it
		then   string
		want   string // after each of then, as play has it
		listed bool
	}{
		{"never checked", "", 0, "--+---", "uuuuud", false},
		{"up, as ever", "++", 0, "---", "uud", false},
		{"two have failed", "+--", 0, "-", "d", true},
		{"one has failed, and then one succeeds", "+-", 0, "+---", "uuud", true},
		{"down", "---", 0, "-++", "ddu", true},
		{"down, and one has succeeded", "---+", 0, "+", "u", true},
		{"down, minutes ago", "---", 9 * time.Minute, "-+", "dd", true},
		{"it has come back", "---++", 0, "---++", "uuddd", true}, // and flaps
		{"it flaps, and is kept down", "---++---", 0, "++", "dd", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				play := func(s *Set, of *Check, word string) string {
					got := ""
					for _, l := range word {
						time.Sleep(time.Second)
						if l == '+' {
							s.note(of, nil)
						} else {
							s.note(of, errDead)
						}
						if of.IsDown() {
							got += "d"
						} else {
							got += "u"
						}
					}
					return got
				}
				old := quiet()
				first := old.Of(by, fresh.probe)
				list(old, first)
				play(old, first, c.before)
				was := first.Status()
				if n := len(old.Records()); n != map[bool]int{true: 1}[c.listed] {
					t.Errorf("%d are handed over", n)
				}
				next, second := handOver(t, old, c.later, by, fresh.probe)
				if is := second.Status(); c.listed && (is.Down != was.Down || !is.Since.Equal(was.Since) || !is.Until.Equal(was.Until) ||
					(is.Err == nil) != (was.Err == nil)) {
					t.Errorf("known is %+v, and was %+v", is, was)
				}
				if got := play(next, second, c.then); got != c.want {
					t.Errorf("%q is followed by %s, want %s", c.before, got, c.want)
				}
				next.Use(t.Context(), nil)
			})
		})
	}
}

// TestInheritNot: what is too old, or of another target or check, is not taken, and neither is what comes once
// checks run.
func TestInheritNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dead := spec("a:1")
		dead.Every = time.Hour
		found := func(at time.Time) []Record {
			return []Record{{Spec: dead, At: at, Down: true, Since: at, Falls: 1, Fall: 3}}
		}
		var works target
		other, slower, another := dead, dead, dead
		other.Target, slower.Every, another.Kind = "b:1", dead.Every+1, TLS
		oldest := time.Now().Add(-oldAfter - 2*dead.Every)
		for _, c := range []struct {
			name string
			by   Spec
			at   time.Time
			want bool
		}{
			{"as it is", dead, time.Now(), true},
			{"as old as may be", dead, oldest, true},
			{"too old", dead, oldest.Add(-time.Nanosecond), false},
			{"of a time that has yet to come", dead, time.Now().Add(time.Minute), true},
			{"of a clock that was set", dead, time.Now().Add(24 * time.Hour), false},
			{"no time", dead, time.Time{}, false},
			{"another target", other, time.Now(), false},
			{"checked less often", slower, time.Now(), false},
			{"another kind of check", another, time.Now(), false},
		} {
			s := quiet()
			s.Inherit(found(c.at))
			check := s.Of(c.by, works.probe)
			s.Use(t.Context(), []*Check{check})
			if st := check.Status(); st.Down != c.want || st.Since.After(time.Now()) {
				t.Errorf("%s: %+v, want down %v", c.name, st, c.want)
			}
			s.Use(t.Context(), nil)
			again := s.Of(dead, works.probe)
			s.Use(t.Context(), []*Check{again})
			if again.IsDown() {
				t.Errorf("%s: a check that is new later begins with it", c.name)
			}
			s.Use(t.Context(), nil)
		}
		// What can't be is bounded.
		s := quiet()
		now := time.Now()
		s.Inherit([]Record{{Spec: dead, At: now, Down: true, Rise: -5, Fall: -1, Falls: 1 << 40, Until: now.Add(1000 * time.Hour)}})
		c := s.Of(dead, works.probe)
		s.Use(t.Context(), []*Check{c})
		if st := c.Status(); st.Until.After(now.Add(time.Duration(dead.Rise)*dead.Every)) || st.Since.IsZero() {
			t.Errorf("it is kept down for %s, since %s", st.Until.Sub(now), st.Since)
		}
		s.Use(t.Context(), nil)
	})
}

// TestInheritSlowStart: the share of one that has just come back goes on to grow in another process.
func TestInheritSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		by := spec("a:1")
		by.Every = time.Hour
		var works target
		old := quiet()
		c := old.Of(by, works.probe)
		list(old, c)
		for _, err := range []error{errDead, errDead, errDead, nil, nil} {
			old.note(c, err)
		}
		time.Sleep(by.SlowStart / 3)
		next, again := handOver(t, old, 0, by, works.probe)
		for range 25 {
			now := time.Now()
			if is, was := again.Share(now), c.Share(now); is != was {
				t.Errorf("the share is %d, and would be %d", is, was)
			}
			time.Sleep(time.Second)
		}
		if s := again.Share(time.Now()); s != 100 {
			t.Errorf("at the end the share is %d", s)
		}
		next.Use(t.Context(), nil)
	})
}

// TestMoved: who keeps the records hears of each change, and while a target is down often enough for them not to
// become too old.
func TestMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logs.Log
		var mu sync.Mutex
		var told [][]Record
		var s *Set
		s = &Set{Log: log.Logger(), Moved: func() {
			all := s.Records()
			mu.Lock()
			defer mu.Unlock()
			told = append(told, all)
		}}
		look := func() (times int, kept []Record) {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if len(told) > 0 {
				kept = told[len(told)-1]
			}
			return len(told), kept
		}
		var works target
		c := s.Of(spec("a:1"), works.probe)
		s.Use(t.Context(), []*Check{c})
		time.Sleep(time.Hour)
		if times, _ := look(); times != 0 {
			t.Errorf("of one that works it is called %d times", times)
		}
		works.fail(errors.New("x" + strings.Repeat("é", MostBrief)))
		for !c.IsDown() {
			time.Sleep(time.Second)
		}
		times, kept := look()
		if times != 1 || len(kept) != 1 || !kept[0].Down || len(kept[0].Error) > MostBrief || !strings.HasSuffix(kept[0].Error, "é") {
			t.Errorf("called %d times, kept is %+v", times, kept)
		}
		for range 600 {
			time.Sleep(6 * time.Second)
			times, kept = look()
			next, other := quiet(), target{}
			next.Inherit(kept)
			again := next.Of(kept[0].Spec, other.probe)
			if next.Use(t.Context(), []*Check{again}); !again.IsDown() {
				t.Fatalf("what is kept is too old after %s", time.Since(kept[0].At))
			}
			next.Use(t.Context(), nil)
		}
		if times > 13 {
			t.Errorf("called %d times in an hour in which nothing changed", times)
		}
		works.work()
		for c.IsDown() {
			time.Sleep(time.Second)
		}
		if _, kept = look(); len(kept) != 1 || kept[0].Down {
			t.Errorf("it is up again, and kept is %+v", kept)
		}
		time.Sleep(flapWithin + time.Minute)
		was, _ := look()
		time.Sleep(time.Hour)
		times, _ = look()
		if len(s.Records()) != 0 || times != was {
			t.Errorf("long after: %d records, and called %d times", len(s.Records()), times-was)
		}
		s.Use(t.Context(), nil)
	})
}
