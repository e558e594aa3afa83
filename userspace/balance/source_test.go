package balance

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// clients are some thousand addresses that stand beside each other.
func clients() (all []netip.Addr) {
	a := netip.MustParseAddr("192.0.0.0")
	for range 4000 {
		a = a.Next()
		all = append(all, a)
	}
	return all
}

// chosen is which of some targets each client has.
func chosen(all []netip.Addr, options ...Option) []int {
	got := make([]int, len(all))
	for c, client := range all {
		got[c] = Pick(len(options), func(i int) Option {
			o := options[i]
			o.Key = Key(client, fmt.Sprintf("10.0.0.%d:443", i))
			return o
		})
	}
	return got
}

// TestBySource: clients are shared by weight, each has the same target each time, and only those of a target
// that is gone or back have another one then.
func TestBySource(t *testing.T) {
	all := clients()
	options := []Option{{Weight: 1, Health: new(Health), Checked: new(Checked)}, {Weight: 2, Health: new(Health)}, {Weight: 1, Health: new(Health)},
		{Weight: 1, Backup: true, Health: new(Health)}}
	first := chosen(all, options...)
	counts := make([]int, 4)
	for _, i := range first {
		counts[i]++
	}
	for i, want := range []int{1000, 2000, 1000, 0} {
		if counts[i] < want-150 || counts[i] > want+150 { // it is a hash, and comes out the same each time
			t.Errorf("target %d has %d clients, want %d", i, counts[i], want)
		}
	}
	again := chosen(all, options...)
	options[0].SetDown()
	without := chosen(all, options...)
	for c := range all {
		if again[c] != first[c] {
			t.Fatalf("client %s has %d and then %d", all[c], first[c], again[c])
		}
		if without[c] == 0 || first[c] != 0 && without[c] != first[c] {
			t.Fatalf("without target 0 client %s, which had %d, has %d", all[c], first[c], without[c])
		}
	}
	synctest.Test(t, func(t *testing.T) {
		// In slow start its clients come back, more in each step, and stay.
		options[0].SetUp(time.Now(), 10*time.Second)
		before, back := without, 0
		for step := 1; step <= fullShare; step++ {
			now, n := chosen(all, options...), 0
			for c := range all {
				if now[c] == 0 {
					n++
				} else if now[c] != before[c] {
					t.Fatalf("in step %d client %s goes from %d to %d", step, all[c], before[c], now[c])
				}
			}
			if n <= back {
				t.Errorf("in step %d it has %d clients, and had %d", step, n, back)
			}
			before, back = now, n
			time.Sleep(time.Second)
		}
		if back != counts[0] {
			t.Errorf("at the end it has %d clients, and had %d at first", back, counts[0])
		}
	})
}

// TestKey: a client is an IPv4 address or a /64, and the key is the same in each daemon of each version.
func TestKey(t *testing.T) {
	key := func(client string) uint64 { return Key(netip.MustParseAddr(client), "tailnet://home:443") }
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"2001:db8::1", "2001:db8::ffff:0:0:2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
	} {
		if same := key(c.a) == key(c.b); same != c.same {
			t.Errorf("%s and %s have the same key: %v", c.a, c.b, same)
		}
	}
	if got, want := key("192.0.2.1"), uint64(0x354d50e8ea079e61); got != want {
		t.Errorf("the key of 192.0.2.1 is %#x, want %#x: edges of different versions would choose different targets", got, want)
	}
	if Key(netip.Addr{}, "a:1") != 0 {
		t.Error("a client whose address is not known has a key")
	}
}
