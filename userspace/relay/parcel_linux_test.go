package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestHops: the table, with flows that leave their relay for another one at random moments.
func TestHops(t *testing.T) {
	for _, p := range []struct {
		name string
		l    relaytest.Loopback
		size relaytest.Size
	}{
		{"tcp4", relaytest.Loopback{}, relaytest.DefaultSize()},
		{"tcp to unix", relaytest.Loopback{Up: "unix"}, relaytest.SmallSize()},
		{"unix to tcp6", relaytest.Loopback{Down: "unix", Up: "tcp6"}, relaytest.SmallSize()},
		{"parked at once", relaytest.Loopback{Options: relay.WithParkAfter(relay.Options{}, time.Millisecond)}, relaytest.SmallSize()},
		{"small buffer", relaytest.Loopback{Options: relay.Options{Buffer: 4 << 10}}, relaytest.SmallSize()},
	} {
		t.Run(p.name, func(t *testing.T) {
			p.l.Hops = new(relaytest.Hops)
			relaytest.Run(t, p.l.Path(t), p.size)
			left, stayed := p.l.Hops.Counts()
			t.Logf("flows left %d times, and stayed %v", left, stayed)
			if left < 100 {
				t.Error("they hardly leave")
			}
		})
	}
}

// an answer is one of Leave.
type answer struct {
	parcel *relay.Parcel
	err    error
}

// leave asks the flow to leave, and waits for the answer.
func leave(t testing.TB, c *relay.Counters) answer {
	t.Helper()
	answers := make(chan answer, 2)
	c.Leave(t.Context(), func(p *relay.Parcel, err error) { answers <- answer{p, err} })
	select {
	case a := <-answers:
		return a
	case <-time.After(time.Minute):
		t.Fatalf("no answer: %s", relay.Describe(c))
		panic("unreachable")
	}
}

// flowFor starts a flow with o.
func flowFor(t testing.TB, c *relay.Counters, o relay.Options) *relaytest.Flow {
	t.Helper()
	f := relaytest.Loopback{Options: o}.Path(t).Connect(t)
	t.Cleanup(func() { f.Client.Close(); f.Server.Close() })
	f.Start(context.Background(), relay.Options{Counters: c})
	return f
}

// epollsWith counts the epolls of this process that have c's socket.
func epollsWith(t testing.TB, c net.Conn) (n int) {
	t.Helper()
	var s unix.Stat_t
	tcpsock.Control(c, func(fd int) {
		if err := unix.Fstat(fd, &s); err != nil {
			t.Fatal(err)
		}
	})
	infos, err := os.ReadDir("/proc/self/fdinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		b, _ := os.ReadFile("/proc/self/fdinfo/" + i.Name()) // it may be closed meanwhile
		if strings.Contains(string(b), fmt.Sprintf(" ino:%x ", s.Ino)) {
			n++
		}
	}
	return n
}

