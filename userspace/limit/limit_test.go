package limit

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func acquire(t *testing.T, l *Limiter, src string) *Lease {
	t.Helper()
	lease, err := l.Acquire(addr(src))
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func TestSourceOf(t *testing.T) {
	tests := []struct{ addr, want string }{
		{"192.0.2.1", "192.0.2.1/32"},
		{"::ffff:192.0.2.1", "192.0.2.1/32"},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"},
		{"2001:db8:1:2::", "2001:db8:1:2::/64"},
		{"fe80::1%eth0", "fe80::/64"},
		{"fe80::2%eth1", "fe80::/64"},
		{"::1", "::/64"},
		{"::", "::/64"},
		{"0.0.0.0", "0.0.0.0/32"},
		{"100.64.0.1", "100.64.0.1/32"},
		// Two nodes of one tailnet are no one customer.
		{"fd7a:115c:a1e0::1", "fd7a:115c:a1e0::1/128"},
		{"fd7a:115c:a1e0:ab12:4843:cd96:6258:b240", "fd7a:115c:a1e0:ab12:4843:cd96:6258:b240/128"},
		{"fd7a:115c:a1e0::1%tailscale0", "fd7a:115c:a1e0::1/128"},
		{"fd7a:115c:a1e1::1", "fd7a:115c:a1e1::/64"},
	}
	for _, tt := range tests {
		if got := sourceOf(addr(tt.addr)).prefix(); got != netip.MustParsePrefix(tt.want) {
			t.Errorf("%s: got %v, want %s", tt.addr, got, tt.want)
		}
	}
	if got := sourceOf(netip.Addr{}).prefix(); got.IsValid() {
		t.Errorf("the zero Addr: %v", got)
	}
}

func TestAcquire(t *testing.T) {
	l := New(5, 2)
	a := acquire(t, l, "192.0.2.1")
	acquire(t, l, "::ffff:192.0.2.1")
	_, err := l.Acquire(addr("192.0.2.1"))
	var over *OverError
	if !errors.Is(err, ErrSource) || errors.Is(err, ErrTotal) || !errors.As(err, &over) ||
		over.Source != netip.MustParsePrefix("192.0.2.1/32") || over.Count != 2 || over.Limit != 2 {
		t.Errorf("third from one source: %v", err)
	}
	if want := "too many connections from one source: 192.0.2.1 has 2, the limit is 2 (limits.connections_per_source)"; err.Error() != want {
		t.Errorf("got %q", err)
	}
	acquire(t, l, "2001:db8::1")
	acquire(t, l, "2001:db8::ffff:1")
	if _, err := l.Acquire(addr("2001:db8::2")); !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), "2001:db8::/64 has 2") {
		t.Errorf("third from one /64: %v", err)
	}
	acquire(t, l, "2001:db8:0:1::1") // the next /64
	_, err = l.Acquire(addr("198.51.100.1"))
	if !errors.Is(err, ErrTotal) || errors.Is(err, ErrSource) || !errors.As(err, &over) || over.Count != 5 || over.Limit != 5 {
		t.Errorf("sixth in all: %v", err)
	}
	if got := l.Total(); got != 5 {
		t.Errorf("total %d: a refused connection counts", got)
	}

	a.Release()
	a.Release() // does nothing
	if got := l.Total(); got != 4 {
		t.Errorf("total %d after a release, want 4", got)
	}
	acquire(t, l, "192.0.2.1")
	if _, err := l.Acquire(addr("192.0.2.1")); err == nil {
		t.Error("a second release gave room")
	}
}

