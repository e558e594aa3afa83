package sockmap

import (
	"testing"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// Flows in the sockmap are busy while they move something, and no more when they rest, go out or end.
func TestBusy(t *testing.T) {
	l := open(t, nil, 16)
	busy := func() int { n, _ := l.Busy(); return n }
	a, b := loadertest.SplicePath(t, l, loadertest.PathOptions{}), loadertest.SplicePath(t, l, loadertest.PathOptions{})
	if n := busy(); n != 2 {
		t.Errorf("%d of two flows are busy", n)
	}
	loadertest.WaitFor(t, func() bool { return busy() == 0 }, "both to rest")
	loadertest.WaitFor(t, func() bool { loadertest.Must(t, loadertest.ExchangeBytes(a, 100, 100)); return busy() == 1 }, "one to be busy")
	for _, p := range []*loadertest.Path{a, b} {
		p.Client.Close()
		p.Server.Close()
	}
	loadertest.WaitFor(t, func() bool { return l.flows() == 0 && busy() == 0 }, "the end of both")
}
