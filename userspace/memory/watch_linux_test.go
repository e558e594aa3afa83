package memory

import (
	"cmp"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

// TestGreedySources: each source that holds much is refused while memory is short, and no other one; a hop is not.
func TestGreedySources(t *testing.T) {
	prefix := func(last byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, last}), 32) }
	var all []stalled
	for source, n := range map[byte]int64{1: 2 * greedyMin, 2: greedyMin, 3: greedyMin - 1} {
		all = append(all, stalled{owner: owner{source: prefix(source)}, held: n / 2}, stalled{owner: owner{source: prefix(source)}, held: n - n/2})
	}
	all = append(all, stalled{owner: owner{alone: netip.AddrPortFrom(prefix(4).Addr(), 1)}, held: 9 * greedyMin})
	greedy := greedySources(all, greedyMin)
	w := newWatch(t)
	w.refused.Store(&greedy)
	for source, refused := range map[byte]bool{1: true, 2: true, 3: false, 4: false} {
		if err := w.Refuse(prefix(source).Addr()); (err != nil) != refused {
			t.Errorf("source %d: %v", source, err)
		}
	}
	if most, held := greediest(greedy); most != prefix(1) || held != 2*greedyMin {
		t.Errorf("%v holds most: %d bytes", most, held)
	}
}

// TestGreedyTakes: what is on the way to a client who takes it is held for nobody. What a client sends is no sign that
// it takes anything.
func TestGreedyTakes(t *testing.T) {
	w := newWatch(t)
	peer := netip.MustParseAddrPort("192.0.2.1:5")
	var up, down int64
	fl := &flow.Flow{Client: peer.String(), Downstream: peer.String(), Bytes: func() (int64, int64) { return up, down }}
	w.opts.Flows.Add(fl)
	defer w.opts.Flows.Remove(fl)
	now := time.Now()
	sockets := tcpsock.Sockets{peer: {Held: 2 * greedyMin}}
	for i, look := range []struct {
		up, down int64 // MiB
		greedy   bool
	}{{0, 1, false}, {0, 2, false}, {0, 2, true}, {1, 2, true}, {2, 2, true}, {2, 3, false}, {2, 3, true}} {
		up, down = look.up<<20, look.down<<20
		now = now.Add(lookEvery)
		if greedy := len(greedySources(w.stalled(now, sockets), greedyMin)) > 0; greedy != look.greedy {
			t.Errorf("look %d, with %d bytes up and %d down: greedy is %v", i, up, down, greedy)
		}
	}
}

// TestSlowReader: who takes or sends a little now and then stands still, and who takes in half a minute what is held
// for him does not, whoever moves the bytes; nor does one who goes on after a long rest.
func TestSlowReader(t *testing.T) {
	const held = 3 << 20
	for _, v := range []struct {
		name     string
		up, down int64 // bytes between two looks
		stands   bool
	}{
		{"nothing", 0, 0, true},
		{"a byte is sent", 1, 0, true},
		{"a byte is taken", 0, 1, true},
		{"too little is taken", 0, held / 200, true},
		{"enough is taken", 0, held / 100, false},
	} {
		for _, mover := range []string{"pumps", "the kernel"} {
			t.Run(v.name+", "+mover, func(t *testing.T) {
				w := newWatch(t)
				peer := netip.MustParseAddrPort("192.0.2.1:5")
				var up, down int64
				var moved time.Time
				fl := &flow.Flow{Client: peer.String(), Downstream: peer.String(), Bytes: func() (int64, int64) { return up, down }}
				sockets := tcpsock.Sockets{peer: {Held: held}}
				if mover == "pumps" {
					fl.Held = func() (int64, time.Time) { return held, moved }
				}
				w.opts.Flows.Add(fl)
				defer w.opts.Flows.Remove(fl)
				now := time.Now()
				look := func(moreUp, moreDown int64, stands bool) {
					t.Helper()
					if up, down = up+moreUp, down+moreDown; moreDown > 0 {
						moved = now
					}
					isStanding := false
					for _, s := range w.stalled(now, sockets) {
						isStanding = isStanding || now.Sub(s.since) >= stoppedForShort
					}
					if isStanding != stands {
						t.Errorf("after %d bytes up and %d down it stands still: %v", up, down, isStanding)
					}
					now = now.Add(lookEvery)
				}
				moved = now
				for range stoppedForShort / lookEvery {
					look(v.up, v.down, false)
				}
				for range 8 {
					look(v.up, v.down, v.stands)
				}
				now = now.Add(time.Hour)
				look(0, held, false)
			})
		}
	}
}

