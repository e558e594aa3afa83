package relay_test

import (
	"net"
	"slices"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestPairs crosses every change of hands that userspace has with every order of ends, resets and bursts,
// over a cable to ends with small windows.
func TestPairs(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	relaytest.RunPairs(t, userspaceHands(t, cable.New(t, relaytest.SmallWindow)))
}

// TestReach: what came before a reset reaches a reader that goes on, however long that takes TCP.
func TestReach(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	c := cable.New(t, relaytest.SmallWindow)
	relaytest.RunReach(t, relaytest.Loopback{Cable: c}.Path(t), c.Plug)
}

func userspaceHands(t *testing.T, c relaytest.Cable) []relaytest.Hands {
	const buffer = 32 << 10 // little makes a flow leave the loop
	never := relay.WithParkAfter(relay.Options{Buffer: buffer}, time.Hour)
	path := func(o relay.Options) relaytest.Path {
		return relaytest.Loopback{Cable: c, Down: "tcp6", Options: o}.Path(t)
	}
	return []relaytest.Hands{
		{Name: "loop", Path: path(never),
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				return reach(t, f, moved, 100, "loop")
			}},
		{Name: "pumps", Path: path(never),
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				return reach(t, f, moved, 4*buffer, "flowing")
			}},
		{Name: "parked", Path: path(relay.WithParkAfter(relay.Options{Buffer: buffer}, time.Millisecond)),
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				up, down = reach(t, f, moved, 4*buffer, "flowing", "waiting")
				await(t, moved, f.Client, f, "waiting")
				await(t, moved, f.Server, f, "waiting")
				return up, down
			},
			Rest: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters, end net.Conn) {
				await(t, moved, end, f, "waiting", "ended")
			}},
	}
}

// reach sends n bytes both ways until the flow is in one of those states.
func reach(t testing.TB, f *relaytest.Flow, moved *relay.Counters, n int64,
	states ...string) (up, down int64) {
	t.Helper()
	sent := int64(0)
	relaytest.Until(t, "the flow comes into other hands", func() bool {
		if err := relaytest.Both(f.Client, f.Server, n); err != nil {
			t.Fatal(err)
		}
		sent += n
		down, up := relay.States(moved)
		return slices.Contains(states, down) && slices.Contains(states, up)
	})
	return sent, sent
}

// await waits until the side of end is in one of those states.
func await(t testing.TB, moved *relay.Counters, end net.Conn, f *relaytest.Flow, states ...string) {
	t.Helper()
	relaytest.Until(t, "a side comes to rest", func() bool {
		state, up := relay.States(moved)
		if end == f.Server {
			state = up
		}
		return slices.Contains(states, state)
	})
}
