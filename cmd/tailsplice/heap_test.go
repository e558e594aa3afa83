package main

import (
	"runtime/debug"
	"testing"
)

// TestLimitHeap: the collector aims at half of the budget, and with the smallest one it does not run all the time.
func TestLimitHeap(t *testing.T) {
	t.Setenv("GOMEMLIMIT", "")
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	for _, v := range []struct{ memory, want int64 }{{96 << 20, 48 << 20}, {16 << 20, leastHeap}, {0, leastHeap}} { // 0 changes nothing
		limitHeap(v.memory)
		if n := debug.SetMemoryLimit(-1); n != v.want {
			t.Errorf("with %d bytes of memory it aims at %d, want %d", v.memory, n, v.want)
		}
	}
	t.Setenv("GOMEMLIMIT", "1GiB")
	limitHeap(96 << 20)
	if n := debug.SetMemoryLimit(-1); n != leastHeap {
		t.Errorf("GOMEMLIMIT is overruled by %d", n)
	}
}
