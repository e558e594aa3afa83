package relay_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestLoopFullReader: messages that are too small to be bulk fill the way to a reader that has stopped, so
// that a loop writes one of them in part. The rest of it goes on with the flow.
func TestLoopFullReader(t *testing.T) {
	f := relaytest.Loopback{}.Path(t).Connect(t)
	var moved relay.Counters
	f.Start(context.Background(), relay.Options{Counters: &moved})
	defer f.Server.Close()
	defer f.Client.Close()
	sent := make([]byte, 24<<20) // more than all buffers on the way
	rand.NewChaCha8([32]byte{1}).Read(sent)
	go func() {
		for b := range slices.Chunk(sent, 10_007) {
			if _, err := f.Client.Write(b); err != nil {
				return
			}
			time.Sleep(50 * time.Microsecond)
		}
	}()
	// Until nothing moves any more.
	for last := int64(-1); ; time.Sleep(200 * time.Millisecond) {
		up, _ := moved.Load()
		if up == last && up > 0 {
			break
		}
		last = up
	}
	got := make([]byte, len(sent))
	f.Server.SetReadDeadline(time.Now().Add(60 * time.Second))
	if n, err := io.ReadFull(f.Server, got); err != nil {
		t.Fatalf("after %d bytes: %v", n, err)
	}
	if !bytes.Equal(got, sent) {
		t.Error("other bytes arrive than were sent")
	}
}
