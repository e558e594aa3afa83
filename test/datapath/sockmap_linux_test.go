package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

func TestSockmap(t *testing.T) {
	for _, c := range []struct {
		name   string
		l      relaytest.Loopback
		size   relaytest.Size
		atOnce bool
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize(), false},
		{"tcp4 at once", relaytest.Loopback{}, relaytest.DefaultSize(), true},
		{"tcp6 to tcp4 at once", relaytest.Loopback{Down: "tcp6"}, relaytest.SmallSize(),
			true},
		{"tcp6", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize(), false},
		{"tcp6 at once", relaytest.Loopback{Down: "tcp6", Up: "tcp6"}, relaytest.SmallSize(),
			true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := datapath.Datapath(load(t))
			if c.atOnce {
				d = atOnce{d}
			}
			c.l.Options.Datapaths = []datapath.Datapath{d}
			relaytest.Run(t, c.l.Path(t), c.size)
		})
	}
}

// TestSockmapWire: with an end that sends what overlaps, comes again and out of order.
func TestSockmapWire(t *testing.T) {
	usual := func(d datapath.Datapath) datapath.Datapath { return d }
	for name, as := range map[string]func(datapath.Datapath) datapath.Datapath{
		"begins outside": usual, "at once": func(d datapath.Datapath) datapath.Datapath { return atOnce{d} },
	} {
		t.Run(name, func(t *testing.T) {
			paths := []datapath.Datapath{as(load(t))}
			relaytest.RunWire(t, relaytest.Loopback{Options: relay.Options{Datapaths: paths}})
		})
	}
}

