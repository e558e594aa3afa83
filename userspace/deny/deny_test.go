package deny

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

func parse(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, errors.New("no prefix")
	}
	return p, nil
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestRead(t *testing.T) {
	table, err := read("deny.txt", strings.NewReader("\ufeff# bad neighbours\r\n\n198.51.100.0/24 ; SBL1\r\n"+
		"  192.0.2.7# one\n\t2001:db8::/32\n192.0.2.7\n0.0.0.0/32"), parse)
	if err != nil {
		t.Fatal(err)
	}
	if n := table.Len(); n != 4 {
		t.Errorf("%d prefixes, want 4", n)
	}
	for a, want := range map[string]bool{"198.51.100.0": true, "198.51.100.255": true, "198.51.101.0": false,
		"192.0.2.7": true, "192.0.2.8": false, "::ffff:192.0.2.7": true, "2001:db8::1": true,
		"2001:db8::1%eth0": true, "2001:db9::": false,
		"0.0.0.0": true, "::": false} {
		if got := table.Contains(addr(a)); got != want {
			t.Errorf("Contains(%s) = %v", a, got)
		}
	}
	for _, none := range []*Table{nil, NewTable()} {
		if none.Contains(addr("192.0.2.1")) || none.Contains(netip.Addr{}) || none.Len() != 0 {
			t.Error("an empty table has something in it")
		}
	}
}

func TestReadWrong(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1\n  # x\n  é 192.0.2.0/33 # y": `deny.txt:3:3: "é 192.0.2.0/33": no prefix`,
		"a\nb; c\n":                               "deny.txt:1:1: \"a\": no prefix\ndeny.txt:2:1: \"b\": no prefix",
		strings.Repeat("x\n", 12):                 "deny.txt: 2 more lines are wrong",
		"192.0.2.1\n" + strings.Repeat("1", 5000): "deny.txt:2:1: the line is longer than 4 KiB",
		strings.Repeat("x", 200):                  `"` + strings.Repeat("x", 80) + `..."`,
	} {
		table, err := read("deny.txt", strings.NewReader(text), parse)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: got %v, want %s", text, err, want)
		}
		if table != nil {
			t.Errorf("%.20q: a table comes with the error", text)
		}
	}
}

// lines are n prefixes of all kinds that lists of abuse have, in no order.
func lines(n int) string {
	r := rand.New(rand.NewPCG(1, 2))
	var b strings.Builder
	for i := range n {
		u := r.Uint64()
		v4 := [4]byte{byte(u >> 24), byte(u >> 16), byte(u >> 8), byte(u)}
		var p netip.Prefix
		switch i % 4 {
		case 0, 1:
			p = netip.PrefixFrom(netip.AddrFrom4(v4), 32)
		case 2:
			p, _ = netip.AddrFrom4(v4).Prefix(24)
		default:
			p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, byte(u >> 32), byte(u >> 40),
				v4[0], v4[1], v4[2], v4[3]}), 64)
		}
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

