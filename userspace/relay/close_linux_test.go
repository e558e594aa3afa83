package relay

import (
	"context"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// TestClose: a relay that is closed leaves no descriptor and no goroutine of what it kept for further flows.
func TestClose(t *testing.T) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	if r, w, err := os.Pipe(); err == nil { // Go's poller has descriptors of its own, from its first use on
		r.Close()
		w.Close()
	}
	had, goroutines := files(t), runtime.NumGoroutine()
	r := New(loops)
	p := r.pipes.get()
	if p == nil {
		t.Fatal("no pipe")
	}
	r.pipes.put(p)
	down, client := net.Pipe()
	up, server := net.Pipe()
	done := make(chan Result)
	go r.Run(context.Background(), down, up, Options{}, func(r Result) { done <- r })
	client.Close()
	server.Close()
	<-done
	r.watches.mu.Lock()
	if !r.watches.start() {
		t.Error("no epoll")
	}
	r.watches.mu.Unlock()
	if files(t) <= had {
		t.Error("nothing is kept: this test looks in the wrong place")
	}
	r.Close()
	for end := time.Now().Add(time.Minute); files(t) > had || runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors, before %d; %d goroutines, before %d", files(t), had, runtime.NumGoroutine(), goroutines)
		}
	}
}

// files counts the descriptors of this process, and one more.
func files(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
