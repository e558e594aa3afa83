package relay

import (
	"context"
	"errors"
	"net"
	"testing"
	"unsafe"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// TestCancel: a context that is done ends the flows that have it, wherever they are, and no others, also one
// that comes late; nothing is left of them.
func TestCancel(t *testing.T) {
	loops, err := loop.New(2)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	r := New(loops)
	defer r.Close()
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	other, cancelOther := context.WithCancel(t.Context())
	defer cancelOther()
	begin := func(ctx context.Context, isOnLoop bool) (done chan Result, end func()) {
		client, down := connectedConn(t)
		server, up := connectedConn(t)
		if !isOnLoop {
			up = struct{ net.Conn }{up}
		}
		done = make(chan Result, 1)
		r.Run(ctx, down, up, Options{}, func(res Result) { done <- res })
		if _, err := client.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Read(make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		return done, func() { client.Close(); server.Close() }
	}
	var all, others, gone []chan Result
	for i := range 30 {
		ctx, to := ctx, &all
		if i%3 == 1 {
			ctx, to = other, &others
		}
		done, end := begin(ctx, i%2 == 0)
		if i%3 == 2 {
			to = &gone
			end()
		} else {
			defer end()
		}
		*to = append(*to, done)
	}
	for _, done := range gone {
		if res := <-done; res.End == EndCanceled {
			t.Error("a flow is cancelled that has ended by itself")
		}
	}
	cancel(why)
	_, down := connectedConn(t)
	_, up := connectedConn(t)
	late := make(chan Result, 1)
	r.Run(ctx, down, up, Options{}, func(res Result) { late <- res })
	for _, done := range append(all, late) {
		if res := <-done; res.End != EndCanceled || res.Err != why {
			t.Errorf("a flow ends by %s: %v", res.End, res.Err)
		}
	}
	for _, done := range others {
		select {
		case res := <-done:
			t.Errorf("a flow ends by another one's context: %s", res.End)
		default:
		}
	}
	r.cancels.mu.Lock()
	_, isLeft := r.cancels.of[ctx]
	n := 0
	for f := r.cancels.of[other].first; f != nil; f = f.canceling.next {
		n++
	}
	r.cancels.mu.Unlock()
	if isLeft || n != len(others) {
		t.Errorf("%d flows may be cancelled, want %d; something is left of a context that is done: %v", n, len(others), isLeft)
	}
	cancelOther()
	for _, done := range others {
		if res := <-done; res.End != EndCanceled {
			t.Errorf("a flow ends by %s: %v", res.End, res.Err)
		}
	}
	r.cancels.mu.Lock()
	defer r.cancels.mu.Unlock()
	if len(r.cancels.of) != 0 {
		t.Errorf("%d contexts are left", len(r.cancels.of))
	}
}

// TestFlowSize: what has pointers and is larger than 760 bytes takes 896 of the heap.
func TestFlowSize(t *testing.T) {
	if size := unsafe.Sizeof(flow{}); size > 760 {
		t.Errorf("a flow takes %d bytes", size)
	}
	if size := unsafe.Sizeof(loop.Socket{}); size > 64 {
		t.Errorf("a socket takes %d bytes", size)
	}
}
