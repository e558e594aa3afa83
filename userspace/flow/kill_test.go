package flow

import (
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
)

type killed struct{ why error }

func (k *killed) Kill(why error) { k.why = why }

// TestKill: what is chosen is ended, and nothing else; texts are whole, and all that is asked for must fit.
func TestKill(t *testing.T) {
	for query, want := range map[string]string{
		"id=a1":                               "a1",
		"id=A1&id=b2":                         "a1 b2",
		"route=%2a.example.org":               "b2 c3",
		"name=example.org":                    "a1",
		"name=EXAMPLE.org":                    "a1",
		"client=192.0.2.1":                    "a1 c3",
		"client=192.0.2.0/24":                 "a1 b2 c3",
		"client=2001:db8::/32":                "d4",
		"client=192.0.2.1&name=w.example.org": "c3",
		"route=default&client=2001:db8::1":    "d4",
		"route=example&name=":                 "error: no flow fits",
		"name=example":                        "error: no flow fits",
		"id=a":                                "error: no flow has the id a:",
		"id=a1&id=zz":                         "a1 error: no flow has the id zz: `tailsplice flows` lists all (1 killed)",
		"":                                    "error: name flows",
		"id=a1&name=x":                        "error: name flows by their ids, or",
		"client=x":                            "error: client \"x\"",
	} {
		r := NewRegistry()
		flows := []*Flow{
			{ID: "a1", Route: "example.org", Name: "example.org", Client: "192.0.2.1:1000"},
			{ID: "b2", Route: "*.example.org", Name: "www.example.org", Client: "192.0.2.2:1000"},
			{ID: "c3", Route: "*.example.org", Name: "w.example.org", Client: "192.0.2.1:1001"},
			{ID: "d4", Route: "default", Client: "[2001:db8::1]:1000"},
		}
		for _, f := range flows {
			f.Killer = new(killed)
			r.Add(f)
		}
		v, _ := url.ParseQuery(query)
		s, err := ParseSelection(v)
		if err == nil {
			if again, err := ParseSelection(s.Values()); err != nil || !slices.Equal(again.IDs, s.IDs) ||
				again.Route != s.Route || again.Name != s.Name || again.Client != s.Client {
				t.Errorf("%q: %+v, and read again %+v, %v", query, s, again, err)
			}
			_, err = r.Kill(s, errors.New("why"))
		}
		var got []string
		for _, f := range flows {
			if why := f.Killer.(*killed).why; why != nil {
				got = append(got, f.ID)
			}
		}
		text := strings.Join(got, " ")
		if err != nil {
			text = strings.TrimSpace(text + " error: " + err.Error())
		}
		if !strings.HasPrefix(text, want) || err == nil && text != want {
			t.Errorf("%q: %s, want %s", query, text, want)
		}
	}
}