// TestLeave: wherever a flow is, it leaves with all that is known of it, in no epoll, and goes on where it is
// resumed.
func TestLeave(t *testing.T) {
	say := func(t *testing.T, from, to net.Conn, n int) {
		t.Helper()
		if err := relaytest.Send(from, to, int64(n)); err != nil {
			t.Fatal(err)
		}
	}
	until := func(t *testing.T, c *relay.Counters, down, up string) {
		t.Helper()
		relaytest.Until(t, down+" and "+up, func() bool {
			d, u := relay.States(c)
			return d == down && u == up
		})
	}
	const busy = 1 << 20
	leaveLoop := func(t *testing.T, c *relay.Counters, from, to net.Conn) (n int64) {
		t.Helper()
		relaytest.Until(t, "the flow leaves the loop", func() bool {
			say(t, from, to, busy)
			n += busy
			down, _ := relay.States(c)
			return down != "loop"
		})
		return n
	}
	for _, c := range []struct {
		name      string
		parkAfter time.Duration
		bring     func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64)
		downEnded bool
		upEnded   bool
	}{
		{"on a loop", 0, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			say(t, f.Client, f.Server, 100)
			say(t, f.Server, f.Client, 200)
			until(t, c, "loop", "loop")
			return 100, 200
		}, false, false},
		{"half-closed on a loop", 0, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			say(t, f.Client, f.Server, 100)
			closeWrite(t, f.Client, f.Server)
			return 100, 0
		}, true, false},
		{"in pumps", time.Hour, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			up = leaveLoop(t, c, f.Client, f.Server)
			until(t, c, "flowing", "flowing")
			return up, 0
		}, false, false},
		{"half-closed in pumps", time.Hour, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			down = leaveLoop(t, c, f.Server, f.Client)
			closeWrite(t, f.Server, f.Client)
			until(t, c, "flowing", "ended")
			return 0, down
		}, false, true},
		{"parked", time.Millisecond, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			up = leaveLoop(t, c, f.Client, f.Server)
			until(t, c, "waiting", "waiting")
			return up, 0
		}, false, false},
		{"half-closed and parked", time.Millisecond, func(t *testing.T, f *relaytest.Flow, c *relay.Counters) (up, down int64) {
			up = leaveLoop(t, c, f.Client, f.Server)
			closeWrite(t, f.Client, f.Server)
			until(t, c, "ended", "waiting")
			return up, 0
		}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var moved relay.Counters
			f := flowFor(t, &moved, relay.WithParkAfter(relay.Options{}, c.parkAfter))
			movedUp, movedDown := c.bring(t, f, &moved)
			relaytest.Until(t, "all is counted", func() bool {
				up, down := moved.Load()
				return up == movedUp && down == movedDown
			})
			a := leave(t, &moved)
			if a.err != nil {
				t.Fatal(a.err)
			}
			p := a.parcel
			for _, s := range []struct {
				relay.ParcelSide
				isEnded, isShut bool
			}{{p.Down, c.downEnded, c.upEnded}, {p.Up, c.upEnded, c.downEnded}} {
				if _, ok := s.Conn.(*tcpsock.Bare); !ok || s.IsEnded != s.isEnded || s.IsShut != s.isShut || len(s.Rest) > 0 {
					t.Errorf("%+v, and not %v, %v", s.ParcelSide, s.isEnded, s.isShut)
				}
				if n := epollsWith(t, s.Conn); n != 0 {
					t.Errorf("%d epolls have the socket", n)
				}
			}
			if p.UpBytes != movedUp || p.DownBytes != movedDown || p.IdleSince.IsZero() {
				t.Errorf("%+v", p)
			}
			if a := leave(t, &moved); a.err == nil {
				t.Error("it has left twice")
			}
			// What comes meanwhile waits.
			if !c.upEnded {
				f.Server.Write([]byte("waits"))
			}
			var resumed relay.Counters
			results := make(chan relay.Result, 1)
			relaytest.OtherRelay().Resume(t.Context(), p, relay.Options{Counters: &resumed}, func(r relay.Result) { results <- r })
			want := relay.Result{Up: movedUp, Down: movedDown, End: relay.EndEOF, Datapath: "userspace"}
			if !c.upEnded {
				if b := make([]byte, 5); readFull(t, f.Client, b) != "waits" {
					t.Errorf("%q", b)
				}
				want.Down += 5
				say(t, f.Server, f.Client, busy)
				want.Down += busy
			}
			if !c.downEnded {
				say(t, f.Client, f.Server, busy)
				want.Up += busy
				closeWrite(t, f.Client, f.Server)
			}
			if !c.upEnded {
				closeWrite(t, f.Server, f.Client)
			}
			if r := <-results; r != want {
				t.Errorf("%+v, want %+v", r, want)
			}
			if up, down := resumed.Load(); up != want.Up || down != want.Down {
				t.Errorf("%d and %d are counted", up, down)
			}
		})
	}
}

// TestResumeUnix: a flow of a unix socket that goes on is offered to no datapath, which takes TCP.
func TestResumeUnix(t *testing.T) {
	var offered atomic.Int32
	d := pingPongTaker{room: 1, offered: &offered, begun: new(atomic.Int64)}
	var moved relay.Counters
	f := relaytest.Loopback{Up: "unix"}.Path(t).Connect(t)
	defer f.Client.Close()
	defer f.Server.Close()
	f.Start(context.Background(), relay.Options{Counters: &moved})
	if err := relaytest.Send(f.Client, f.Server, 100); err != nil {
		t.Fatal(err)
	}
	a := leave(t, &moved)
	if a.err != nil {
		t.Fatal(a.err)
	}
	relaytest.OtherRelay().Resume(t.Context(), a.parcel, relay.Options{Counters: &moved, WhenPingPong: []datapath.Returner{d},
		Datapaths: []datapath.Datapath{refusing{&offered}}}, func(relay.Result) {})
	end := time.Now().Add(time.Second)
	if _, _, err := relaytest.PingPong(f.Client, f.Server, 1<<10, func() bool { return time.Now().After(end) }); err != nil {
		t.Fatal(err)
	}
	if n := offered.Load(); n > 0 {
		t.Errorf("it was offered %d times", n)
	}
}

