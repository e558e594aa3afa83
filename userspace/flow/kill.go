package flow

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// A Killer ends a flow at once, resetting both sides. It must be safe to call at any time, also later.
type Killer interface {
	Kill(why error)
}

// Selection chooses flows that are to be ended: those with one of IDs, or those that fit all of the others
// that are set. Unlike those of a [Query] its texts are whole.
type Selection struct {
	IDs         []string
	Route, Name string // case does not matter
	Client      netip.Prefix
}

// Values is s as a query, ParseSelection reads it.
func (s Selection) Values() url.Values {
	v := Query{Name: s.Name, Route: s.Route, Client: s.Client}.Values()
	if len(s.IDs) > 0 {
		v["id"] = s.IDs
	}
	return v
}

// ParseSelection reads a query that Values made.
func ParseSelection(v url.Values) (Selection, error) {
	q, err := ParseQuery(v)
	s := Selection{IDs: v["id"], Route: q.Route, Name: q.Name, Client: q.Client}
	others := s.Route != "" || s.Name != "" || s.Client.IsValid()
	switch {
	case err != nil:
		return s, err
	case others && len(s.IDs) > 0:
		return s, errors.New("name flows by their ids, or by route, client or name, and not by both")
	case !others && len(s.IDs) == 0:
		return s, errors.New("name flows by their ids, or by route, client or name: `tailsplice flows` lists all")
	}
	return s, nil
}

func (s *Selection) takes(f *Flow) bool {
	if len(s.IDs) > 0 {
		return slices.ContainsFunc(s.IDs, func(id string) bool { return strings.EqualFold(id, f.ID) })
	}
	q := Query{Client: s.Client}
	return (s.Route == "" || strings.EqualFold(s.Route, f.Route)) && (s.Name == "" || strings.EqualFold(s.Name, f.Name)) && q.takes(f)
}

// Kill ends the flows that live and that s takes, and says how many. why is what their log lines say. An
// error says that there is none, or none of one of the ids; the flows of the others are ended all the same.
func (r *Registry) Kill(s Selection, why error) (killed int, err error) {
	unknown := slices.Clone(s.IDs)
	for _, f := range r.Live() {
		if f.Killer == nil || !s.takes(f) {
			continue
		}
		killed++
		f.Killer.Kill(why)
		unknown = slices.DeleteFunc(unknown, func(id string) bool { return strings.EqualFold(id, f.ID) })
	}
	switch {
	case len(s.IDs) == 0 && killed == 0:
		return 0, errors.New("no flow fits: `tailsplice flows` lists all, and route and name must be whole")
	case len(unknown) > 0:
		return killed, fmt.Errorf("no flow has the id %s: `tailsplice flows` lists all (%d killed)", strings.Join(unknown, ", "), killed)
	}
	return killed, nil
}
