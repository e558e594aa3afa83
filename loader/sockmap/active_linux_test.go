package sockmap

import (
	"testing"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// Flows in the sockmap are active while they move something, and no more when they are quiet, go out or end.
func TestActive(t *testing.T) {
	l := open(t, nil, 16)
	active := func() int { n, _ := l.Active(); return n }
	a, b := loadertest.SplicePath(t, l, loadertest.PathOptions{}), loadertest.SplicePath(t, l, loadertest.PathOptions{})
	if n := active(); n != 2 {
		t.Errorf("%d of two flows are active", n)
	}
	loadertest.WaitFor(t, func() bool { return active() == 0 }, "both to be quiet")
	loadertest.WaitFor(t, func() bool { loadertest.Must(t, loadertest.ExchangeBytes(a, 100, 100)); return active() == 1 }, "one to be active")
	for _, p := range []*loadertest.Path{a, b} {
		p.Client.Close()
		p.Server.Close()
	}
	loadertest.WaitFor(t, func() bool { return l.flows() == 0 && active() == 0 }, "the end of both")
}