// TestAuto: flows that begin in userspace, and are given to the kernel while they are ping-pong, pass the table from
// then on. More of them than there is room for stay where they are.
func TestAuto(t *testing.T) {
	l := load(t)
	p := relaytest.Loopback{Options: relay.Options{WhenPingPong: []datapath.Returner{l}}}.Path(t)
	connect := p.Connect
	p.Connect = nil
	var all, taken atomic.Int64
	p.Dial = func(t testing.TB) (client, server net.Conn) {
		f := connect(t)
		var moved relay.Counters
		f.Start(context.Background(), relay.Options{Counters: &moved})
		begin := time.Now()
		up, down, err := relaytest.PingPong(f.Client, f.Server, 2<<10, func() bool {
			long := time.Second
			if room(l) > 0 { // then it is taken sooner or later
				long = 5 * time.Second
			}
			return moved.Datapath() == loader.Name || time.Since(begin) > long
		})
		if err != nil {
			t.Fatal(err)
		}
		// In userspace they are counted after the write, when the other end may have read them already.
		u, d := moved.Load()
		for end := time.Now().Add(time.Minute); u != up || d != down; u, d = moved.Load() {
			if time.Now().After(end) {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if u != up || d != down {
			t.Errorf("%d bytes up and %d down are counted as %d and %d", up, down, u, d)
		}
		all.Add(1)
		if moved.Datapath() == loader.Name {
			taken.Add(1)
		}
		return f.Client, f.Server
	}
	relaytest.Run(t, p, relaytest.SmallSize())
	t.Logf("%d of %d flows were taken", taken.Load(), all.Load())
	if taken.Load() < all.Load()/2 {
		t.Errorf("only %d of %d flows were taken", taken.Load(), all.Load())
	}
}

// TestAutoMidStream: flows are ping-pong while they are given to the kernel, and no byte is lost, repeated or
// changed.
func TestAutoMidStream(t *testing.T) {
	l := load(t)
	p := relaytest.Loopback{Options: relay.Options{WhenPingPong: []datapath.Returner{l}}}.Path(t)
	for round := range 10 {
		var all sync.WaitGroup
		for range 4 {
			f := p.Connect(t)
			var moved relay.Counters
			f.Start(context.Background(), relay.Options{Counters: &moved})
			all.Go(func() {
				more := 300
				begin := time.Now()
				up, down, err := relaytest.PingPong(f.Client, f.Server, []int64{1, 100, 2 << 10}[round%3], func() bool {
					if moved.Datapath() == loader.Name {
						more--
					}
					return more < 0 || time.Since(begin) > time.Minute
				})
				f.Client.Close()
				f.Server.Close()
				if r := f.Result(t); err != nil || r.Up != up || r.Down != down ||
					r.Datapath != loader.Name || r.End != relay.EndEOF {
					t.Errorf("%d bytes up, %d down, %v: %+v", up, down, err, r)
				}
			})
		}
		all.Wait()
	}
}

// TestAutoCrowd: while more flows are ping-pong than the kernel has room for, it gets none of them, or few if this
// machine is so slow that not all do; when few do, it gets those.
func TestAutoCrowd(t *testing.T) {
	l := load(t)
	p := relaytest.Loopback{Options: relay.Options{WhenPingPong: []datapath.Returner{l}}}.Path(t)
	type talker struct {
		*relaytest.Flow
		moved    relay.Counters
		up, down int64
		err      error
	}
	begin := func() *talker {
		f := &talker{Flow: p.Connect(t)}
		f.Start(context.Background(), relay.Options{Counters: &f.moved})
		return f
	}
	talk := func(f *talker) {
		said := 0
		up, down, err := relaytest.PingPong(f.Client, f.Server, 200, func() bool { said++; return said > 2 })
		f.up, f.down, f.err = f.up+up, f.down+down, errors.Join(f.err, err)
	}
	end := func(f *talker) {
		f.Client.Close()
		f.Server.Close()
		if r := f.Result(t); f.err != nil || r.Up != f.up || r.Down != f.down {
			t.Errorf("%d bytes up, %d down, %v: %+v", f.up, f.down, f.err, r)
		}
	}
	most := room(l)
	var crowd []*talker
	for range 2 * most {
		crowd = append(crowd, begin())
	}
	// They talk in turn. On goroutines of their own a busy machine might let few of them talk in a tenth of a
	// second, others in the next, and the kernel would get those few each time.
	for start := time.Now(); time.Since(start) < 2*time.Second; {
		for _, f := range crowd {
			talk(f)
		}
		if n := l.count().Flows; n >= most {
			t.Errorf("%d flows were taken out of a crowd", n)
			break
		}
	}
	one := begin()
	isTaken := func() bool { return one.moved.Datapath() == loader.Name }
	for start := time.Now(); !isTaken() && time.Since(start) < time.Minute; {
		talk(one)
		if time.Since(start) < time.Second {
			for _, f := range crowd {
				talk(f)
			}
		}
	}
	if !isTaken() {
		t.Error("the one that was left was not taken")
	}
	for _, f := range append(crowd, one) {
		end(f)
	}
}

// room is as docs/datapaths.md has it.
func room(l *countedLoader) int {
	active, _ := l.Active()
	return 4*runtime.NumCPU() - active
}

// TestUserspace is for the kernels on which there is nothing else: see scripts/test-kernels.
func TestUserspace(t *testing.T) {
	relaytest.Run(t, relaytest.Loopback{}.Path(t), relaytest.SmallSize())
}

// load loads the datapath until the end of the test, which fails if it was not what was tested.
func load(t *testing.T) *countedLoader {
	t.Helper()
	needRoot(t)
	var o loader.Options
	o.Instance = fmt.Sprintf("ts-ldr-table-%d-%d", os.Getpid(), instances.Add(1))
	o.MaxFlows, o.Log = 4096, slog.New(slog.NewTextHandler(os.Stderr, nil))
	made, err := loader.New(o)
	if err != nil {
		t.Fatal(err)
	}
	l := &countedLoader{Loader: made}
	t.Cleanup(func() {
		s, refused := l.count(), l.reasons()
		off, stalls := l.Health()
		t.Logf("%+v, %v", s, refused)
		if s.Taken == 0 || off != "" || len(refused) > 1 || stalls > 0 {
			t.Errorf("sockmap was not what was tested, or stalled: %q, %d stalls", off, stalls)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

var instances atomic.Int64
