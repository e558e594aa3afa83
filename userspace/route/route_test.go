package route

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func build(t testing.TB, patterns ...string) *Table[string] {
	t.Helper()
	var b Builder[string]
	for _, p := range patterns {
		if p == "default" {
			b.Default(p)
		} else if err := b.Add(p, p); err != nil {
			t.Fatal(err)
		}
	}
	return b.Build()
}

func TestLookup(t *testing.T) {
	all := []string{"vsq.cz", "status.vsq.cz", "*.vsq.cz", "*.dev.vsq.cz", "*.a.b.c.org", "xn--bcher-kva.example", "Upper.Example.", "default"}
	table := build(t, all...)
	noDefault := build(t, all[:len(all)-1]...)
	for _, c := range []struct{ name, want string }{
		{"vsq.cz", "vsq.cz"},
		{"status.vsq.cz", "status.vsq.cz"},
		{"STATUS.vsq.CZ", "status.vsq.cz"},
		{"status.vsq.cz.", "status.vsq.cz"},
		{"upper.example", "Upper.Example."},
		{"other.vsq.cz", "*.vsq.cz"},
		{"a.b.c.d.vsq.cz", "*.vsq.cz"},
		{"x.status.vsq.cz", "*.vsq.cz"},
		{"x.dev.vsq.cz", "*.dev.vsq.cz"},
		{"x.y.dev.vsq.cz", "*.dev.vsq.cz"},
		{"dev.vsq.cz", "*.vsq.cz"}, // a wildcard does not match its own name
		{"c.org", "default"},
		{"b.c.org", "default"},
		{"a.b.c.org", "default"},
		{"x.a.b.c.org", "*.a.b.c.org"},
		{"notvsq.cz", "default"},
		{"cz", "default"},
		{".vsq.cz", "default"}, // no label for the star
		{"", "default"},
		{".", "default"},
		{"..", "default"},
		{"*.vsq.cz", "*.vsq.cz"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example"},
		{strings.Repeat("a.", 123) + "vsq.cz", "*.vsq.cz"},       // 252 bytes
		{strings.Repeat("a.", 124) + "vsq.cz", "default"},        // 254: no DNS name
		{strings.Repeat("a", 300) + ".vsq.cz", "default"},        //
		{strings.Repeat("a.", 123) + "vsq.cz" + ".", "*.vsq.cz"}, // the dot does not count
	} {
		if got, ok := table.Lookup(c.name, nil); !ok || got != c.want {
			t.Errorf("Lookup(%q) = %q, %v, want %q", c.name, got, ok, c.want)
		}
		got, ok := noDefault.Lookup(c.name, nil)
		if want := c.want != "default"; ok != want || ok && got != c.want || !ok && got != "" {
			t.Errorf("without default: Lookup(%q) = %q, %v, want %q", c.name, got, ok, c.want)
		}
	}
}

func TestAcceptFallsThrough(t *testing.T) {
	type value struct {
		id, alpn string
	}
	var b Builder[value]
	for _, a := range []struct{ pattern, id, alpn string }{
		{"a.b.example.org", "exact-h2", "h2"},
		{"a.b.example.org", "exact-http", "http/1.1"},
		{"*.b.example.org", "long-acme", "acme-tls/1"},
		{"*.example.org", "short-first", "imap"},
		{"*.example.org", "short-second", "imap"},
	} {
		if err := b.Add(a.pattern, value{a.id, a.alpn}); err != nil {
			t.Fatal(err)
		}
	}
	b.Default(value{"default-xmpp", "xmpp"})
	b.Default(value{"default-any", ""})
	table := b.Build()
	for _, c := range []struct{ alpn, want string }{
		{"h2", "exact-h2"},
		{"http/1.1", "exact-http"},
		{"acme-tls/1", "long-acme"},
		{"imap", "short-first"},
		{"xmpp", "default-xmpp"},
		{"smtp", "default-any"},
	} {
		accept := func(v value) bool { return v.alpn == "" || v.alpn == c.alpn }
		if got, ok := table.Lookup("a.b.example.org", accept); !ok || got.id != c.want {
			t.Errorf("alpn %s: got %q, %v, want %q", c.alpn, got.id, ok, c.want)
		}
	}
	var order []string
	if got, ok := table.Lookup("A.b.example.org.", func(v value) bool { order = append(order, v.id); return false }); ok || got != (value{}) {
		t.Errorf("nothing accepted: got %v, %v", got, ok)
	}
	if got, want := strings.Join(order, " "), "exact-h2 exact-http long-acme short-first short-second default-xmpp default-any"; got != want {
		t.Errorf("order of trial:\n got %s\nwant %s", got, want)
	}
}

func TestAddRefuses(t *testing.T) {
	for _, p := range []string{
		"", ".", "*", "*.", "**.example.org", "a*.example.org", "a.*.example.org", "*a.org", "*.*.org", "a..b", ".a", "a b.org", "a\n",
		"bücher.example", strings.Repeat("a", 254), "*." + strings.Repeat("a", 252),
	} {
		var b Builder[int]
		if err := b.Add(p, 1); err == nil {
			t.Errorf("Add(%q) has no error", p)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", p)) {
			t.Errorf("Add(%q) does not name the pattern: %v", p, err)
		}
		if n := b.Build().Len(); n != 0 {
			t.Errorf("Add(%q) failed and left %d values", p, n)
		}
	}
}

func TestTableIsImmutable(t *testing.T) {
	var b Builder[int]
	if err := b.Add("a.org", 1); err != nil {
		t.Fatal(err)
	}
	table := b.Build()
	if err := b.Add("a.org", 2); err != nil {
		t.Fatal(err)
	}
	b.Default(3)
	if v, ok := table.Lookup("b.org", nil); ok {
		t.Errorf("a default that came after Build is in the table: %d", v)
	}
	if table.Len() != 1 || b.Build().Len() != 3 {
		t.Errorf("Len is %d and %d, want 1 and 3", table.Len(), b.Build().Len())
	}
}

func TestEmptyTables(t *testing.T) {
	var none *Table[int]
	var zero Table[int]
	for _, table := range []*Table[int]{none, &zero, new(Builder[int]).Build()} {
		if v, ok := table.Lookup("a.org", nil); ok || v != 0 || table.Len() != 0 {
			t.Errorf("an empty table has %d", v)
		}
	}
}

// TestAgainstSearch compares the table with a plain search through all patterns.
func TestAgainstSearch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	name := func() string {
		labels := make([]string, 1+rnd.IntN(4))
		for i := range labels {
			labels[i] = string(rune('a' + rnd.IntN(3)))
		}
		return strings.Join(labels, ".")
	}
	for range 300 {
		var b Builder[int]
		patterns := make([]string, rnd.IntN(20))
		for i := range patterns {
			if patterns[i] = name(); rnd.IntN(2) == 0 {
				patterns[i] = "*." + patterns[i]
			}
			if err := b.Add(patterns[i], i); err != nil {
				t.Fatal(err)
			}
		}
		b.Default(-1)
		table := b.Build()
		for range 50 {
			n, odd := name(), rnd.IntN(2)
			accept := func(i int) bool { return i < 0 || i%2 == odd }
			want, best := -1, -1
			for i, p := range patterns {
				length := -1
				if suffix, wild := strings.CutPrefix(p, "*"); wild && strings.HasSuffix(n, suffix) && len(n) > len(suffix) {
					length = len(suffix)
				} else if p == n {
					length = 1000
				}
				if length > best && accept(i) {
					want, best = i, length
				}
			}
			if got, ok := table.Lookup(n, accept); !ok || got != want {
				t.Fatalf("patterns %q: Lookup(%q) = %d, want %d", patterns, n, got, want)
			}
		}
	}
}