// TestGreedyForgotten: sources that were refused are not remembered without bound, and who is a hop by now is let in.
func TestGreedyForgotten(t *testing.T) {
	hop := netip.MustParsePrefix("192.0.2.9/32")
	w, now := newWatch(t), time.Now()
	w.opts.MayBeMany, w.greedy = hop.Contains, map[netip.Prefix]greed{}
	source := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0, byte(i >> 8), byte(i)}), 64)
	}
	for i := range 2 * mostGreedy {
		w.greedy[source(i)] = greed{}.again(1, now.Add(time.Duration(i-2*mostGreedy)*time.Millisecond))
	}
	w.greedy[hop] = greed{}.again(1, now)
	w.refuse(now, Use{})
	if n := len(w.greedy); n > mostGreedy || n < mostGreedy/4 {
		t.Errorf("%d sources are remembered", n)
	}
	if w.Refuse(source(2*mostGreedy-1).Addr()) == nil {
		t.Error("the last one may open connections")
	}
	if err := w.Refuse(hop.Addr()); err != nil {
		t.Errorf("a hop: %v", err)
	}
}

// TestVictims: connections are ended in the order that one by one would give, and to find it for ten times as many
// takes about ten times as long.
func TestVictims(t *testing.T) {
	now := time.Now()
	make := func(n, sources int) (all []stalled) {
		r := rand.New(rand.NewPCG(uint64(n), uint64(sources)))
		for i := range n {
			a := netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})
			all = append(all, stalled{netip.AddrPortFrom(a, uint16(i)), owner{source: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 0, byte(r.IntN(sources))}), 32)},
				now.Add(-time.Duration(r.IntN(1e6)) * time.Microsecond), stoppedMin + r.Int64N(1<<20), nil})
		}
		return all
	}
	until := now.Add(-100 * time.Millisecond)
	for _, n := range []int{0, 1, 7, 300} {
		left := slices.DeleteFunc(make(n, 5), func(s stalled) bool { return s.since.After(until) })
		for i, v := range victims(make(n, 5), until) {
			source, _ := greediest(greedySources(left, 1))
			longest := -1
			for j, s := range left {
				if s.owner.source == source && (longest < 0 || s.since.Before(left[longest].since)) {
					longest = j
				}
			}
			if v.peer != left[longest].peer {
				t.Fatalf("of %d number %d is %v, want %v", n, i, v, left[longest])
			}
			left = slices.Delete(left, longest, longest+1)
		}
		if len(left) > 0 {
			t.Errorf("of %d %d are left out", n, len(left))
		}
	}
	took := func(n int) time.Duration {
		all, least := make(n, 256), time.Hour
		for range 5 {
			started := time.Now()
			victims(all, now)
			least = min(least, time.Since(started))
		}
		return least
	}
	if few, many := took(5_000), took(50_000); many > 40*few {
		t.Errorf("5,000 take %v, and 50,000 %v", few, many)
	}
}

// TestTCPMemory: what the kernel says of it is understood, in a network namespace of a container too, which has no
// tcp_mem.
func TestTCPMemory(t *testing.T) {
	w := newWatch(t)
	w.SetBudget(BudgetOf(0))
	use := func(where string) (tcp int64) {
		used, short := tcpsock.Memory("/proc")
		if used < 0 || short < 100<<12 {
			t.Errorf("%s: %d bytes, short from %d", where, used, short)
		}
		if u := w.use(); u.Used <= 0 || u.Total <= 0 {
			t.Errorf("%s: %+v", where, u)
		}
		return short
	}
	first := use("here")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocks: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if n := use("in a namespace"); n < first/2 || n > 2*first {
			t.Logf("%d bytes in a namespace, %d here: has somebody set tcp_mem?", n, first)
		}
	}()
	<-done
}

