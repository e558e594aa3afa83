package oracle

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	executions = flag.Int("executions", 12_000, "how many messages TestGuards sends")
	seed       = flag.Uint64("seed", 0,
		"the first of the numbers that its messages are made of; 0 for a random one")
	seeds = flag.Bool("seeds", true,
		"whether the grammar has seeds.txt too, where doors are that were open")
)

// TestGuards sends random messages, right and wrong ones. None may get what is guarded out of a target, by
// whatever it is read as there.
func TestGuards(t *testing.T) {
	first := *seed
	if first == 0 {
		first = rand.Uint64()
	}
	w, g := newWorld(t, false), grammar(t)
	if !*seeds {
		g.Seeds = nil
	}
	t.Logf("-executions %d -seed %d -seeds=%v", *executions, first, *seeds)
	w.try(t, g, *executions, first)
}

// TestSeeds sends each seed by each listener, with a guard by turns.
func TestSeeds(t *testing.T) {
	w, g := newWorld(t, false), grammar(t)
	u := &user{world: w, conns: map[door]*Conn{}}
	defer u.close()
	for i, l := range w.listeners {
		for _, http2 := range []bool{false, true} {
			kind := kinds[(i+i/len(kinds))%len(kinds)]
			d := door{listener: l, http2: http2, sni: "open.test"}
			for _, m := range slices.Concat(g.Seeds.Messages(kind+".test", kind, g.Plain),
				g.Seeds.Messages("open.test", kind, g.Plain)) {
				wrong, a, err := u.send(d, m)
				if err != nil {
					w.again(t)
					continue
				}
				if wrong != "" {
					t.Errorf("a stranger gets what is guarded by %s: %s: %s: %d %q", wrong, d, describe(d,
						m), a.Status, a.Body)
				}
			}
		}
	}
	if said := w.panics(); said != "" {
		t.Errorf("the daemon's log: %.2000s", said)
	}
	if u.taken < u.sent/20 {
		t.Errorf("of %d messages %d reached a target", u.sent, u.taken)
	}
	t.Logf("%d messages, of which targets answered %d", u.sent, u.taken)
}

// FuzzGuards is TestGuards with the choices of a fuzzer, which watches a daemon in its own process.
func FuzzGuards(f *testing.F) {
	for i := range uint64(32) {
		b := make([]byte, 64)
		rand.NewChaCha8([32]byte{byte(i)}).Read(b)
		f.Add(b)
	}
	w, g := newWorld(f, true), grammar(f)
	u := &user{world: w, conns: map[door]*Conn{}}
	f.Cleanup(u.close)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := FromBytes(b)
		d, m := w.anyDoor(c, g), g.Message(c)
		if wrong, a, err := u.send(d, m); err == nil && wrong != "" {
			t.Errorf("a stranger gets what is guarded by %s: %s: %s: %d %q", wrong, d, describe(d, m),
				a.Status, a.Body)
		}
		if said := w.panics(); said != "" {
			t.Errorf("the daemon's log, after %s: %s: %.2000s", d, describe(d, m), said)
		}
	})
}

// try sends the messages of n numbers.
func (w *world) try(t *testing.T, g *Grammar, n int, first uint64) {
	began := time.Now()
	var next atomic.Uint64
	var mu sync.Mutex
	sent, taken, found := 0, 0, map[string]int{}
	statuses := map[int]int{}
	var wg sync.WaitGroup
	for range 4 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			u := &user{world: w, conns: map[door]*Conn{}}
			defer u.close()
			mine := map[int]int{}
			for {
				i := next.Add(1) - 1
				if i >= uint64(n) {
					break
				}
				seed := first + i
				c := Random(seed)
				d := w.anyDoor(c, g)
				m := g.Message(c)
				wrong, a, err := u.send(d, m)
				if err != nil {
					w.again(t)
					continue
				}
				mine[a.Status]++
				if said := w.panics(); said != "" {
					t.Errorf("the daemon's log, after %s: %s: %.2000s", d, describe(d, m), said)
				}
				if wrong == "" {
					continue
				}
				mu.Lock()
				sort := wrong + " from " + d.name + shape(m)
				found[sort]++
				again := found[sort] > 1
				mu.Unlock()
				if !again {
					least := w.shrink(d, m, wrong)
					t.Errorf("after %.0f s a stranger gets what is guarded by %s: %s: %s\nseed %d, the answer: %d %q", time.Since(began).Seconds(), sort, d, describe(d, least), seed, a.Status, a.Body)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			sent, taken = sent+u.sent, taken+u.taken
			for s, n := range mine {
				statuses[s] += n
			}
		})
	}
	wg.Wait()
	t.Logf("%d messages in %.1f s, of which targets answered %d; statuses %v", sent,
		time.Since(began).Seconds(), taken, statuses)
	if sent < n*9/10 || taken < n/20 {
		t.Errorf("of %d messages %d were sent, and %d reached a target", n, sent, taken)
	}
	if said := w.panics(); said != "" {
		t.Errorf("the daemon's log: %.2000s", said)
	}
	for sort, n := range found {
		t.Logf("%d times %s", n, sort)
	}
}