// refusing counts the flows that it is offered.
type refusing struct{ offered *atomic.Int32 }

func (refusing) Name() string { return "refusing" }

func (r refusing) Splice(context.Context, int, int, datapath.Handoff) (func() (int64, int64), error) {
	r.offered.Add(1)
	return nil, errRefused
}

func readFull(t testing.TB, c net.Conn, b []byte) string {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// closeWrite ends a stream, and waits for that to arrive.
func closeWrite(t testing.TB, from, to net.Conn) {
	t.Helper()
	if err := from.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	to.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := to.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
}

// stoppingFlow starts a flow with o whose client will read in steps. There is little room between the relay
// and the client, and that does not grow: what the relay has read from a full queue it mostly holds.
func stoppingFlow(t *testing.T, c *relay.Counters, o relay.Options) *relaytest.Flow {
	t.Helper()
	f := relaytest.Loopback{Options: o}.Path(t).Connect(t)
	t.Cleanup(func() { f.Client.Close(); f.Server.Close() })
	down, client := f.Down.(*net.TCPConn), f.Client.(*net.TCPConn)
	if err := errors.Join(down.SetWriteBuffer(32<<10), client.SetReadBuffer(32<<10)); err != nil {
		t.Fatal(err)
	}
	f.Start(context.Background(), relay.Options{Counters: c})
	return f
}

// readStep is what the client of a stoppingFlow reads at a time: more than the relay copies before it splices.
const readStep = 256 << 10

// leaveStopped has the client of a stoppingFlow read in steps, and asks the flow to leave after each, until
// the answer is as wanted. Else it is resumed. Where nobody reads, a second try would find the same.
func leaveStopped(t *testing.T, c *relay.Counters, step func(), wanted func(answer) bool) answer {
	t.Helper()
	for i := range 40 {
		step()
		last, still := int64(-1), 0
		relaytest.Until(t, "the buffers are full", func() bool {
			if _, down := c.Load(); down != last {
				last, still = down, 0
			}
			still++
			return still > 10 && piped() > 0
		})
		a := leave(t, c)
		if wanted(a) {
			t.Logf("after %d steps", i+1)
			return a
		}
		if a.err != nil {
			t.Fatal(a.err)
		}
		relaytest.OtherRelay().Resume(t.Context(), a.parcel, relay.Options{Counters: c}, func(relay.Result) {})
	}
	t.Fatal("what is wanted does not happen")
	panic("unreachable")
}

// piped is what both relays of this process hold for readers that have no room.
func piped() int64 {
	_, r := relaytest.Relay()
	return r.Piped() + relaytest.OtherRelay().Piped()
}

func isStopped(err error) bool {
	return err != nil && strings.Contains(err.Error(), "reader that has stopped")
}

// TestLeaveStopped: what is held for a reader who has stopped goes along if it is little. If it is much the flow
// stays, and its other direction goes on.
func TestLeaveStopped(t *testing.T) {
	for _, c := range []struct {
		name   string
		buffer int64
		leaves bool
	}{{"little", 16 << 10, true}, {"much", 1 << 20, false}} {
		t.Run(c.name, func(t *testing.T) {
			var moved relay.Counters
			f := stoppingFlow(t, &moved, relay.Options{Buffer: c.buffer})
			data := make([]byte, 32<<20)
			rand.NewChaCha8([32]byte{1, 2}).Read(data)
			sent := make(chan error, 1)
			go func() {
				_, err := f.Server.Write(data)
				sent <- err
			}()
			rest := data
			receive := func(n int) {
				t.Helper()
				if got := readFull(t, f.Client, make([]byte, n)); got != string(rest[:n]) {
					t.Fatal("other bytes arrive than were sent")
				}
				rest = rest[n:]
			}
			receive(1 << 20) // so that it is not on trial any more
			a := leaveStopped(t, &moved, func() { receive(readStep) }, func(a answer) bool {
				if c.leaves {
					return a.err == nil && len(a.parcel.Up.Rest) > 0
				}
				return isStopped(a.err)
			})
			if c.leaves {
				if len(a.parcel.Down.Rest) > 0 {
					t.Errorf("%d and %d bytes go along", len(a.parcel.Up.Rest), len(a.parcel.Down.Rest))
				}
				if n := piped(); n != 0 {
					t.Errorf("%d bytes are said to be in pipes", n)
				}
				relaytest.OtherRelay().Resume(t.Context(), a.parcel, relay.Options{Counters: &moved}, func(relay.Result) {})
			} else if n := piped(); n <= 64<<10 {
				t.Errorf("it stays, and only %d bytes are held", n)
			}
			if err := relaytest.Send(f.Client, f.Server, 1000); err != nil {
				t.Fatal(err)
			}
			receive(len(rest))
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			a = leave(t, &moved) // now it may
			if a.err != nil {
				t.Fatal(a.err)
			}
			a.parcel.Down.Conn.Close()
			a.parcel.Up.Conn.Close()
		})
	}
}

// TestPutOff: a flow that can't leave, because much is held for a reader who has stopped, is not asked again
// and again meanwhile.
func TestPutOff(t *testing.T) {
	goroutines := func() uint64 {
		all := []metrics.Sample{{Name: "/sched/goroutines-created:goroutines"}}
		metrics.Read(all)
		return all[0].Value.Uint64()
	}
	var moved relay.Counters
	// Parked, the other direction is started for each try.
	f := stoppingFlow(t, &moved, relay.WithParkAfter(relay.Options{Buffer: 1 << 20}, time.Millisecond))
	go func() { _, _ = f.Server.Write(make([]byte, 64<<20)) }()
	readFull(t, f.Client, make([]byte, 1<<20)) // so that it is not on trial any more
	var before, n uint64
	leaveStopped(t, &moved, func() {
		readFull(t, f.Client, make([]byte, readStep))
		before = goroutines()
	}, func(a answer) bool {
		n = goroutines() - before
		return isStopped(a.err)
	})
	t.Logf("%d goroutines were started", n)
	if n > 100 {
		t.Errorf("%d goroutines were started", n)
	}
}

// TestStays: why a flow does not leave, and that it goes on.
func TestStays(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	var none relay.Counters
	for name, c := range map[string]*relay.Counters{"no flow": &none} {
		if a := leave(t, c); a.err == nil {
			t.Errorf("%s leaves", name)
		}
	}
	for _, c := range []struct {
		name string
		l    relaytest.Loopback
		ctx  context.Context
	}{
		{"wrapped", relaytest.Loopback{WrapUp: wrap}, t.Context()},
		{"ctx is over", relaytest.Loopback{}, canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.l.Path(t).Connect(t)
			var moved relay.Counters
			f.Start(context.Background(), relay.Options{Counters: &moved})
			if err := relaytest.Send(f.Client, f.Server, 100); err != nil {
				t.Fatal(err)
			}
			var answers atomic.Int32
			moved.Leave(c.ctx, func(p *relay.Parcel, err error) {
				answers.Add(1)
				if p != nil || err == nil {
					t.Errorf("%+v, %v", p, err)
				}
			})
			if err := relaytest.Exchange(f.Client, f.Server, 1000, 1000); err != nil {
				t.Fatal(err)
			}
			if r := f.Result(t); r.End != relay.EndEOF || answers.Load() != 1 {
				t.Errorf("%+v, %d answers", r, answers.Load())
			}
		})
	}
}

