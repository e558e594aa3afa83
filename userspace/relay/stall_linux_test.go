package relay_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestStalledHasNoTimer: a flow whose reader has stopped is not looked at again and again, and it is parked like
// any other once the reader has gone on.
func TestStalledHasNoTimer(t *testing.T) {
	f := relaytest.Loopback{}.Path(t).Connect(t)
	defer f.Client.Close()
	defer f.Server.Close()
	_, r := relaytest.Relay()
	var moved relay.Counters
	f.Start(context.Background(), relay.WithParkAfter(relay.Options{Counters: &moved}, time.Millisecond))
	const size = 32 << 20 // more than all buffers have room for
	sent := make(chan error, 1)
	go func() {
		_, err := f.Server.Write(make([]byte, size))
		sent <- err
	}()
	relaytest.Until(t, "the flow stalls", func() bool { return r.Piped() > 0 })
	for range 3 { // what comes from the reader meanwhile wakes the other direction alone
		relaytest.Until(t, "no timer runs for a flow that stands still", func() bool { return !relay.Ticks(&moved) })
		if _, err := f.Client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(f.Server, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.CopyN(io.Discard, f.Client, size); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	relaytest.Until(t, "the flow is parked", func() bool {
		down, up := relay.States(&moved)
		return down == "waiting" && up == "waiting"
	})
}
