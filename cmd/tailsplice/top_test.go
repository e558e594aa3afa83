package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tailsplice/tailsplice/userspace/flow"
)

// someSample is one of n flows, the first of which move.
func someSample(n int) flow.Sample {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l := flow.Sample{Time: now, Live: n, Matching: n, UpRate: 5 << 20, DownRate: 7 << 30}
	for i := range n {
		f := flow.Rate{Snapshot: flow.Snapshot{ID: fmt.Sprintf("%032x", i), Name: strings.Repeat("long.", i%12) + "example.org", Listener: "web",
			Route: "*.example.org", Client: fmt.Sprintf("[2001:db8:1234:5678:9abc:def0:1234:%x]:54321", i), Target: "tailnet://home:443",
			Datapath: "userspace", Started: now.Add(-time.Duration(i*i) * time.Minute), BytesUp: int64(i) << 20, BytesDown: int64(i) << 33}}
		if i < 5 {
			f.UpRate, f.DownRate, f.Datapath = 999*1024, 1023*1024*1024, "sockmap"
		}
		l.Flows = append(l.Flows, f)
	}
	return l
}

// strip takes the colours off.
func strip(s string) string {
	for _, colour := range []string{plain, reversed, faint, green} {
		s = strings.ReplaceAll(s, colour, "")
	}
	return s
}

// TestScreen: a screen is filled, and no line is longer than it.
func TestScreen(t *testing.T) {
	sample := someSample(100)
	for _, c := range []struct {
		width, height int
		heads         string
		lacks         string
	}{
		{80, 24, "UP/S   DOWN/S    AGE DATAPATH", "TARGET"},
		{200, 50, "ID", "nothing"},
		{120, 30, "TARGET", "ROUTE"},
		{30, 5, "NAME", "CLIENT"},
		{1, 1, "", "NAME"},
	} {
		for _, colour := range []bool{false, true} {
			s := screen{query: flow.Query{Sort: "rate"}, sample: &sample, colour: colour}
			lines := s.draw(c.width, c.height)
			if len(lines) != c.height {
				t.Errorf("%dx%d: %d lines", c.width, c.height, len(lines))
			}
			text := strings.Join(lines, "\n")
			if colour != strings.Contains(text, "\x1b") && c.height > 1 {
				t.Errorf("%dx%d: colours where none were asked for, or none", c.width, c.height)
			}
			for _, line := range strings.Split(strip(text), "\n") {
				if n := utf8.RuneCountInString(line); n > max(c.width, 37) {
					t.Errorf("%dx%d: a line of %d: %q", c.width, c.height, n, line)
				}
			}
			if !strings.Contains(strip(text), c.heads) || strings.Contains(strip(text), c.lacks) {
				t.Errorf("%dx%d: want %q, and no %q:\n%s", c.width, c.height, c.heads, c.lacks, strip(text))
			}
		}
	}
	wide := screen{query: flow.Query{Sort: "rate"}, sample: &sample}
	if text := strings.Join(wide.draw(200, 50), "\n"); !strings.Contains(text, sample.Flows[46].ID) || strings.Contains(text, sample.Flows[47].ID) {
		t.Errorf("47 flows fit into 50 lines, with their ids:\n%s", text)
	}
}

func TestKeys(t *testing.T) {
	s := screen{query: flow.Query{Sort: "rate"}}
	press := func(keys string) (last int) {
		for _, b := range []byte(keys) {
			last = s.key(b)
		}
		return last
	}
	if press("s") != keyAsk || s.query.Sort != "bytes" || press("sssss") != keyAsk || s.query.Sort != "rate" {
		t.Errorf("s sorts by %s", s.query.Sort)
	}
	if press("r") != keyAsk || !s.query.Reverse {
		t.Error("r does not reverse")
	}
	if press("/exq\x7f") != keyRedraw || s.query.Text != "" || !strings.Contains(s.draw(80, 24)[23], "/ex_") {
		t.Errorf("what is typed is not seen, or already used: %q", s.draw(80, 24)[23])
	}
	if press("\r") != keyAsk || s.query.Text != "ex" {
		t.Errorf("the filter is %q", s.query.Text)
	}
	if press("/y\x1b") != keyRedraw || s.query.Text != "ex" || press("\x1b") != keyAsk || s.query.Text != "" {
		t.Errorf("Esc leaves the filter %q", s.query.Text)
	}
	if press("q") != keyQuit || press("/\x03") != keyQuit {
		t.Error("q or ^C does not quit")
	}
}

// TestBytesHaveRoom: what a number needs is what its column has.
func TestBytesHaveRoom(t *testing.T) {
	for n := int64(1); n > 0; n = n*3 - 1 {
		if got := bytes(n); len(got) > 8 && n < 1000<<40 {
			t.Errorf("%q is longer than its column", got)
		}
		if got := shortAge(time.Duration(n)); len(got) > 6 && n < int64(99*24*time.Hour) {
			t.Errorf("%q is longer than its column", got)
		}
	}
}
