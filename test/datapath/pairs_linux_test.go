package datapath

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestPairs crosses the hands that the kernel datapaths are, and those between them and userspace, with every
// order of ends, resets and bursts, over a cable to ends with small windows.
func TestPairs(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	c := cable.New(t, relaytest.SmallWindow)
	relaytest.RunPairs(t, sockmapHands(t, c, load(t), load(t)))
	t.Run("sk_msg", func(t *testing.T) { relaytest.RunPairs(t, localHands(t, c)) })
}

// TestReach is TestReach of userspace/relay.
func TestReach(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	c := cable.New(t, relaytest.SmallWindow)
	o := relay.Options{Datapaths: []datapath.Datapath{atOnce{load(t)}}}
	relaytest.RunReach(t, relaytest.Loopback{Cable: c, Options: o}.Path(t), c.Plug)
}

func sockmapHands(t *testing.T, c relaytest.Cable, inAtOnce, usual *countedLoader) []relaytest.Hands {
	path := func(o relay.Options) relaytest.Path {
		return relaytest.Loopback{Cable: c, Down: "tcp6", Options: o}.Path(t)
	}
	inside := path(relay.Options{Datapaths: []datapath.Datapath{atOnce{inAtOnce}}})
	outside := path(relay.Options{Datapaths: []datapath.Datapath{usual}})
	uncabled := relaytest.Loopback{Options: relay.Options{Datapaths: []datapath.Datapath{atOnce{inAtOnce}}}}.Path(t)
	var offered, taken atomic.Int32
	t.Cleanup(func() {
		if offered.Load() > 0 && taken.Load() == 0 {
			t.Error("no flow came from a loop into the sockmap")
		}
	})
	return []relaytest.Hands{
		{Name: "in the sockmap", Path: inside, Take: takenBy(loader.Name)},
		{Name: "beside the sockmap", Path: outside, Take: takenBy(loader.Name)},
		{Name: "into the sockmap", Path: outside,
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				last := 0
				return exchange(t, f, 1000, func() bool {
					now := usual.stayOf(t, f)
					stayed := now == last && now != 0
					last = now
					return stayed
				})
			}},
		{Name: "out of the sockmap", Path: uncabled, Alone: true, Fast: true,
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				before := inAtOnce.count().Returned
				return exchange(t, f, 4<<20, func() bool { return inAtOnce.count().Returned > before })
			}},
		{Name: "from a loop into the sockmap", Most: 4, Path: path(relay.Options{WhenPingPong: []datapath.Returner{usual}}),
			Take: func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
				offered.Add(1)
				rounds := 0 // on a busy machine few are quick enough, and stay on the loop
				up, down, err := relaytest.PingPong(f.Client, f.Server, 200, func() bool {
					rounds++
					return moved.Datapath() == loader.Name || rounds > 2000
				})
				if err != nil {
					t.Fatal(err)
				}
				if moved.Datapath() == loader.Name {
					taken.Add(1)
				}
				return up, down
			}},
	}
}

// atOnce has a datapath take flows as they begin, not when they are ping-pong or quiet.
type atOnce struct{ datapath.Datapath }

func localHands(t *testing.T, c relaytest.Cable) []relaytest.Hands {
	l, local := loadLocal(t, "pairs")
	path := func(hops *relaytest.Hops) relaytest.Path {
		server, _ := cgroup.Listen(t, "tcp4")
		p := relaytest.Loopback{Cable: c, Server: server, Hops: hops,
			Options: relay.Options{Datapaths: []datapath.Datapath{local, l}}}.Path(t)
		becomeKnown(t, local, p)
		return p
	}
	return []relaytest.Hands{
		{Name: "past TCP", Path: path(nil), Take: takenBy(loader.LocalName)},
		{Name: "in and out, past TCP", Path: path(&relaytest.Hops{Within: 30 * time.Millisecond}),
			Take: takenBy(loader.LocalName)},
	}
}

// takenBy sends bytes both ways until the datapath of that name has the flow.
func takenBy(name string) func(testing.TB, *relaytest.Flow, *relay.Counters) (up, down int64) {
	return func(t testing.TB, f *relaytest.Flow, moved *relay.Counters) (up, down int64) {
		return exchange(t, f, 1000, func() bool { return moved.Datapath() == name })
	}
}

// exchange sends n bytes each way, again and again until enough.
func exchange(t testing.TB, f *relaytest.Flow, n int64, enough func() bool) (up, down int64) {
	t.Helper()
	sent := int64(0)
	relaytest.Until(t, "the flow comes into other hands", func() bool {
		if err := relaytest.Both(f.Client, f.Server, n); err != nil {
			t.Fatal(err)
		}
		sent += n
		return enough()
	})
	return sent, sent
}
