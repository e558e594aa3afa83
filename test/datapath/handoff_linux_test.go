package datapath

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// preferred starts a flow that prefers l.
func preferred(t testing.TB, l *countedLoader) (f *relaytest.Flow, moved *relay.Counters) {
	t.Helper()
	f = relaytest.Loopback{Options: relay.Options{Datapaths: []datapath.Datapath{l}}}.Path(t).Connect(t)
	moved = new(relay.Counters)
	f.Start(context.Background(), relay.Options{Counters: moved})
	t.Cleanup(func() { f.Client.Close(); f.Server.Close() })
	return f, moved
}

// closeBoth ends the flow, and checks what it has moved.
func closeBoth(t testing.TB, f *relaytest.Flow, up, down int64) {
	t.Helper()
	for _, way := range [][2]net.Conn{{f.Client, f.Server}, {f.Server, f.Client}} {
		if err := way[0].(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, way[1]); n != 0 || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	if r := f.Result(t); r.Up != up || r.Down != down || r.End != relay.EndEOF || r.Datapath != loader.Name {
		t.Errorf("%d bytes up, %d down: %+v", up, down, r)
	}
}

// TestStaysWithTheRelay: a flow that has one question and one answer is never handed off, nor is one that is busy.
func TestStaysWithTheRelay(t *testing.T) {
	l := load(t)
	for _, n := range []int64{1000, 32 << 20} {
		f, _ := preferred(t, l)
		began := time.Now()
		if err := relaytest.Exchange(f.Client, f.Server, n, n); err != nil {
			t.Fatal(err)
		}
		if r := f.Result(t); r.Up != n || r.Down != n || r.Datapath != loader.Name {
			t.Errorf("%+v", r)
		}
		if s := l.count(); s.HandedOff != 0 && time.Since(began) < time.Second { // a busy machine makes it quiet
			t.Errorf("a flow of %d bytes went into the sockmap: %+v", n, s)
		}
	}
	if s := l.count(); s.Taken != 2 || s.Flows != 0 {
		t.Errorf("%+v", s)
	}
}

// TestHandedOffWhenQuiet: what comes now and then brings a flow into the sockmap; what is idle stays where it is.
func TestHandedOffWhenQuiet(t *testing.T) {
	l := load(t)
	f, _ := preferred(t, l)
	time.Sleep(2500 * time.Millisecond)
	if s := l.count(); s.HandedOff != 0 || s.Flows != 1 {
		t.Errorf("nothing moves: %+v", s)
	}
	moved := int64(0)
	relaytest.Until(t, "the flow is handed off", func() bool {
		if err := sendOneWay(f.Server, f.Client, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		moved += 100
		time.Sleep(20 * time.Millisecond)
		return l.count().HandedOff > 0
	})
	closeBoth(t, f, 0, moved)
}

// TestChangesHands: sides that are ping-pong have their flow handed off; those that become busy have it given back; quiet, it is
// handed off again. Each byte arrives in its place, for many flows at a time.
func TestChangesHands(t *testing.T) {
	l := load(t)
	const flows = 20
	var all sync.WaitGroup
	for i := range uint64(flows) {
		f, moved := preferred(t, l)
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(i, 5))
			data := make([]byte, 12<<20)
			for j := range data {
				data[j] = byte(rnd.Uint32())
			}
			up, down := int64(0), int64(0)
			for turn := range 60 {
				most := 2000
				if turn%20 > 16 {
					most = len(data)
				}
				a, b := data[:1+rnd.IntN(most)], data[:1+rnd.IntN(most)]
				if err := errors.Join(sendOneWay(f.Client, f.Server, a), sendOneWay(f.Server, f.Client, b)); err != nil {
					t.Errorf("flow %d, turn %d: %v", i, turn, err)
					return
				}
				up, down = up+int64(len(a)), down+int64(len(b))
				if turn%20 == 19 {
					time.Sleep(time.Duration(rnd.IntN(1200)) * time.Millisecond) // pumps may be done with it, or not
				}
			}
			relaytest.Until(t, "all is counted", func() bool {
				u, d := moved.Load()
				return u == up && d == down
			})
			closeBoth(t, f, up, down)
		})
	}
	all.Wait()
	_, stalls := l.Health()
	if s := l.count(); s.HandedOff < flows || s.Taken != flows || stalls != 0 || s.Refused != 0 {
		t.Errorf("%+v, %d stalls, %v", s, stalls, l.reasons())
	}
}

