package balance

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// picks counts how often each of some options is chosen.
func picks(n int, all ...Option) []int {
	got := make([]int, len(all))
	for range n {
		if i := Pick(len(all), func(i int) Option { return all[i] }); i >= 0 {
			got[i]++
		}
	}
	return got
}

func TestPick(t *testing.T) {
	const n = 4000
	a, b, spare := Option{Weight: 3, Health: new(Health)}, Option{Weight: 1, Health: new(Health)}, Option{Weight: 5, Backup: true, Health: new(Health)}
	// 3:1 of 4000 is 3000, give or take 27: 200 more or less come once in 10¹² times.
	if got := picks(n, a, b, spare); got[0] < 2800 || got[0] > 3200 || got[0]+got[1] != n {
		t.Errorf("by weight: %v", got)
	}
	a.Health.Failed()
	if got := picks(n, a, b, spare); got[1] != n {
		t.Errorf("where one has failed: %v", got)
	}
	b.Health.Failed()
	if got := picks(n, a, b, spare); got[2] != n {
		t.Errorf("where all but the spare one have: %v", got)
	}
	spare.Health.Failed()
	if got := picks(n, a, b, spare); got[0] < 2800 || got[0] > 3200 || got[0]+got[1] != n {
		t.Errorf("where all have failed, the spare one last: %v", got)
	}
	a.Tried, b.Tried = true, true
	if got := picks(n, a, b, spare); got[2] != n {
		t.Errorf("where all have failed, and all but the spare one were tried: %v", got)
	}
	a.Tried, b.Tried = false, false
	b.Health.Worked()
	if got := picks(n, a, b, spare); got[1] != n {
		t.Errorf("once one is back: %v", got)
	}
	a.Tried, b.Tried, spare.Tried = true, true, true
	if got := picks(n, a, b, spare); slices.Max(got) != 0 {
		t.Errorf("where all were tried: %v", got)
	}
}

// TestAvoid: after a while one attempt, and no more, finds out whether a target is back.
func TestAvoid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		main, spare := Option{Weight: 1, Health: new(Health)}, Option{Backup: true, Health: new(Health)}
		for i := range mostSlow {
			if got := picks(1, main, spare); got[0] != 1 {
				t.Errorf("after it was slow %d times: %v", i, got)
			}
			if avoided := main.Slow(); avoided != (i == mostSlow-1) {
				t.Errorf("slow %d times: avoided is %v", i+1, avoided)
			}
		}
		for range 3 {
			if got := picks(9, main, spare); got[1] != 9 || !main.IsAvoided() {
				t.Errorf("while it is avoided: %v", got)
			}
			time.Sleep(AvoidFor + time.Nanosecond)
			if got := picks(9, main, spare); got[0] != 1 {
				t.Errorf("after that: %v", got)
			}
		}
		main.Worked()
		if got := picks(9, main, spare); got[0] != 9 {
			t.Errorf("once it is back: %v", got)
		}
		if main.Slow() {
			t.Error("once it is back it is avoided for being slow once")
		}
	})
}

// TestRace follows who is tried when, and what becomes of those that lose.
func TestRace(t *testing.T) {
	type way struct {
		name  string
		takes time.Duration // until it succeeds, or fails with err
		err   error
	}
	refused := errors.New("refused")
	for _, c := range []struct {
		name  string
		ways  []way
		want  string // who succeeds
		after time.Duration
		lost  []string
	}{
		{"the first is good", []way{{"a", time.Millisecond, nil}, {"b", 0, nil}}, "a", time.Millisecond, nil},
		{"the first fails", []way{{"a", time.Millisecond, refused}, {"b", time.Millisecond, nil}}, "b", 2 * time.Millisecond, []string{"a refused"}},
		{"the first is silent", []way{{"a", time.Hour, nil}, {"b", time.Millisecond, nil}}, "b", 101 * time.Millisecond, []string{"a slow"}},
		{"the first is slow, and yet before the second", []way{{"a", 150 * time.Millisecond, nil}, {"b", time.Second, nil}}, "a", 150 * time.Millisecond, nil},
		{"all fail", []way{{"a", time.Second, refused}, {"b", time.Millisecond, refused}}, "", time.Second, []string{"b refused", "a refused"}},
		{"five are silent", []way{{"a", time.Hour, nil}, {"b", time.Hour, nil}, {"c", time.Hour, nil}, {"d", time.Hour, nil}, {"e", time.Hour, nil}, {"f", 0, nil}},
			"f", 500 * time.Millisecond, []string{"a slow", "b slow", "c slow", "d slow", "e slow"}},
		{"all are silent", []way{{"a", time.Hour, nil}, {"b", time.Hour, nil}}, "", 10 * time.Second, []string{"a context deadline exceeded", "b context deadline exceeded"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, left := time.Now(), c.ways
				var lost []string
				open := map[string]bool{}
				race := Race[way, string]{
					Next: func() (w way, ok bool) {
						if len(left) > 0 {
							w, left, ok = left[0], left[1:], true
						}
						return w, ok
					},
					Delay: func(way) time.Duration { return 100 * time.Millisecond },
					Try: func(ctx context.Context, w way) (string, error) {
						select {
						case <-ctx.Done():
							return "", ctx.Err()
						case <-time.After(w.takes):
							return w.name, w.err
						}
					},
					Close: func(name string) { open[name] = false },
					Lost: func(w way, err error) {
						if err == ErrSlow {
							lost = append(lost, w.name+" slow")
							return
						}
						lost = append(lost, w.name+" "+err.Error())
					},
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				w, got, ok := race.Run(ctx)
				if took := time.Since(began); w.name != c.want || got != c.want || ok != (c.want != "") || took != c.after {
					t.Errorf("%q, %q, %v after %s", w.name, got, ok, took)
				}
				slices.Sort(lost)
				want := slices.Sorted(slices.Values(c.lost))
				if !slices.Equal(lost, want) {
					t.Errorf("lost are %q, want %q", lost, want)
				}
			})
		})
	}
}

