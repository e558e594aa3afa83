package vhost

import (
	"context"
	"io"
	"net"
	"testing"
)

// TestPick follows who is asked first while targets come and go.
func TestPick(t *testing.T) {
	var err error
	first := &Upstream{Key: "first", Dial: func(context.Context) (net.Conn, error) { return &net.TCPConn{}, err }}
	spare := &Upstream{Key: "spare", Dial: first.Dial}
	r := &Route{Upstreams: []Choice{{spare, 0}, {first, 1}}}
	dial := func(up *Upstream, result error) {
		err = result
		if _, got := dialUpstream(context.WithValue(t.Context(), dialKey{}, up)); (got == nil) != (result == nil) {
			t.Fatal(got)
		}
	}
	expect := func(when string, want *Upstream, tried ...*Upstream) {
		t.Helper()
		for range 20 {
			if got := r.pick(tried); got != want {
				t.Fatalf("%s: %v", when, got)
			}
		}
	}
	expect("at first", first)
	expect("after it was tried", spare, first)
	expect("after both were", nil, first, spare)
	dial(first, io.EOF)
	expect("while it can't be reached", spare)
	expect("when the spare one was tried", first, spare)
	dial(first, nil)
	expect("once it is back", first)
	dial(spare, io.EOF)
	expect("without a spare one", first)
	expect("which is asked all the same", spare, first)
}
