package health

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

// target is what checks find: nil where it works.
type target struct {
	err    atomic.Pointer[error]
	checks atomic.Int64
}

func (f *target) fail(err error) { f.err.Store(&err) }
func (f *target) work()          { f.err.Store(nil) }

func (f *target) probe(context.Context) error {
	f.checks.Add(1)
	if err := f.err.Load(); err != nil {
		return *err
	}
	return nil
}

func spec(name string) Spec {
	return Spec{Target: name, Kind: Connect, Every: 5 * time.Second, Timeout: 2 * time.Second, Rise: 2, Fall: 3, SlowStart: 30 * time.Second}
}

// TestSet follows a target that dies and comes back: what connections see, what is logged, and who hears.
func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logs.Log
		errShort := errors.New("out of files")
		heard := ""
		s := &Set{Log: log.Logger(), Tells: func(err error) bool { return err != errShort },
			Down: func(c *Check, why error) { heard += c.Target + " " + why.Error() + ";" }}
		var works target
		c := s.Of(spec("a:1"), works.probe)
		if !c.Status().Since.IsZero() || c.IsDown() {
			t.Errorf("before a check: %+v", c.Status())
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s.Use(ctx, []*Check{c})
		fall := time.Duration(c.Fall+1) * c.Every * 11 / 10
		time.Sleep(fall)
		if n := works.checks.Load(); n < 3 || n > 6 || c.Succeeded.Load() != n || c.IsDown() || c.Share(time.Now()) != 100 {
			t.Errorf("of one that works: %d checks, %+v", n, c.Status())
		}
		works.fail(errShort)
		time.Sleep(time.Minute)
		if c.IsDown() || c.Unclear.Load() < 9 || c.Status().Err != nil {
			t.Errorf("checks that fail for want of something here: %+v", c.Status())
		}
		works.fail(errDead)
		time.Sleep(fall)
		if st := c.Status(); !st.Down || st.Err != errDead || !st.Until.IsZero() || heard != "a:1 dead;" {
			t.Errorf("of one that is dead: %+v, heard %q", st, heard)
		}
		time.Sleep(time.Hour)
		works.work()
		for !strings.Contains(log.String(), "is up again") {
			time.Sleep(time.Second)
		}
		shares := map[int]bool{}
		last := 0
		for range 300 {
			share := c.Share(time.Now())
			if share < last {
				t.Errorf("the share falls from %d to %d", last, share)
			}
			last = share
			shares[share] = true
			time.Sleep(c.SlowStart / 299)
		}
		if len(shares) != 10 || !shares[10] || last != 100 {
			t.Errorf("the shares of slow start are %v, the last is %d", shares, last)
		}
		if heard != "a:1 dead;" || strings.Count(log.String(), "target=a:1") != 2 {
			t.Errorf("heard %q, log:\n%s", heard, log.String())
		}
		cancel()
		synctest.Wait()
	})
}

// TestUse: equal specs are one check, which goes on with what it knows over reloads, and ends when nobody
// wants it.
func TestUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logs.Log
		s := &Set{Log: log.Logger()}
		var dead, other target
		dead.fail(errDead)
		a, b := s.Of(spec("a:1"), dead.probe), s.Of(spec("b:1"), other.probe)
		s.Use(t.Context(), []*Check{a, b})
		time.Sleep(time.Minute)
		if !a.IsDown() || b.IsDown() {
			t.Error("after a minute:", a.Status(), b.Status())
		}
		same := s.Of(spec("a:1"), other.probe)
		if same != a {
			t.Error("a reload makes another check of the same")
		}
		patient := spec("a:1")
		patient.Fall = 99
		if s.Of(patient, dead.probe) == a {
			t.Error("another spec is the same check")
		}
		s.Use(t.Context(), []*Check{same})
		synctest.Wait()
		n := other.checks.Load()
		time.Sleep(time.Minute)
		if !a.IsDown() || other.checks.Load() != n || len(s.Running()) != 1 {
			t.Errorf("after a reload without b: a is down %v, b was checked %d times more", a.IsDown(), other.checks.Load()-n)
		}
		s.Use(t.Context(), nil)
		synctest.Wait() // and no goroutine is left, or the bubble panics
	})
}

// TestSlowCheck: one that takes longer than the time to the next one is followed by it at once, and its
// Timeout ends its context.
func TestSlowCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logs.Log
		s := &Set{Log: log.Logger()}
		slow := spec("a:1")
		slow.Every, slow.Timeout = time.Second, 10*time.Second
		began := time.Now()
		c := s.Of(slow, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		s.Use(t.Context(), []*Check{c})
		for !c.IsDown() {
			time.Sleep(time.Second)
		}
		if took := time.Since(began); took < 30*time.Second || took > 33*time.Second {
			t.Errorf("three checks of 10 s each take %s", took)
		}
		s.Use(t.Context(), nil)
		synctest.Wait()
	})
}