// TestMemoryOfOthers: what other programs' sockets hold leads to nothing: neither is a source refused for it, nor a flow
// ended.
func TestMemoryOfOthers(t *testing.T) {
	for _, v := range []struct {
		used, own, short int64
		over             bool // 3/4
	}{
		{75, 75, 100, true},
		{74, 74, 100, false},
		{95, 5, 100, false},
		{200, 5, 100, false},
		{100, 30, 100, false}, // of 50
		{100, 38, 100, true},
		{60, 40, 100, false}, // of 80
		{80, 60, 100, true},
		{1000, 1000, 100, true},
		{0, 0, 0, false},
		{5, 9, 100, false}, // read one after the other
	} {
		if got := tcpUse(v.used<<20, v.own<<20, v.short<<20); got.over(3, 4) != v.over {
			t.Errorf("%+v: %+v", v, got)
		}
	}
	// A program of this machine whose peer has stopped reading, while nothing is known but all sockets' sum.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var used int64
	eventually(t, "the kernel counts what is held", func() bool {
		c := dialTCP(t, ln.Addr().String())
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		io.Copy(c, forever{})
		used, _ = tcpsock.Memory("/proc")
		return used > 8<<20
	})
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	at := freeAddr(t)
	w := carry(t, up, at)
	if n, targets, _ := w.socketMemory(); n > 1<<20 || targets > 0 {
		t.Errorf("%d bytes of %d are said to be ours, and %d those of targets", n, used, targets)
	}
	w.fake(t, used, used)
	if u := w.use(); u.over(1, 2) {
		t.Errorf("ours are short of memory: %+v", u)
	}
	// But what a target on this machine holds for such readers is our clients' fault.
	for range 8 {
		dialTCP(t, at).SetReadBuffer(16 << 10)
	}
	if err := os.WriteFile(filepath.Join(w.proc, "sys/net/ipv4/tcp_wmem"), []byte("4096\t16384\t4194304\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ours are short of memory", func() bool {
		u := w.use()
		return u.over(3, 4) && u.What == OfTCP
	})
}

// TestTargetsOfStopped: what other programs' sockets hold is not taken for what targets hold for readers that have
// stopped, whether the targets are here, may be in another network namespace, or are elsewhere.
func TestTargetsOfStopped(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 8 {
		c := dialTCP(t, ln.Addr().String())
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		io.Copy(c, forever{})
	}
	w := newWatch(t)
	diag, err := tcpsock.OpenDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for _, target := range []string{backend(t, func(net.Conn) {}), "10.255.255.1:80", "[fd7a:115c:a1e0::1]:80", "192.0.2.7:80"} {
		var flows []*flow.Flow
		for range 100 {
			fl := &flow.Flow{Client: "192.0.2.1:5", Downstream: "192.0.2.1:5", Upstream: target, Held: func() (int64, time.Time) { return 1 << 10, time.Now() }}
			flows = append(flows, fl)
			w.opts.Flows.Add(fl)
		}
		var used int64
		if err := diag.Each(nil, func(s tcpsock.Socket, _ netip.AddrPort) { used += s.Held }); err != nil || used < 8<<20 {
			t.Fatalf("others hold %d bytes: %v", used, err)
		}
		w.fake(t, used, used)
		if err := os.WriteFile(filepath.Join(w.proc, "sys/net/ipv4/tcp_wmem"), []byte("4096\t16384\t4194304\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if u := w.use(); u.over(1, 2) {
			t.Errorf("with readers of %s ours are short of memory: %+v", target, u)
		}
		for _, fl := range flows {
			w.opts.Flows.Remove(fl)
		}
	}
}

// TestDialledSocketsCount: what a target has sent and nobody has read is ours, whoever moves the flow's bytes.
func TestDialledSocketsCount(t *testing.T) {
	up := backend(t, func(c net.Conn) { io.Copy(c, forever{}) })
	dialTCP(t, up)
	w := newWatch(t)
	fl := &flow.Flow{Client: "192.0.2.1:5", Downstream: "192.0.2.1:5", Upstream: up}
	w.opts.Flows.Add(fl)
	defer w.opts.Flows.Remove(fl)
	eventually(t, "it counts", func() bool { own, _, _ := w.socketMemory(); return own > 32<<10 })
}

// TestBudgetOfOthers: what other programs' sockets hold is no part of the budget, also where it is less than half of
// that, and this process has taken the rest.
func TestBudgetOfOthers(t *testing.T) {
	w := newWatch(t)
	budget := 4 * processMemory()
	w.SetBudget(budget)
	w.fake(t, budget/2-1, 2*budget)
	if u := w.use(); u.over(1, 2) {
		t.Errorf("ours are short of memory: %+v", u)
	}
}

// TestNothingSaysWhatIsUsed: the budget is kept by what is known where the kernel hides the rest.
func TestNothingSaysWhatIsUsed(t *testing.T) {
	w := newWatch(t)
	w.SetBudget(16 << 20)
	w.proc, w.cgroups = t.TempDir(), t.TempDir()
	if u := w.use(); u.Used < 1<<20 || u.Total != 16<<20 || u.What != OfBudget {
		t.Errorf("%+v", u)
	}
}

// TestGreedAgain: a source that holds much once more as soon as it is let in is refused for twice as long each time.
func TestGreedAgain(t *testing.T) {
	now := time.Now()
	g := greed{}.again(1, now)
	for want := greedyFor; want < 4*greedyMost; want *= 2 {
		want := min(want, greedyMost)
		if g = g.again(1, now); g.refused != want {
			t.Errorf("it is refused for %v, not for %v, while it is refused", g.refused, want)
		}
		if now = now.Add(want - 1); g.isOver(now) {
			t.Errorf("it is let in before %v", want)
		}
		if now = now.Add(1); !g.isOver(now) {
			t.Errorf("it is refused after %v", want)
		}
		g = g.again(1, now)
	}
}

// TestProgressIsOf: what a flow has moved, and what it leaves to the kernel at its end, are counted apart.
func TestProgressIsOf(t *testing.T) {
	for _, c := range []struct {
		was, is int64
		same    bool
	}{
		{0, 0, true},
		{5, 9, true},
		{9, 5, false},          // another flow from the same port
		{100 << 20, -9, false}, // the flow has ended
		{-9, -5, true},
		{-5, -9, true}, // more came to be held: that is no new beginning
		{-5, 7, false},
	} {
		if got := (progress{bytes: c.was}).isOf(c.is); got != c.same {
			t.Errorf("%d after %d goes on: %v", c.is, c.was, got)
		}
	}
}

// TestGlance: the watch looks whole as often as what is taken calls for, and not at all while nobody is connected.
func TestGlance(t *testing.T) {
	const small, large = 64 << 20, 4 << 30
	for _, v := range []struct {
		name      string
		used      int64
		budget    int64 // 0: there is none; -1: of half there are 24 MiB left, which is sooner than short
		short     int64 // 0: small
		connected bool
		greedy    bool
		wasShort  bool
		calm      int64 // the watch has looked just now, and up to so much nothing is to be done for long
		looks     int   // of 9 glances in 2 s
		isShort   bool
		pause     time.Duration
	}{
		{name: "nobody is connected", looks: 1, pause: idleEvery},
		{name: "nobody is connected, and others hold half", used: small / 2, looks: 9, pause: idleEvery},
		{name: "somebody is connected", connected: true, looks: 1, pause: lookEvery},
		{name: "less than half is taken", connected: true, used: small/2 - 4096, looks: 1, pause: lookEvery},
		{name: "half is taken", connected: true, used: small / 2, looks: 9, pause: lookEvery},
		{name: "half of the budget is taken", budget: 2 << 20, looks: 9, isShort: true, pause: lookEvery},
		{name: "memory is large", connected: true, short: large, looks: 1, pause: restEvery},
		{name: "memory is large, but a quarter is taken", connected: true, short: large, used: large / 4, looks: 1, pause: restEvery},
		{name: "memory is large, but nearly half is taken", connected: true, short: large, used: large/2 - small, looks: 1, pause: restEvery},
		{name: "memory is large, and half is taken, and calm", connected: true, short: large, used: large / 2, wasShort: true, calm: 1 << 40, isShort: true, pause: restEvery},
		{name: "memory is large, and 5/8 are taken, and calm", connected: true, short: large, used: large / 8 * 5, wasShort: true, calm: 1 << 40, isShort: true, pause: lookEvery},
		{name: "memory is large, but not the budget", connected: true, short: large, budget: -1, looks: 1},
		{name: "a source is refused", greedy: true, looks: 3, pause: lookEvery},
		{name: "half was taken", wasShort: true, looks: 1, pause: idleEvery},
		{name: "half is taken, and calm", connected: true, used: small / 2, wasShort: true, calm: 1 << 40, looks: 0, isShort: true, pause: lookEvery},
		{name: "half is taken, and more than when it was calm", connected: true, used: small / 2, calm: 1, looks: 9, pause: lookEvery},
		{name: "half was taken, and calm", wasShort: true, calm: 1 << 40, looks: 1, pause: idleEvery},
	} {
		t.Run(v.name, func(t *testing.T) {
			w, now := newWatch(t), time.Now()
			if w.SetBudget(v.budget); v.budget < 0 {
				w.SetBudget(2 * (w.ownMemory() + 24<<20))
			}
			if v.connected {
				w.opts.Connections = func() int { return 1 }
			}
			w.isShort = v.wasShort
			if v.greedy {
				w.greedy = map[netip.Prefix]greed{netip.MustParsePrefix("192.0.2.1/32"): greed{}.again(1, now)}
			}
			if v.calm > 0 {
				w.last, w.calm = now.Add(-time.Millisecond), calm{now.Add(time.Hour), v.calm, v.calm}
			}
			w.fake(t, v.used, cmp.Or(v.short, small))
			looks := 0
			for range 9 {
				last := w.last
				pause := w.glance(now)
				whole := w.last != last
				if whole {
					if looks++; v.used >= small/2 && !now.Before(w.calm.until) {
						t.Error("though nothing is to be done, it does not rest")
					}
					w.calm = calm{} // how long it is depends on how long the look took
				}
				switch {
				case v.budget < 0: // how soon depends on what this process has
					if pause >= restEvery && !whole {
						t.Errorf("the next glance is in %v", pause)
					}
				case pause < v.pause || pause > v.pause && !whole: // a look may take long, and its rest longer
					t.Errorf("the next glance is in %v, want %v", pause, v.pause)
				}
				now = now.Add(lookEvery)
			}
			if looks != v.looks || w.isShort != v.isShort {
				t.Errorf("%d of 9 looks were whole, want %d; memory is short: %v", looks, v.looks, w.isShort)
			}
		})
	}
}

// TestRestsLess: while TCP is short the watch rests little after a look, and what a look waits for on a busy
// machine does not make the rest longer.
func TestRestsLess(t *testing.T) {
	if rest := restAfter(time.Second, true); rest > 3*time.Second {
		t.Errorf("it rests for %v after a look of a second while TCP is short", rest)
	}
	if rest := restAfter(time.Second, false); rest < 10*time.Second {
		t.Errorf("it rests for %v after a look of a second while TCP is not short", rest)
	}
	if took := threadTime(func() { time.Sleep(200 * time.Millisecond) }); took > 100*time.Millisecond {
		t.Errorf("to wait takes %v of a CPU", took)
	}
}

// TestSavingIsSaid: that less is buffered is logged when it begins and when it ends, and is in the status.
func TestSavingIsSaid(t *testing.T) {
	w, now := newWatch(t), time.Now()
	w.SetBudget(8 << 30)
	says := func(memory, tcp bool) {
		t.Helper()
		if s := w.Status(); s.Saving != memory || s.TCPSaving != tcp || s.Used < 1<<20 || s.Budget != 8<<30 {
			t.Errorf("the status is %+v, want %v, %v", *s, memory, tcp)
		}
	}
	says(false, false)
	for range 2 {
		w.Look(now, Use{Used: 4 << 30, Total: 8 << 30, What: OfBudget})
		says(true, false)
	}
	w.Look(now, Use{Used: 3 << 30, Total: 8 << 30, What: OfBudget})
	says(false, false)
	for _, line := range []string{"half of the memory is taken (", "less than half of the memory"} {
		if n := w.messages.Count("\"" + line); n != 1 {
			t.Errorf("%q is logged %d times", line, n)
		}
	}
	w.Look(now, Use{Used: 4 << 30, Total: 8 << 30, What: OfTCP})
	says(false, true)
	w.Look(now, Use{Used: 3 << 30, Total: 8 << 30, What: OfTCP})
	w.fake(t, 1<<20, 4<<20)
	w.glance(now)
	says(false, true)
	w.fake(t, 1<<19, 4<<20)
	w.glance(now)
	says(false, false)
}