// TestManyPrefixes bounds the work of 200,000 prefixes by that of 20,000, and their memory.
func TestManyPrefixes(t *testing.T) {
	allocated := func(n int) (total, kept uint64) {
		text := lines(n)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		began := time.Now()
		table, err := read("deny.txt", strings.NewReader(text), parse)
		took := time.Since(began)
		if err != nil {
			t.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		total, kept = after.TotalAlloc-before.TotalAlloc, after.HeapAlloc-before.HeapAlloc
		t.Logf("%d prefixes: %v, %.1f MB allocated, %.1f MB kept", table.Len(), took,
			float64(total)/1e6, float64(kept)/1e6)
		runtime.KeepAlive(text)
		return total, kept
	}
	few, _ := allocated(20_000)
	many, kept := allocated(200_000)
	if many > 12*few {
		t.Errorf("ten times as many prefixes allocate %.1f times as much", float64(many)/float64(few))
	}
	if kept > 20<<20 {
		t.Errorf("they keep %d bytes", kept)
	}
}

func BenchmarkRead(b *testing.B) {
	text := lines(200_000)
	for b.Loop() {
		if _, err := read("deny.txt", strings.NewReader(text), parse); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkContains(b *testing.B) {
	table, err := read("deny.txt", strings.NewReader(lines(200_000)), parse)
	if err != nil {
		b.Fatal(err)
	}
	a := addr("203.0.113.77")
	for b.Loop() {
		table.Contains(a)
	}
}

// TestFile follows a file by looks of its own, so that nothing depends on the clock.
func TestFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "deny.txt")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	var log logs.Log
	if _, err := Open(name, parse, log.Logger(), nil); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a file that is not there: %v", err)
	}
	write("192.0.2.1\nx\n")
	if _, err := Open(name, parse, log.Logger(), nil); err == nil || !strings.Contains(err.Error(), name+":2:1: ") {
		t.Fatalf("a bad line: %v", err)
	}
	write("192.0.2.1\n")
	f, err := Open(name, parse, log.Logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // we look ourselves
	f.Close()
	has := func(a string, want bool) {
		t.Helper()
		if got := f.Contains(addr(a)); got != want {
			t.Errorf("Contains(%s) = %v", a, got)
		}
	}
	logged := func(want string, times int) {
		t.Helper()
		if n := strings.Count(log.String(), want); n != times {
			t.Errorf("the log has %q %d times, want %d:\n%s", want, n, times, &log)
		}
	}
	f.look()
	f.look()
	logged("read again", 0)

	write("192.0.2.2\n")
	f.look()
	has("192.0.2.1", true) // it may not be whole yet
	f.look()
	has("192.0.2.1", false)
	has("192.0.2.2", true)
	logged("read again", 1)

	write("192.0.2.3\n300.0.0.1\n")
	for range 4 {
		f.look()
	}
	has("192.0.2.2", true)
	has("192.0.2.3", false)
	logged(":2:1: ", 1)
	logged("the previous ones stay in force", 1)

	os.Remove(name)
	for range 3 {
		f.look()
	}
	has("192.0.2.2", true)
	logged("can't be read: the previous ones stay in force", 1)

	write("# none\n")
	f.look()
	f.look()
	has("192.0.2.2", false)
	logged("read again", 2)
}

// TestEmptied: a file that has lost its prefixes lets in nobody whom it kept out, nor does a reload with it,
// until it says that nobody is meant.
func TestEmptied(t *testing.T) {
	for name, empty := range map[string]string{"truncated": "", "blank": "\n \n",
		"a header alone": "; list of 2026\n", "a comment like it": "# none of these\n"} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "deny.txt")
			write := func(text string) { // in place, as > does
				t.Helper()
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var log logs.Log
			open := func(before *Table) *File {
				t.Helper()
				f, err := Open(file, parse, log.Logger(), before)
				if err != nil {
					t.Fatal(err)
				}
				f.Close() // we look ourselves
				return f
			}
			check := func(f *File, denied bool, problem string) {
				t.Helper()
				if got := f.Contains(addr("192.0.2.1")); got != denied {
					t.Errorf("it is denied: %v, want %v", got, denied)
				}
				err := f.Problem()
				if (err == nil) != (problem == "") || err != nil && !strings.Contains(err.Error(), problem) {
					t.Errorf("the problem: %v, want %q", err, problem)
				}
			}
			write("192.0.2.1\n")
			f := open(nil)
			check(f, true, "")
			write(empty)
			for range 3 {
				f.look()
			}
			check(f, true, `write "# none" into it`)
			if n := strings.Count(log.String(), "is empty: the previous ones"); n != 1 {
				t.Errorf("the log says so %d times:\n%s", n, &log)
			}
			again := open(f.Table()) // a reload
			check(again, true, "the previous 1 stay in force")
			check(open(nil), false, `has no prefix`) // a start, that knows of none before

			os.Remove(file)
			again.look()
			check(again, true, "no such file")
			write(empty)
			again.look()
			again.look()
			check(again, true, "stay in force")

			write(empty + "\n # none \n")
			again.look()
			again.look()
			check(again, false, "")
			write("x\n")
			again.look()
			again.look()
			check(again, false, "no prefix")
			write("192.0.2.1\n# none\n")
			again.look()
			again.look()
			check(again, true, "")
		})
	}
}

// TestFollow sees a change come by itself.
func TestFollow(t *testing.T) {
	name := filepath.Join(t.TempDir(), "deny.txt")
	if err := os.WriteFile(name, []byte("192.0.2.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Open(name, parse, new(logs.Log).Logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.WriteFile(name, []byte("192.0.2.1\n192.0.2.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for ; !f.Contains(addr("192.0.2.2")); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the change was not seen within a minute")
		}
	}
}