func TestUnknownSource(t *testing.T) {
	l := New(3, 1)
	for range 3 {
		if _, err := l.Acquire(netip.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Acquire(netip.Addr{}); !errors.Is(err, ErrTotal) {
		t.Errorf("fourth in all: %v", err)
	}
	if got := l.Sources(); len(got) != 0 {
		t.Errorf("sources %v", got)
	}
}

func TestMove(t *testing.T) {
	l := New(10, 2)
	a, b := acquire(t, l, "192.0.2.1"), acquire(t, l, "192.0.2.1")
	if err := a.Move(addr("198.51.100.1")); err != nil {
		t.Fatal(err)
	}
	acquire(t, l, "192.0.2.1") // there is room again
	acquire(t, l, "198.51.100.1")
	if err := b.Move(addr("198.51.100.1")); !errors.Is(err, ErrSource) {
		t.Errorf("a move to a full source: %v", err)
	}
	if _, err := l.Acquire(addr("192.0.2.1")); err == nil {
		t.Error("a failed move gave up its place")
	}
	// A move within a full source is none.
	if err := b.Move(addr("::ffff:192.0.2.1")); err != nil {
		t.Error(err)
	}
	if got := l.Total(); got != 4 {
		t.Errorf("total %d, want 4", got)
	}
	b.Release()
	if err := b.Move(addr("203.0.113.1")); err != nil || l.Total() != 3 || len(l.Sources()) != 2 {
		t.Errorf("a released lease moved: %v, %v", err, l.Sources())
	}
	// The full total does not stop a move, nor does an unknown source.
	l.SetLimits(3, 2)
	if err := a.Move(netip.Addr{}); err != nil {
		t.Error(err)
	}
	if err := a.Move(addr("203.0.113.1")); err != nil {
		t.Error(err)
	}
	if n := testing.AllocsPerRun(100, func() { a.Move(addr("203.0.113.1")); a.Move(addr("203.0.113.2")) }); n > 0 {
		t.Errorf("Move makes %v allocations", n)
	}
}

func TestSetLimits(t *testing.T) {
	l := New(0, -1) // no limits
	var leases []*Lease
	for range 10 {
		leases = append(leases, acquire(t, l, "192.0.2.1"))
	}
	l.SetLimits(20, 3)
	if _, err := l.Acquire(addr("192.0.2.1")); !errors.Is(err, ErrSource) {
		t.Errorf("over the new limit: %v", err)
	}
	for _, lease := range leases[:8] {
		lease.Release()
	}
	acquire(t, l, "192.0.2.1")
	l.SetLimits(1, 3)
	if _, err := l.Acquire(addr("192.0.2.2")); !errors.Is(err, ErrTotal) {
		t.Errorf("over the new limit in all: %v", err)
	}
	l.SetLimits(0, 0)
	acquire(t, l, "192.0.2.1")
}

func TestSources(t *testing.T) {
	l := New(0, 0)
	for src, n := range map[string]int{"192.0.2.1": 2, "192.0.2.2": 5, "2001:db8::1": 5, "192.0.2.4": 1} {
		for range n {
			acquire(t, l, src)
		}
	}
	want := map[netip.Prefix]int{netip.MustParsePrefix("192.0.2.1/32"): 2, netip.MustParsePrefix("192.0.2.2/32"): 5,
		netip.MustParsePrefix("2001:db8::/64"): 5, netip.MustParsePrefix("192.0.2.4/32"): 1}
	if got := l.Sources(); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestEndsAtZero lets many goroutines acquire, move and release at random, holds the counts against the limits all the
// while, and expects nothing to be left in the end.
//
// +checklocksignore
func TestEndsAtZero(t *testing.T) {
	const total, perSource = 60, 7
	l := New(total, perSource)
	pick := func(r *rand.Rand) netip.Addr {
		switch n := r.IntN(12); {
		case n == 0:
			return netip.Addr{}
		case n < 6:
			return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
		case n < 8: // the same sources, mapped
			return netip.AddrFrom16(netip.AddrFrom4([4]byte{192, 0, 2, byte(n - 5)}).As16())
		default: // two /64s
			return netip.AddrFrom16([16]byte{0x20, 1, 0x0d, 0xb8, 7: byte(n % 2), 15: byte(r.IntN(256))})
		}
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			if n := l.Total(); n > total || n < 0 {
				t.Errorf("%d in all", n)
			}
			for s, n := range l.Sources() {
				if n < 1 || n > perSource {
					t.Errorf("%v has %d", s, n)
				}
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	shared := make(chan *Lease, 16) // leases that two goroutines use at once
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			var held []*Lease
			for range 5000 {
				switch r.IntN(7) {
				case 6:
					if lease, err := l.Acquire(netip.Addr{}); err == nil {
						_ = lease.MoveSoon(t.Context(), pick(r), 1, time.Duration(r.IntN(300))*time.Microsecond)
						held = append(held, lease)
					}
				case 5:
					if len(held) > 0 {
						lease := held[r.IntN(len(held))]
						lease.Yield(lease.Release)
						if r.IntN(3) == 0 {
							lease.Keep()
						}
					}
				case 0, 1:
					if lease, err := l.Acquire(pick(r)); err == nil {
						held = append(held, lease)
						select {
						case shared <- lease:
						default:
						}
					} else if !errors.Is(err, ErrTotal) && !errors.Is(err, ErrSource) {
						t.Error(err)
					}
				case 2:
					if len(held) > 0 {
						_ = held[r.IntN(len(held))].Move(pick(r))
					}
				case 3:
					if len(held) > 0 {
						i := r.IntN(len(held))
						held[i].Release() // stays in held: a later one must not count
					}
				case 4:
					select {
					case lease := <-shared:
						if r.IntN(2) == 0 {
							_ = lease.Move(pick(r))
						} else {
							lease.Release()
						}
					default:
					}
				}
			}
			for _, lease := range held {
				lease.Release()
			}
		})
	}
	wg.Wait()
	close(stop)
	<-watched
	if n, s := l.Total(), l.Sources(); n != 0 || len(s) != 0 {
		t.Errorf("%d leases and the sources %v are left", n, s)
	}
	if len(l.sources) != 0 {
		t.Errorf("%d entries are left", len(l.sources))
	}
	if l.waiting != 0 {
		t.Errorf("%d leases wait yet", l.waiting)
	}
	if l.yielding != 0 || l.queue != (queue{}) {
		t.Errorf("%d leases yield yet: %v", l.yielding, l.queue)
	}
}

// TestMoveSoon: who waits for a place of a source gets it in his turn, and counts only then.
//
// +checklocksignore
func TestMoveSoon(t *testing.T) {
	l := NewRequests(4, 2)
	src, ctx := addr("192.0.2.1"), t.Context()
	held := []*Lease{acquire(t, l, "192.0.2.1"), acquire(t, l, "192.0.2.1")}
	unknown := func() *Lease {
		lease, err := l.Acquire(netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		return lease
	}
	waiting := func(n int) {
		t.Helper()
		for {
			l.mu.Lock()
			now := l.waiting
			l.mu.Unlock()
			if now == n {
				return
			}
			runtime.Gosched()
		}
	}
	turns := make(chan int)
	for i := range 4 {
		lease := unknown()
		go func() {
			if err := lease.MoveSoon(ctx, src, 2, time.Minute); err != nil {
				t.Error(err)
			}
			turns <- i
			lease.Release()
		}()
		waiting(i + 1)
	}
	if n := l.Total(); n != 2 {
		t.Errorf("%d count while four wait, want 2", n)
	}
	last := unknown()
	if err := last.MoveSoon(ctx, src, 2, time.Minute); !errors.Is(err, ErrSource) {
		t.Errorf("behind so many: %v", err)
	}
	last.Release()
	for i := range 4 {
		if i == 0 {
			held[0].Release()
		}
		if got := <-turns; got != i {
			t.Errorf("number %d has its turn, want %d", got, i)
		}
	}
	waiting(0)
	for acquired := l.Total(); acquired != 1; acquired = l.Total() {
		runtime.Gosched() // the last one's release
	}
	held[0] = acquire(t, l, "192.0.2.1")
	cut, cancel := context.WithCancel(ctx)
	left, late := unknown(), unknown()
	cancel()
	if err := left.MoveSoon(cut, src, 2, time.Minute); !errors.Is(err, ErrSource) {
		t.Errorf("the client has left: %v", err)
	}
	if err := late.MoveSoon(ctx, src, 2, time.Millisecond); !errors.Is(err, ErrSource) {
		t.Errorf("too late: %v", err)
	}
	for _, lease := range append(held, left, late) {
		lease.Release()
	}
	if n := l.Total(); n != 0 || len(l.sources) != 0 {
		t.Errorf("%d leases are left, of %d sources", n, len(l.sources))
	}
}

// TestYield: a newcomer gets the place of who has yielded for longest, of its own source where that has too
// many.
func TestYield(t *testing.T) {
	l := New(4, 2)
	var given []string
	lease := func(src, name string) *Lease {
		a := acquire(t, l, src)
		a.Yield(func() { given = append(given, name); a.Release() })
		return a
	}
	expect := func(what string, want ...string) {
		t.Helper()
		if !slices.Equal(given, want) {
			t.Errorf("%s: %v gave their place, want %v", what, given, want)
		}
		given = nil
	}
	lease("192.0.2.1", "a")
	b := lease("192.0.2.2", "b")
	lease("192.0.2.2", "c")
	expect("there is room")
	acquire(t, l, "192.0.2.2") // d, which keeps its place
	expect("a third of one source", "b")
	acquire(t, l, "192.0.2.3")
	expect("the fourth of all")
	acquire(t, l, "192.0.2.4")
	expect("the fifth of all", "a")
	b.Keep() // has no place any more
	acquire(t, l, "192.0.2.2")
	expect("one more of the source", "c")
	if _, err := l.Acquire(addr("192.0.2.5")); !errors.Is(err, ErrTotal) {
		t.Errorf("one more of all, where none yields: %v", err)
	}
	if l.TakeOldest() || l.Yielding() != 0 {
		t.Error("some yield yet")
	}
}

// TestYieldInVain: who can have no place takes none from another.
func TestYieldInVain(t *testing.T) {
	l := New(2, 1)
	acquire(t, l, "192.0.2.1")
	acquire(t, l, "192.0.2.2").Yield(func() { t.Error("it was asked for its place") })
	if _, err := l.Acquire(addr("192.0.2.1")); err == nil {
		t.Error("a source has more than its limit")
	}
}

// TestYieldLate: who has been called for its place and gives none, because it is about to need it, is not
// called again.
func TestYieldLate(t *testing.T) {
	l := New(1, 0)
	calls := 0
	a := acquire(t, l, "192.0.2.1")
	a.Yield(func() { calls++ })
	for range 3 {
		if _, err := l.Acquire(addr("192.0.2.2")); !errors.Is(err, ErrTotal) {
			t.Errorf("got %v", err)
		}
	}
	if calls != 1 {
		t.Errorf("called %d times", calls)
	}
}

// TestFloodIsForgotten: after many sources came and went, the map that knew them is gone too.
//
// +checklocksignore
func TestFloodIsForgotten(t *testing.T) {
	l := New(0, 0)
	var leases []*Lease
	for i := range 5000 {
		lease, err := l.Acquire(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
		if err != nil {
			t.Fatal(err)
		}
		leases = append(leases, lease)
	}
	if l.peak != 5000 {
		t.Errorf("peak %d", l.peak)
	}
	for _, lease := range leases {
		lease.Release()
	}
	if l.peak != 0 || len(l.sources) != 0 {
		t.Errorf("peak %d, %d entries: the map was kept", l.peak, len(l.sources))
	}
}

func BenchmarkAcquireRelease(b *testing.B) {
	b.Run("one source", func(b *testing.B) {
		l := New(65536, 256)
		src := addr("192.0.2.1")
		b.ReportAllocs()
		for b.Loop() {
			lease, _ := l.Acquire(src)
			lease.Release()
		}
	})
	b.Run("65535 others", func(b *testing.B) {
		l := full(b)
		src := addr("2001:db8::1")
		b.ReportAllocs()
		for b.Loop() {
			lease, _ := l.Acquire(src)
			lease.Release()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		l := full(b)
		l.SetLimits(0, 256)
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			src := netip.AddrFrom4([4]byte{192, 0, byte(rand.Uint32()), byte(rand.Uint32())})
			for pb.Next() {
				lease, _ := l.Acquire(src)
				lease.Release()
			}
		})
	})
}

func BenchmarkRefuse(b *testing.B) {
	l := New(65536, 1)
	src := addr("192.0.2.1")
	if _, err := l.Acquire(src); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := l.Acquire(src); err == nil {
			b.Fatal("not refused")
		}
	}
}

func BenchmarkMove(b *testing.B) {
	l := full(b)
	lease, _ := l.Acquire(netip.Addr{})
	src := [2]netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		_ = lease.Move(src[i%2])
	}
}

// full has 65,535 sources of one connection each.
func full(b *testing.B) *Limiter {
	l := New(65536, 256)
	for i := range 65535 {
		if _, err := l.Acquire(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})); err != nil {
			b.Fatal(err)
		}
	}
	return l
}

// TestAdopt: what another process has let in is counted, and never refused, and new connections wait for room.
func TestAdopt(t *testing.T) {
	l := New(3, 2)
	var all []*Lease
	for range 4 {
		all = append(all, l.Adopt(addr("192.0.2.1")))
	}
	all = append(all, l.Adopt(netip.Addr{}))
	if got := l.Total(); got != 5 {
		t.Errorf("total %d, want 5", got)
	}
	if got := all[0].Source(); got != netip.MustParsePrefix("192.0.2.1/32") {
		t.Errorf("its source is %v", got)
	}
	if got := all[4].Source(); got.IsValid() {
		t.Errorf("the source of an unknown one is %v", got)
	}
	if _, err := l.Acquire(addr("198.51.100.1")); !errors.Is(err, ErrTotal) {
		t.Errorf("one more in all: %v", err)
	}
	l.SetLimits(10, 2)
	if _, err := l.Acquire(addr("192.0.2.1")); !errors.Is(err, ErrSource) {
		t.Errorf("one more of that source: %v", err)
	}
	for _, a := range all {
		a.Release()
	}
	if l.Total() != 0 || len(l.Sources()) != 0 {
		t.Errorf("%d are left, %v", l.Total(), l.Sources())
	}
}