// shape is what is odd about a message at the first sight, so that what was found once is told once.
func shape(m *Message) (s string) {
	scheme, _, _ := strings.Cut(m.Target, "/")
	for what, is := range map[string]bool{
		"scheme": strings.Contains(scheme, ":"), "dots": strings.Contains(m.Target, ".."),
		"escapes": strings.Contains(m.Target, "%"), "parameters": strings.Contains(m.Target, ";"),
		"backslash": strings.Contains(m.Target, `\`), "hosts": len(m.Hosts) != 1,
		"port": len(m.Hosts) > 0 && strings.Contains(m.Hosts[0], ":"), "fields": len(m.Fields) > 0,
		"bytes": len(m.Edits) > 0, "body": m.Body != nil, "after": m.After != nil,
	} {
		if is {
			s = " " + what + s
		}
	}
	words := strings.Fields(s)
	slices.Sort(words)
	return ", " + strings.Join(words, " ")
}

func describe(d door, m *Message) string {
	if !d.http2 {
		return fmt.Sprintf("%q, then %q", m.HTTP1(), m.After)
	}
	return fmt.Sprintf("%+v", *m)
}

// shrink makes a message that is as wrong with as little as possible.
func (w *world) shrink(d door, m *Message, wrong string) *Message {
	asWrong := func(m *Message) bool {
		for range 2 {
			c, err := d.dial()
			if err != nil {
				return false
			}
			got, _ := w.send(c, d, m)
			c.Close()
			if got == wrong {
				return true
			}
		}
		return false
	}
	for changed := true; changed; {
		changed = false
		for _, less := range m.less() {
			if asWrong(less) {
				m, changed = less, true
				break
			}
		}
	}
	return m
}

// less are messages with one thing less.
func (m *Message) less() (all []*Message) {
	with := func(change func(*Message)) {
		c := *m
		change(&c)
		all = append(all, &c)
	}
	for i := range m.Hosts[min(1, len(m.Hosts)):] {
		with(func(c *Message) { c.Hosts = slices.Delete(slices.Clone(m.Hosts), i+1, i+2) })
	}
	for i := range m.Fields {
		with(func(c *Message) { c.Fields = slices.Delete(slices.Clone(m.Fields), i, i+1) })
	}
	for i := range m.Pseudo {
		with(func(c *Message) { c.Pseudo = slices.Delete(slices.Clone(m.Pseudo), i, i+1) })
	}
	for i := range m.Edits {
		with(func(c *Message) { c.Edits = slices.Delete(slices.Clone(m.Edits), i, i+1) })
	}
	for _, change := range []struct {
		there  bool
		remove func(*Message)
	}{
		{m.Body != nil, func(c *Message) { c.Body = nil }}, {m.Trailer != nil,
			func(c *Message) { c.Trailer = nil }},
		{m.After != nil, func(c *Message) { c.After = nil }}, {m.Version != "",
			func(c *Message) { c.Version = "" }},
		{m.Scheme != "", func(c *Message) { c.Scheme = "" }}, {m.Late, func(c *Message) { c.Late = false }},
		{m.AsItIs, func(c *Message) { c.AsItIs = false }}, {m.Split != nil,
			func(c *Message) { c.Split = nil }},
		{m.Padding > 0, func(c *Message) { c.Padding = 0 }}, {m.Priority,
			func(c *Message) { c.Priority = false }},
		{m.Method != "GET", func(c *Message) { c.Method = "GET" }}, {m.Chunked,
			func(c *Message) { c.Chunked = false }},
	} {
		if change.there {
			with(change.remove)
		}
	}
	if i := strings.IndexByte(m.Target, '?'); i >= 0 {
		with(func(c *Message) { c.Target = m.Target[:i] })
	}
	for i := range m.Target {
		with(func(c *Message) { c.Target = m.Target[:i] + m.Target[i+1:] })
	}
	for h := range m.Hosts {
		for i := range m.Hosts[h] {
			with(func(c *Message) {
				c.Hosts = slices.Clone(m.Hosts)
				c.Hosts[h] = m.Hosts[h][:i] + m.Hosts[h][i+1:]
			})
		}
	}
	return all
}