// TestHandedOffAgain: a flow that was given back since it was busy is handed off again when it is ping-pong.
func TestHandedOffAgain(t *testing.T) {
	for _, c := range []struct {
		name string
		o    func(l *countedLoader) relay.Options
	}{
		{"preferred", func(l *countedLoader) relay.Options { return relay.Options{Datapaths: []datapath.Datapath{l}} }},
		{"auto", func(l *countedLoader) relay.Options { return relay.Options{WhenPingPong: []datapath.Returner{l}} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := load(t)
			f := relaytest.Loopback{Options: c.o(l)}.Path(t).Connect(t)
			var moved relay.Counters
			f.Start(context.Background(), relay.Options{Counters: &moved})
			up, down := int64(0), int64(0)
			for range 3 {
				before := l.count().HandedOff
				relaytest.Until(t, "the flow is handed off", func() bool {
					u, d, err := relaytest.PingPong(f.Client, f.Server, 200, rounds(20))
					if err != nil {
						t.Fatal(err)
					}
					up, down = up+u, down+d
					return l.count().HandedOff > before
				})
				left, big := l.count().Returned, make([]byte, 8<<20)
				relaytest.Until(t, "the flow is given back", func() bool {
					if err := sendOneWay(f.Client, f.Server, big); err != nil {
						t.Fatal(err)
					}
					up += int64(len(big))
					return l.count().Returned > left
				})
			}
			for _, way := range [][2]net.Conn{{f.Client, f.Server}, {f.Server, f.Client}} {
				way[0].(*net.TCPConn).CloseWrite()
				if n, err := io.Copy(io.Discard, way[1]); n != 0 || err != nil {
					t.Fatalf("%d bytes, %v", n, err)
				}
			}
			if r := f.Result(t); r.Up != up || r.Down != down || r.End != relay.EndEOF {
				t.Errorf("%d bytes up, %d down: %+v", up, down, r)
			}
			f.Client.Close()
			f.Server.Close()
		})
	}
}

// TestIdleAfterUrgent: a flow that was given back, and had an urgent byte in the sockmap, is quiet then: its idle timeout
// ends it. The kernel tells of that byte until something is read behind it.
func TestIdleAfterUrgent(t *testing.T) {
	l := load(t)
	o := relay.Options{Datapaths: []datapath.Datapath{l}, Idle: 5 * time.Second}
	f := relaytest.Loopback{Options: o}.Path(t).Connect(t)
	defer f.Client.Close()
	defer f.Server.Close()
	f.Start(context.Background(), relay.Options{})
	relaytest.Until(t, "the flow is handed off", func() bool {
		if _, _, err := relaytest.PingPong(f.Client, f.Server, 200, rounds(20)); err != nil {
			t.Fatal(err)
		}
		return l.count().HandedOff > 0
	})
	var err error
	tcpsock.Control(f.Client, func(fd int) { err = unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(f.Server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	relaytest.Until(t, "the flow is given back", func() bool {
		if err := sendOneWay(f.Server, f.Client, make([]byte, 8<<20)); err != nil {
			t.Fatal(err)
		}
		return l.count().Returned > 0
	})
	if r := f.Result(t); r.End != relay.EndIdle {
		t.Errorf("%+v", r)
	}
}

// rounds is enough after n calls.
func rounds(n int) (enough func() bool) { return func() bool { n--; return n < 0 } }

// sendOneWay sends data and checks that it arrives.
func sendOneWay(from, to net.Conn, data []byte) error {
	end := time.Now().Add(time.Minute)
	sent := make(chan error, 1)
	go func() { _, err := from.Write(data); sent <- err }()
	got := make([]byte, len(data))
	err := errors.Join(from.SetWriteDeadline(end), to.SetReadDeadline(end))
	if _, rerr := io.ReadFull(to, got); rerr != nil {
		return errors.Join(err, rerr)
	}
	if string(got) != string(data) {
		return errors.New("other bytes arrived than were sent")
	}
	return errors.Join(err, <-sent)
}