// TestLeaveRaces: whatever else happens to a flow as it is asked to leave, there is one answer. It has left, and
// is never said to have ended, or it ends once.
func TestLeaveRaces(t *testing.T) {
	const flows = 400
	p := relaytest.Loopback{Options: relay.WithParkAfter(relay.Options{}, time.Millisecond)}.Path(t)
	_, r := relaytest.Relay()
	var left, stayed atomic.Int32
	var all sync.WaitGroup
	places := make(chan bool, 16)
	for i := range uint64(flows) {
		places <- true
		all.Go(func() {
			defer func() { <-places }()
			rnd := rand.New(rand.NewPCG(i, 3))
			f := p.Connect(t)
			defer f.Client.Close()
			defer f.Server.Close()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			var moved relay.Counters
			ends := make(chan relay.Result, 2)
			r.Run(ctx, f.Down, f.Up, relay.Options{Counters: &moved}, func(r relay.Result) { ends <- r })
			if i%2 == 0 { // else it is on a loop
				if err := relaytest.Send(f.Client, f.Server, 1<<20); err != nil {
					t.Error(err)
					return
				}
			}
			var begin sync.WaitGroup
			begin.Add(1)
			at := func(do func()) {
				wait := time.Duration(rnd.IntN(100)) * time.Microsecond
				all.Go(func() { begin.Wait(); time.Sleep(wait); do() })
			}
			answers := make(chan answer, 4)
			asking, stop := context.WithCancel(context.Background())
			defer stop()
			at(func() { moved.Leave(asking, func(p *relay.Parcel, err error) { answers <- answer{p, err} }) })
			switch i / 2 % 5 {
			case 0:
				at(func() { moved.Kill(errors.New("because")) })
			case 1:
				at(cancel)
			case 2:
				at(stop)
			case 3:
				at(func() { f.Client.(*net.TCPConn).SetLinger(0); f.Client.Close() })
			case 4:
				at(func() { f.Client.Close(); f.Server.Close() })
			}
			begin.Done()
			var a answer
			select {
			case a = <-answers:
			case <-time.After(time.Minute):
				t.Errorf("flow %d: no answer: %s", i, relay.Describe(&moved))
				return
			}
			if a.err == nil {
				left.Add(1)
				a.parcel.Down.Conn.Close()
				a.parcel.Up.Conn.Close()
			} else {
				stayed.Add(1)
				moved.Kill(errors.New("the test is over"))
				select {
				case <-ends:
				case <-time.After(time.Minute):
					t.Errorf("flow %d stays (%v) and does not end: %s", i, a.err, relay.Describe(&moved))
				}
			}
			if a.err == nil && len(ends) > 0 || len(answers) > 0 || len(ends) > 0 {
				t.Errorf("flow %d: %d more answers, %d ends", i, len(answers), len(ends))
			}
		})
	}
	all.Wait()
	t.Logf("%d have left, %d stayed", left.Load(), stayed.Load())
	if left.Load() == 0 || stayed.Load() == 0 {
		t.Error("one of the two never comes first")
	}
	if change := r.Illegal(); change != nil {
		t.Errorf("a flow goes from %s", *change)
	}
}

