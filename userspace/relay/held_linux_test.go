package relay_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestHeld: what a flow holds for a reader who has stopped is measured, and since when; nothing is held for one
// who reads, nor when the flow has ended.
func TestHeld(t *testing.T) {
	f := relaytest.Loopback{}.Path(t).Connect(t)
	defer f.Client.Close()
	defer f.Server.Close()
	_, r := relaytest.Relay()
	var moved relay.Counters
	f.Start(context.Background(), relay.Options{Counters: &moved})
	go func() {
		for buf := make([]byte, 64<<10); ; {
			if _, err := f.Server.Write(buf); err != nil {
				return
			}
		}
	}()
	if _, err := io.CopyN(io.Discard, f.Client, 8<<20); err != nil {
		t.Fatal(err)
	}
	last, since := int64(-1), time.Now()
	relaytest.Until(t, "all buffers are full", func() bool {
		if _, down := moved.Load(); down != last {
			last, since = down, time.Now()
		}
		return r.Piped() > 0 && time.Since(since) > 300*time.Millisecond
	})
	now := time.Now()
	for _, later := range []time.Duration{0, time.Minute} {
		r.MeasureHeld(now.Add(later))
		if n, since := moved.Held(); n < r.Piped() || !since.Equal(now) {
			t.Errorf("%d bytes are measured, and pipes hold %d; it stands still since %v, and was seen to %v",
				n, r.Piped(), since, now)
		}
	}
	f.Client.Close()
	relaytest.Until(t, "nothing is held in pipes", func() bool { return r.Piped() == 0 })
	r.MeasureHeld(time.Now())
	if n, _ := moved.Held(); n != 0 {
		t.Errorf("a flow that has ended holds %d bytes", n)
	}
}
