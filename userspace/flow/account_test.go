package flow

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

func traffic(r *Registry, listener, route string) Traffic {
	all, _ := r.Traffic()
	i := slices.IndexFunc(all, func(t Traffic) bool { return t.Listener == listener && t.Route == route })
	if i < 0 {
		return Traffic{Live: -1}
	}
	return all[i]
}

func TestTraffic(t *testing.T) {
	r := NewRegistry()
	var moved atomic.Int64
	bytes := func() (int64, int64) { return moved.Load(), 2 * moved.Load() }
	a := &Flow{Account: r.Account("web", "a"), Bytes: bytes, Datapath: func() string { return "sockmap" }}
	b := &Flow{Account: r.Account("web", "b"), Bytes: bytes}
	c := &Flow{Account: r.Account("web", ""), Bytes: bytes} // a connection whose requests have routes
	for _, f := range []*Flow{a, b, c} {
		r.Add(f)
	}
	request := r.Account("web", "c")
	request.Requests.Add(1)
	request.Up.Add(5)
	moved.Store(10)
	check := func(route string, want Traffic) {
		t.Helper()
		want.Listener, want.Route = "web", route
		if got := traffic(r, "web", route); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	check("a", Traffic{Live: 1, Up: 10, Down: 20})
	check("c", Traffic{Live: 1, Up: 5})
	check("", Traffic{Up: 30, Down: 60})
	if _, datapaths := r.Traffic(); datapaths["sockmap"] != 1 {
		t.Errorf("flows by datapath: %v", datapaths)
	}
	r.Remove(a)
	moved.Store(11)
	check("a", Traffic{Up: 10, Down: 20})
	check("", Traffic{Up: 32, Down: 64})
	moved.Store(0) // a counter never goes back
	check("b", Traffic{Live: 1, Up: 11, Down: 22})
}

// TestTrafficBefore: what another process has moved is shown with the flow, and counted there.
func TestTrafficBefore(t *testing.T) {
	r := NewRegistry()
	up := int64(100)
	f := &Flow{Account: r.Account("web", "a"), Bytes: func() (int64, int64) { return up, 7 }, BeforeUp: 100, BeforeDown: 5}
	r.Add(f)
	want := Traffic{Listener: "web", Route: "a", Live: 1, Down: 2}
	if got := traffic(r, "web", "a"); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if all := r.Snapshot(Query{}); all[0].BytesUp != 100 || all[0].BytesDown != 7 {
		t.Errorf("it is shown as %+v", all[0])
	}
	up = 130
	r.Remove(f)
	want.Live, want.Up = 0, 30
	if got := traffic(r, "web", "a"); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestTrafficNeverGoesBack: flows that end while they are counted are counted once.
func TestTrafficNeverGoesBack(t *testing.T) {
	r := NewRegistry()
	const flows, bytes = 2000, 1000
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range flows {
				f := &Flow{Account: r.Account("web", "a"), Bytes: func() (int64, int64) { return bytes, 0 }}
				r.Add(f)
				r.Remove(f)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for over := false; !over; {
		select {
		case <-done:
			over = true
		default:
		}
		if got := traffic(r, "web", "a"); got.Up > 4*flows*bytes {
			t.Fatalf("%d bytes: more than there were", got.Up)
		}
	}
	if got := traffic(r, "web", "a"); got.Up != 4*flows*bytes {
		t.Errorf("%d bytes, want %d", got.Up, 4*flows*bytes)
	}
}

// TestRoutesAreBounded: the routes of containers come and go, and are as many as somebody starts containers.
func TestRoutesAreBounded(t *testing.T) {
	r := NewRegistry()
	named := func(from, n int) (out []Route) {
		for i := range n {
			out = append(out, Route{"web", fmt.Sprint(from + i)})
		}
		return out
	}
	r.Configured(named(0, MostRoutes+10))
	if got := r.Account("web", fmt.Sprint(MostRoutes-1)).Route; got == OtherRoutes {
		t.Error("a route within the bound has no account of its own")
	}
	if got := r.Account("web", fmt.Sprint(MostRoutes)).Route; got != OtherRoutes {
		t.Errorf("a route beyond the bound is counted as %s", got)
	}
	busy := &Flow{Account: r.Account("web", "0"), Bytes: func() (int64, int64) { return 1, 1 }}
	r.Add(busy)
	dropped := r.Configured(named(5000, 10))
	if len(dropped) != MostRoutes-1 {
		t.Errorf("%d routes made room, want all but one that has a flow", len(dropped))
	}
	if got := traffic(r, "web", "0"); got.Live != 1 || got.Up != 1 {
		t.Errorf("the flow of a route that is gone is not counted: %+v", got)
	}
	r.Remove(busy)
	if got := traffic(r, "web", "0"); got.Up != 1 {
		t.Errorf("after its end: %+v", got)
	}
	if got := r.Account("web", "5009").Route; got != "5009" {
		t.Errorf("a new route is counted as %s", got)
	}
	if all, _ := r.Traffic(); len(all) > MostRoutes+2 {
		t.Errorf("%d accounts", len(all))
	}
}

// TestDroppedBeforeItsFlow: a route is dropped between the look-up of its account and the flow that begins.
func TestDroppedBeforeItsFlow(t *testing.T) {
	r := NewRegistry()
	for i := range MostRoutes - 1 {
		r.Account("web", fmt.Sprint(i))
	}
	account := r.Account("web", "gone")
	if dropped := r.Configured([]Route{{"web", "new"}}); !slices.Contains(dropped, Route{"web", "gone"}) {
		t.Fatalf("%d routes are dropped, and it is not among them", len(dropped))
	}
	f := &Flow{Account: account, Bytes: func() (up, down int64) { return 5, 7 }}
	r.Add(f)
	for _, live := range []int{1, 0} {
		all, _ := r.Traffic()
		if want := (Traffic{"web", "gone", live, 5, 7}); !slices.Contains(all, want) {
			t.Errorf("%+v is not in %+v", want, all)
		}
		r.Remove(f)
	}
}
