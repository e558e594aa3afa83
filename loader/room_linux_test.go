package loader

import "testing"

// Flows in the sockmap take room while they move something, and give it back when they rest, go out or end.
func TestRoom(t *testing.T) {
	l := open(t, allRules, 16)
	all := l.Room()
	a, b := splicePath(t, l, pathOptions{}), splicePath(t, l, pathOptions{})
	if n := l.Room(); n != all-2 {
		t.Errorf("with two flows there is room for %d, want %d", n, all-2)
	}
	waitFor(t, func() bool { return l.Room() == all }, "both to rest")
	waitFor(t, func() bool { must(t, exchangeBytes(a, 100, 100)); return l.Room() == all-1 }, "one to be busy")
	for _, p := range []*path{a, b} {
		p.client.Close()
		p.server.Close()
	}
	waitFor(t, func() bool { return l.Stats().Flows == 0 && l.inside.Load() == 0 && l.Room() == all }, "the end of both")

	o := open(t, outside(), 16)
	splicePath(t, o, pathOptions{})
	if n := o.Room(); n != all {
		t.Errorf("a flow outside takes room: %d of %d are left", n, all)
	}
}
