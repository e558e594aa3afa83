package flow

import (
	"sync"
	"testing"
	"time"
)

func TestNewIDIsUnique(t *testing.T) {
	seen := map[string]bool{}
	for range 10_000 {
		id := NewID()
		if len(id) != 2*idBytes || seen[id] {
			t.Fatalf("id %q: wrong length or seen before", id)
		}
		seen[id] = true
	}
}

func TestRegistry(t *testing.T) {
	r := NewRegistry()
	if r.Len() != 0 {
		t.Fatal("a new registry is not empty")
	}
	t0 := time.Now()
	older := &Flow{ID: "b", Started: t0, Bytes: func() (int64, int64) { return 1, 2 }}
	newer := &Flow{ID: "a", Started: t0.Add(time.Second)}
	r.Add(newer)
	r.Add(older)
	got := r.Snapshot(Query{})
	if len(got) != 2 || got[0].ID != "b" || got[0].BytesUp != 1 || got[0].BytesDown != 2 {
		t.Fatalf("snapshot %+v: want b (1 up, 2 down) before a", got)
	}
	if got[0].Format != FormatVersion {
		t.Errorf("format_version is %d", got[0].Format)
	}
	r.Remove(older)
	r.Remove(older)
	if r.Len() != 1 {
		t.Fatalf("%d flows, want the newer one", r.Len())
	}
	r.Remove(newer)
	if r.Len() != 0 {
		t.Fatalf("%d flows left", r.Len())
	}
}

func TestRegistryConcurrent(t *testing.T) {
	r := NewRegistry()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				f := &Flow{ID: NewID()}
				r.Add(f)
				r.Snapshot(Query{})
				r.Remove(f)
			}
		})
	}
	wg.Wait()
	if r.Len() != 0 {
		t.Fatalf("%d flows left", r.Len())
	}
}
