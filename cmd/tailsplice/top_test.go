package main

import (
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
)

func TestCompareLooks(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	f := func(id, downstream string, up, down int64) flow.Snapshot {
		return flow.Snapshot{ID: id, Downstream: downstream, Started: start, BytesUp: up, BytesDown: down}
	}
	got := compareLooks(
		[]flow.Snapshot{f("slow", "a", 100, 0), f("twice", "a", 10, 10), f("twice", "b", 10, 10), f("over", "a", 9, 9)},
		[]flow.Snapshot{f("slow", "a", 110, 0), f("twice", "a", 10, 10), f("twice", "b", 10, 50), f("new", "a", 0, 1000)},
		start, start.Add(2*time.Second))
	want := []struct {
		id       string
		up, down float64
	}{{"new", 0, 500}, {"twice", 0, 20}, {"slow", 5, 0}, {"twice", 0, 0}}
	if len(got.Flows) != len(want) || got.UpRate != 5 || got.DownRate != 520 {
		t.Fatalf("%+v", got)
	}
	for i, w := range want {
		if g := got.Flows[i]; g.ID != w.id || g.UpRate != w.up || g.DownRate != w.down {
			t.Errorf("%d: %s %v %v, want %v", i, g.ID, g.UpRate, g.DownRate, w)
		}
	}
}
