package relay_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
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

// TestLoopEvenMessages: messages that fill the pieces in which a side on trial is read exactly are no bulk: their flow
// stays on its loop when the trial ends.
func TestLoopEvenMessages(t *testing.T) {
	f := relaytest.Loopback{}.Path(t).Connect(t)
	defer f.Server.Close()
	defer f.Client.Close()
	var moved relay.Counters
	f.Start(context.Background(), relay.Options{Counters: &moved})
	message := make([]byte, 16<<10)
	for range 32 { // four times what a reader acknowledges until its trial ends; every second one is not answered
		for _, way := range [][2]net.Conn{{f.Client, f.Server}, {f.Client, f.Server}, {f.Server, f.Client}, {f.Server, f.Client}} {
			if _, err := way[0].Write(message); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(way[1], message); err != nil {
				t.Fatal(err)
			}
		}
	}
	if down, up := relay.States(&moved); down != "loop" || up != "loop" {
		t.Errorf("after messages of 16 KiB in turn its sides are %s and %s", down, up)
	}
}

// TestTrialMessages: a message that comes after an answer reaches its reader whole, though on trial.
func TestTrialMessages(t *testing.T) {
	f := relaytest.Loopback{}.Path(t).Connect(t)
	defer f.Server.Close()
	defer f.Client.Close()
	f.Start(context.Background(), relay.Options{})
	const messages = 12
	message := make([]byte, 16<<10)
	for range messages {
		for _, way := range [][2]net.Conn{{f.Client, f.Server}, {f.Server, f.Client}} {
			if _, err := way[0].Write(message); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(way[1], message); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]net.Conn{"server": f.Server, "client": f.Client} {
		tcpsock.Control(c, func(fd int) {
			i, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil {
				t.Fatal(err)
			}
			if n := i.Data_segs_in; n > messages+messages/2 {
				t.Errorf("%d messages came to the %s in %d parts", messages, name, n)
			}
		})
	}
}
