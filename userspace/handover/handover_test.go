package handover

import (
	"strings"
	"testing"
)

// TestParse: what does not fit together is refused, and what a newer program may say is not.
func TestParse(t *testing.T) {
	for _, c := range []struct {
		text  string
		files int
		wrong string // "": nothing
	}{
		{`{"version":1,"step":"ready"}`, 0, ""},
		{`{"version":9,"step":"flows","what":{"is":["new"]}}`, 0, ""},
		{`{"version":1,"step":"sockets","sockets":[{"kind":"new","more":1},{"kind":"listener","name":"web","address":":443"}]}`, 2, ""},
		{``, 0, "no message"},
		{`GET / HTTP/1.1`, 0, "no message"},
		{`{"version":1,"step":"ready"} {}`, 0, "follows"},
		{`{"step":"ready"}`, 0, "no version"},
		{`{"version":1}`, 0, "no step"},
		{`{"version":1,"step":"sockets"}`, 1, "names 0 sockets, and has 1"},
		{`{"version":1,"step":"sockets","sockets":[{"kind":"control"}]}`, 0, "names 1 sockets, and has 0"},
		{`{"version":1,"step":"sockets","sockets":[{}]}`, 1, "without a kind"},
		{`{"version":1,"step":"newest","pid":-1}`, 0, "can't be"},
		{`{"version":1,"step":"end","within":9000000000000000000}`, 0, "can't be"},
		{`{"version":1,"step":"left","remains":{"flows":-3}}`, 0, "can't be"},
	} {
		m, err := Parse([]byte(c.text), c.files)
		switch {
		case c.wrong == "" && err != nil:
			t.Errorf("%s: %v", c.text, err)
		case c.wrong == "" && m.Step == "":
			t.Errorf("%s: no step", c.text)
		case c.wrong != "" && (err == nil || !strings.Contains(err.Error(), c.wrong)):
			t.Errorf("%s: the error is %v, want %q in it", c.text, err, c.wrong)
		}
	}
}

// FuzzParse: whatever comes, a message that is taken is one that can be acted upon.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"step":"sockets","sockets":[{"kind":"listener","name":"web","address":":443","tailnet":true}],"more":true}`), 1)
	f.Add([]byte(`{"version":1,"step":"left","remains":{"pid":7,"version":"v1","flows":1,"deadline":"2026-01-02T03:04:05Z"},"ended":true}`), 0)
	f.Add([]byte(`{"version":1,"step":"end","within":30000}`), 0)
	f.Add([]byte(`{"version":1,"step":"newest","pid":12}{`), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := Parse(b, files)
		if err != nil {
			return
		}
		if m.Version < 1 || m.Step == "" || len(m.Sockets) != files || m.PID < 0 || m.Within < 0 {
			t.Fatalf("taken: %+v, with %d files", m, files)
		}
		for _, s := range m.Sockets {
			if s.Kind == "" || s.File != nil {
				t.Fatalf("taken: %+v", s)
			}
		}
	})
}
