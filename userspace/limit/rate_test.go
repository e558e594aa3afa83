package limit

import (
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// taken is how many of n tries at a time are let in.
func taken(r *Rate, src netip.Addr, at time.Time, n int) (in int) {
	for range n {
		if r.Take(src, at) == nil {
			in++
		}
	}
	return in
}

func TestRate(t *testing.T) {
	r, now := NewRate(), time.Now()
	a, b := addr("192.0.2.1"), addr("192.0.2.2")
	if n := taken(r, a, now, 1000); n != 1000 {
		t.Errorf("without a bound %d of 1000 were let in", n)
	}
	r.Set(50*time.Millisecond, 4) // 20/s
	for _, step := range []struct {
		src   netip.Addr
		after time.Duration // since the step before
		try   int
		want  int
	}{
		{a, 0, 10, 4},
		{b, 0, 10, 4}, // on its own account
		{addr("::ffff:192.0.2.1"), 0, 1, 0},
		{a, 49 * time.Millisecond, 10, 0},
		{a, time.Millisecond, 10, 1},
		{a, 100 * time.Millisecond, 10, 2},
		{a, time.Hour, 10, 4}, // no more than a burst, however long the pause
		{addr("2001:db8::1"), 0, 3, 3},
		{addr("2001:db8::ffff:1"), 0, 3, 1}, // of the same /64
		{addr("2001:db8:0:1::1"), 0, 10, 4},
		{netip.Addr{}, 0, 1000, 1000}, // a trusted hop's, whose client is not known yet
	} {
		now = now.Add(step.after)
		if n := taken(r, step.src, now, step.try); n != step.want {
			t.Errorf("%v: %d of %d were let in, want %d", step, n, step.try, step.want)
		}
	}
	err := r.Take(a, now)
	var over *RateError
	if !errors.As(err, &over) || over.After != 50*time.Millisecond ||
		over.Source != netip.MustParsePrefix("192.0.2.1/32") || !strings.Contains(err.Error(),
		"192.0.2.1 may open one every 50ms, and 4 at once (limits.new_connections_per_source)") {
		t.Errorf("got %v", err)
	}
	r.Set(0, 0)
	if n := taken(r, a, now, 100); n != 100 || r.sources() != 0 {
		t.Errorf("without a bound again %d of 100 were let in, %d sources are remembered", n, r.sources())
	}
}

// TestRateForgets bounds the table, under a flood from many sources and after it.
func TestRateForgets(t *testing.T) {
	r, now := NewRate(), time.Now()
	r.most = 1000
	r.Set(time.Second, 10)
	greedy := addr("192.0.2.1")
	if n := taken(r, greedy, now, 20); n != 10 {
		t.Fatalf("%d were let in", n)
	}
	for i := range 50_000 {
		if r.Take(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now) != nil {
			t.Fatal("a newcomer was refused because there are many")
		}
		if i%100 == 0 && r.Take(greedy, now) == nil {
			t.Fatalf("who went on coming was forgotten after %d others", i)
		}
		if n := r.sources(); n > r.most+1 {
			t.Fatalf("%d sources are remembered, want at most %d", n, r.most)
		}
	}
	// Once all buckets are full again nobody needs to be remembered but who comes.
	for range 2 {
		now = now.Add(10 * time.Second)
		r.Take(greedy, now)
	}
	if n := r.sources(); n > 2 {
		t.Errorf("%d sources are remembered after a pause", n)
	}
	// Nor is anybody forgotten before: half a burst ago is too early for a whole one.
	r = NewRate()
	r.Set(time.Second, 10)
	now = now.Add(time.Hour)
	taken(r, greedy, now, 10)
	for range 3 {
		now = now.Add(3 * time.Second)
		r.Take(addr("192.0.2.9"), now)
	}
	if n := taken(r, greedy, now, 20); n != 9 {
		t.Errorf("%d were let in after 9 s, want 9", n)
	}
}

func TestRateMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	r, now := NewRate(), time.Now()
	r.Set(time.Second, 10)
	for i := range 2 * rateSources {
		r.Take(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	kept := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%d sources: %.1f MB", r.sources(), float64(kept)/1e6)
	if kept > 8<<20 {
		t.Errorf("%d sources take %d bytes", r.sources(), kept)
	}
	runtime.KeepAlive(r)
}

// TestRateTogether lets many take at the same time: no token is given twice.
func TestRateTogether(t *testing.T) {
	r, now := NewRate(), time.Now()
	r.Set(time.Hour, 100)
	var in atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { in.Add(int64(taken(r, addr("192.0.2.1"), now, 100))) })
	}
	all.Wait()
	if in.Load() != 100 {
		t.Errorf("%d were let in, want 100", in.Load())
	}
}

func BenchmarkRate(b *testing.B) {
	r, now := NewRate(), time.Now()
	r.Set(time.Millisecond, 10)
	a := addr("192.0.2.1")
	for i := 0; b.Loop(); i++ {
		r.Take(a, now.Add(time.Duration(i)*time.Millisecond))
	}
}

// sources is how many are remembered; some count twice.
func (r *Rate) sources() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.now) + len(r.before)
}
