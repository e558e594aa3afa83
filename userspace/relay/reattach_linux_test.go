package relay_test

import (
	"context"
	"io"
	"sync/atomic"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestReattaches: a flow goes from pumps back to a loop each time that it is quiet, however often it was busy.
// Its descriptors change each time; the third time they have the numbers that they had at first.
func TestReattaches(t *testing.T) {
	taker := pingPongTaker{offered: new(atomic.Int32), begun: new(atomic.Int64)} // without room
	o := relay.Options{WhenPingPong: []datapath.Returner{taker}}
	f := relaytest.Loopback{Options: o}.Path(t).Connect(t)
	defer f.Client.Close()
	defer f.Server.Close()
	var moved relay.Counters
	f.Start(context.Background(), relay.Options{Counters: &moved})
	for range 4 {
		const size = 4 << 20 // leaves the loop
		sent := make(chan error, 1)
		go func() {
			_, err := f.Client.Write(make([]byte, size))
			sent <- err
		}()
		if _, err := io.CopyN(io.Discard, f.Server, size); err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		relaytest.Until(t, "the flow is on a loop", func() bool {
			down, _ := relay.States(&moved)
			return down == "loop"
		})
	}
}