// BenchmarkLeave: the pause of a flow that talks, from the last answer before it leaves to the first after it
// was resumed, and the time that many idle flows take.
func BenchmarkLeave(b *testing.B) {
	hop := func(b *testing.B, c *relay.Counters, to *relay.Relay, done func(relay.Result)) {
		a := leave(b, c)
		if a.err != nil {
			b.Fatal(a.err)
		}
		to.Resume(context.Background(), a.parcel, relay.Options{Counters: c}, done)
	}
	_, r := relaytest.Relay()
	relays := []*relay.Relay{relaytest.OtherRelay(), r}
	b.Run("talking", func(b *testing.B) {
		var moved relay.Counters
		f := flowFor(b, &moved, relay.Options{})
		go io.Copy(struct{ io.Writer }{f.Server}, struct{ io.Reader }{f.Server})
		var worst atomic.Int64
		go func() {
			buf := make([]byte, 64)
			for {
				begin := time.Now()
				if _, err := f.Client.Write(buf); err != nil {
					return
				}
				if _, err := io.ReadFull(f.Client, buf); err != nil {
					return
				}
				for took := int64(time.Since(begin)); ; {
					if old := worst.Load(); took <= old || worst.CompareAndSwap(old, took) {
						break
					}
				}
			}
		}()
		var pauses []time.Duration
		for i := 0; b.Loop(); i++ {
			worst.Store(0)
			hop(b, &moved, relays[i%2], func(relay.Result) {})
			up, _ := moved.Load()
			for end := time.Now().Add(time.Minute); time.Now().Before(end); { // two answers later
				if now, _ := moved.Load(); now >= up+128 {
					break
				}
				time.Sleep(100 * time.Microsecond)
			}
			pauses = append(pauses, time.Duration(worst.Load()))
		}
		slices.Sort(pauses)
		b.ReportMetric(float64(pauses[len(pauses)/2].Microseconds()), "p50-us")
		b.ReportMetric(float64(pauses[len(pauses)*99/100].Microseconds()), "p99-us")
	})
	b.Run("idle", func(b *testing.B) {
		const flows = 4000 // of which each has four descriptors here, and six on its way
		p := relaytest.Loopback{}.Path(b)
		counters := make([]relay.Counters, flows)
		var ended sync.WaitGroup
		defer ended.Wait()
		for i := range counters {
			f := p.Connect(b)
			defer f.Client.Close()
			defer f.Server.Close()
			ended.Add(1)
			r.Run(context.Background(), f.Down, f.Up, relay.Options{Counters: &counters[i]}, func(relay.Result) { ended.Done() })
		}
		for i := 0; b.Loop(); i++ {
			for j := range counters {
				hop(b, &counters[j], relays[i%2], func(relay.Result) { ended.Done() })
			}
		}
		b.ReportMetric(b.Elapsed().Seconds()/float64(b.N*flows)*10_000, "s/10,000")
	})
}