// TestRaceClosesLate: what comes when another one has succeeded already is closed.
func TestRaceClosesLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		left := []string{"late", "first"}
		closed := ""
		race := Race[string, string]{
			Next: func() (w string, ok bool) {
				if len(left) > 0 {
					w, left, ok = left[0], left[1:], true
				}
				return w, ok
			},
			Delay: func(string) time.Duration { return time.Millisecond },
			Try: func(_ context.Context, w string) (string, error) {
				if w == "late" {
					time.Sleep(time.Second)
				}
				return w, nil
			},
			Close: func(w string) { closed += w },
			Lost:  func(string, error) {},
		}
		if w, _, _ := race.Run(t.Context()); w != "first" {
			t.Errorf("%q succeeds", w)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if closed != "late" {
			t.Errorf("closed is %q", closed)
		}
	})
}

// TestPickClasses: what is known of options decides before their weights.
func TestPickClasses(t *testing.T) {
	one := func() Option { return Option{Weight: 1, Health: new(Health), Checked: new(Checked)} }
	opt := func(change func(*Option)) Option {
		o := one()
		change(&o)
		return o
	}
	down := func(o *Option) { o.SetDown() }
	failed := func(o *Option) { o.Failed() }
	spare := func(o *Option) { o.Backup = true }
	order := []Option{ // each is chosen only where all before it were tried
		one(),
		opt(spare),
		opt(failed),
		opt(func(o *Option) { o.Offline = true; spare(o) }),
		opt(func(o *Option) { down(o); failed(o) }),
		opt(func(o *Option) { down(o); spare(o) }),
		opt(func(o *Option) { o.Off = true }),
	}
	for i := range order {
		for range 20 {
			if got := Pick(len(order), func(i int) Option { return order[i] }); got != i {
				t.Fatalf("option %d is chosen, want %d", got, i)
			}
		}
		order[i].Tried = true
	}
}

// TestSlowStart: a target that is back has a tenth of its share, then two, and so on, and no less than all of
// it where there is no other.
func TestSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 4000
		a, b := Option{Weight: 1, Health: new(Health), Checked: new(Checked)}, Option{Weight: 1, Health: new(Health)}
		a.SetDown()
		if got := picks(n, a, b); got[1] != n {
			t.Errorf("while it is down: %v", got)
		}
		a.SetUp(time.Now(), 10*time.Second)
		for step := 1; step <= 10; step++ {
			want := n * step / (step + 10)
			// 200 more or less come once in 10⁹ times.
			if got := picks(n, a, b); got[0] < want-200 || got[0] > want+200 {
				t.Errorf("in step %d: %v, want %d", step, got, want)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(24 * time.Hour)
		if got := picks(n, a, b); got[0] < n/2-200 || got[0] > n/2+200 {
			t.Errorf("a day later: %v", got)
		}
		a.SetUp(time.Now(), 0)
		if a.Share(time.Now()) != 100 {
			t.Errorf("without slow start its share is %d", a.Share(time.Now()))
		}
		a.SetUp(time.Now().Add(time.Hour), 10*time.Second)
		if a.Share(time.Now()) != 10 {
			t.Errorf("before it comes back its share is %d", a.Share(time.Now()))
		}
		a.SetUp(time.Now(), 10*time.Second)
		if got := picks(10, a); got[0] != 10 {
			t.Errorf("alone: %v", got)
		}
	})
}
