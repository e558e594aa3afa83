package handover

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"reflect"
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
		{flowMessage(`{"version":1,"number":7}`), 2, ""},
		{flowMessage(`{"version":9,"number":7,"what":{"is":"new"}}`), 2, ""},
		{flowMessage(`{"version":1,"number":7,"down":{"rest":"` + base64.StdEncoding.EncodeToString(make([]byte, mostRest)) + `"}}`), 2, ""},
		{flowMessage(``), 2, "no flow"},
		{flowMessage(`null`), 2, "null"},
		{flowMessage(`{"version":1,"number":8}`), 2, "lacks a socket"},
		{flowMessage(`{"version":1,"number":7},{"version":1,"number":7}`), 2, "twice"},
		{flowMessage(`{"number":7}`), 2, "no version"},
		{flowMessage(`{"version":1,"number":7,"bytes_up":-1}`), 2, "can't be"},
		{flowMessage(`{"version":1,"number":7,"idle_timeout":9000000000000000000}`), 2, "can't be"},
		{flowMessage(`{"version":1,"number":7,"up":{"rest":"` + base64.StdEncoding.EncodeToString(make([]byte, mostRest+1)) + `"}}`), 2, "more than"},
		{`{"version":1,"step":"flow","sockets":[{"kind":"downstream","flow":7},{"kind":"upstream","flow":7},{"kind":"upstream","flow":7}],"flows":[{"version":1,"number":7}]}`, 3, "two of upstream"},
		{`{"version":1,"step":"flow","sockets":[{"kind":"downstream","flow":7},{"kind":"upstream","flow":7},{"kind":"upstream_rest","flow":7}],"flows":[{"version":1,"number":7,"up":{"rest":"AAAA"}}]}`, 3, "has them twice"},
		{`{"version":1,"step":"ready","flows":[{"version":1,"number":7}]}`, 0, "has flows"},
		{`{"version":1,"step":"taken","numbers":[0]}`, 0, "number 0"},
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

// flowMessage is a message of flows that has the sockets of number 7.
func flowMessage(flows string) string {
	return `{"version":1,"step":"flow","sockets":[{"kind":"downstream","flow":7},{"kind":"upstream","flow":7}],"flows":[` + flows + `]}`
}

// TestRecordIsKept: what a program does not know of a record goes on to the next one, and what it knows comes as
// it was.
func TestRecordIsKept(t *testing.T) {
	const text = `{"version":3,"number":7,"id":"a","listener":"web","route":"default","client":"192.0.2.1:5","downstream":"","upstream":"",` +
		`"target":"t","started":"2026-01-02T03:04:05Z","bytes_up":1,"bytes_down":2,"idle_since":"2026-01-02T03:04:05Z",` +
		`"datapath":"auto","buffer":3,"down":{"rest":"AAE=","ended":true,"later":{"n":1.0}},"UP":{"shut":true,"marks":[1]},"new":{"with":["parts",1.50]},"old":null}`
	var f Flow
	if err := json.Unmarshal([]byte(text), &f); err != nil {
		t.Fatal(err)
	}
	if f.ID != "a" || f.BytesDown != 2 || !bytes.Equal(f.Down.Rest, []byte{0, 1}) || !f.Down.IsEnded || !f.Up.IsShut || len(f.Unknown()) != 4 {
		t.Errorf("it is read as %+v", f)
	}
	again := Flow{Number: 8, Version: FlowVersion, Down: Side{IsEnded: true}}
	again.SetUnknown(f.Unknown())
	for _, c := range []struct {
		f    *Flow
		want []string
	}{
		{&f, []string{`"new":{"with":["parts",1.50]}`, `"old":null`, `"down":{"rest":"AAE=","ended":true,"later":{"n":1.0}}`, `"up":{"shut":true,"marks":[1]}`}},
		{&again, []string{`"new":{"with":["parts",1.50]}`, `"number":8`, `"down":{"ended":true,"later":{"n":1.0}}`, `"up":{"marks":[1]}`}},
	} {
		b, err := json.Marshal(c.f)
		if err != nil || !json.Valid(b) {
			t.Fatalf("%s: %v", b, err)
		}
		for _, want := range c.want {
			if !bytes.Contains(b, []byte(want)) {
				t.Errorf("%s: %s is missing", b, want)
			}
		}
		// A newer program reads it as it was.
		var next Flow
		if err := json.Unmarshal(b, &next); err != nil || !reflect.DeepEqual(next.Unknown(), f.Unknown()) ||
			!reflect.DeepEqual(next.Down, c.f.Down) || !reflect.DeepEqual(next.Up, c.f.Up) {
			t.Errorf("%s is read as %+v: %v", b, next, err)
		}
	}
}

// FuzzParse: whatever comes, a message that is taken is one that can be acted upon.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"step":"sockets","sockets":[{"kind":"listener","name":"web","address":":443","tailnet":true}],"more":true}`), 1)
	f.Add([]byte(`{"version":1,"step":"left","remains":{"pid":7,"version":"v1","flows":1,"deadline":"2026-01-02T03:04:05Z"},"ended":true}`), 0)
	f.Add([]byte(`{"version":1,"step":"end","within":30000}`), 0)
	f.Add([]byte(`{"version":1,"step":"newest","pid":12}{`), 0)
	f.Add([]byte(`{"version":1,"step":"newest","pid":12,"takes_flows":true}`), 0)
	f.Add([]byte(`{"version":1,"step":"refused","numbers":[1,2],"reason":"no"}`), 0)
	f.Add([]byte(flowMessage(`{"version":1,"number":7,"id":"a","bytes_up":5,"idle_timeout":1000,"down":{"rest":"AAE=","ended":true},"up":{"shut":true},"new":1}`)), 2)
	f.Add([]byte(flowMessage(`{"version":1,"number":7,"down":{"later":{"n":1}},"UP":{"shut":true,"marks":null}}`)), 2)
	f.Add([]byte(`{"version":1,"step":"flow","sockets":[{"kind":"downstream","flow":7},{"kind":"upstream","flow":7},{"kind":"upstream_rest","flow":7}],"flows":[{"version":1,"number":7}]}`), 3)
	f.Add([]byte(`{"version":1,"step":"kept","sockets":[{"kind":"downstream","flow":7},{"kind":"upstream","flow":7}],"flows":[{"version":1,"number":7,"kept":{"up":-3,"down":0,"up_from":1,"down_from":2}}]}`), 2)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := Parse(b, files)
		if err != nil {
			return
		}
		if m.Version < 1 || m.Step == "" || len(m.Sockets) != files || m.PID < 0 || m.Within < 0 {
			t.Fatalf("taken: %+v, with %d files", m, files)
		}
		for _, f := range m.Flows {
			sockets := 0
			for _, s := range m.Sockets {
				if s.Flow == f.Number && (s.Kind == KindDown || s.Kind == KindUp) {
					sockets++
				}
			}
			if m.Step != FlowStep && m.Step != keptStep || (f.Kept != nil) != (m.Step == keptStep) || f.Number == 0 || sockets != 2 || f.BytesUp < 0 || f.BytesDown < 0 || f.Buffer < 0 ||
				f.IdleTimeout < 0 || len(f.Down.Rest) > mostRest || len(f.Up.Rest) > mostRest {
				t.Fatalf("taken: %+v", f)
			}
			if b, err := json.Marshal(f); err != nil || !json.Valid(b) {
				t.Fatalf("%+v can't be written again: %s (%v)", f, b, err)
			}
		}
		for _, s := range m.Sockets {
			if s.Kind == "" || s.File != nil {
				t.Fatalf("taken: %+v", s)
			}
		}
	})
}