func manyNames(tb testing.TB, n int) *Table[int] {
	tb.Helper()
	var b Builder[int]
	for i := range n {
		if err := b.Add(fmt.Sprintf("n%d.example.org", i), i); err != nil {
			tb.Fatal(err)
		}
		if err := b.Add(fmt.Sprintf("*.n%d.example.net", i), i); err != nil {
			tb.Fatal(err)
		}
	}
	b.Default(-1)
	return b.Build()
}

func TestLookupDoesNotAllocate(t *testing.T) {
	table := manyNames(t, 1000)
	for _, name := range []string{"n7.example.org", "N7.Example.Org.", "a.b.n7.example.net", "nobody.example.com", ""} {
		want := -1
		if strings.Contains(strings.ToLower(name), "n7") {
			want = 7
		}
		n := testing.AllocsPerRun(100, func() {
			if v, ok := table.Lookup(name, func(i int) bool { return i == want }); !ok || v != want {
				t.Fatalf("Lookup(%q) = %d, %v", name, v, ok)
			}
		})
		if n != 0 {
			t.Errorf("Lookup(%q) allocates %v times", name, n)
		}
	}
}

// BenchmarkLookup shows that the number of names does not matter: hot looks the same ten names up in tables
// of every size, spread looks 4,096 names up that lie all over the table, as far as it has so many, so that it
// has the processor's cache misses too.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		table := manyNames(b, n)
		for _, c := range []struct{ kind, format string }{
			{"exact", "n%d.example.org"},
			{"wildcard", "a.b.n%d.example.net"},
			{"default", "n%d.example.com"},
		} {
			for _, spread := range []bool{false, true} {
				kind, names := c.kind+"/hot", make([]string, 10)
				if spread {
					kind, names = c.kind+"/spread", make([]string, min(n, 4096))
				}
				for i := range names {
					id := i
					if spread {
						id = i * 7919 % n // a prime, so that neighbours in names are none in the table
					}
					names[i] = fmt.Sprintf(c.format, id)
				}
				b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
					b.ReportAllocs()
					i := 0
					for b.Loop() {
						if _, ok := table.Lookup(names[i], nil); !ok {
							b.Fatal("not found")
						}
						if i++; i == len(names) {
							i = 0
						}
					}
				})
			}
		}
	}
}

func FuzzLookup(f *testing.F) {
	f.Add("*.a.org", "b.a.org")
	f.Add("a.org", "A.org.")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		var b Builder[int]
		if b.Add(pattern, 1) != nil {
			return
		}
		b.Default(0)
		fold := func(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }
		p, n := fold(pattern), fold(name)
		want := 0
		if suffix, wild := strings.CutPrefix(p, "*"); wild {
			if len(n) <= maxName && strings.HasSuffix(n, suffix) && len(n) > len(suffix) && n[:len(n)-len(suffix)] != "" {
				want = 1
			}
		} else if p == n {
			want = 1
		}
		for i := range len(name) {
			if name[i] >= 0x80 {
				return // no DNS name; strings.ToLower folds more than ASCII
			}
		}
		if got, ok := b.Build().Lookup(name, nil); !ok || got != want {
			t.Fatalf("pattern %q: Lookup(%q) = %d, %v, want %d", pattern, name, got, ok, want)
		}
	})
}
