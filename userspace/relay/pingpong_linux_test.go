package relay_test

import (
	"context"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// pingPongTaker takes flows that are ping-pong, or refuses them.
type pingPongTaker struct {
	taker
	room    int
	refuses bool
	offered *atomic.Int32
	begun   *atomic.Int64 // bytes that had been moved
}

func (d pingPongTaker) Active() (flows int, ok bool) {
	return 4*runtime.NumCPU() - d.room, true
}

func (d pingPongTaker) Record(int, int, datapath.Handoff) (func(), error) {
	panic("a flow is recorded that does not prefer the datapath")
}

func (d pingPongTaker) Splice(ctx context.Context, down, up int,
	f datapath.Handoff) (func() (int64, int64), error) {
	d.offered.Add(1)
	if d.refuses {
		return nil, errRefused
	}
	d.begun.Store(f.Up + f.Down)
	return d.taker.Splice(ctx, down, up, f)
}

// TestWhenPingPong: a datapath for flows that are ping-pong is offered one that is, when there is room, and again
// when it was refused. No byte is lost or counted twice.
func TestWhenPingPong(t *testing.T) {
	for _, c := range []struct {
		name   string
		up     string
		taker  pingPongTaker
		most   int64
		taken  bool
		offers int32
	}{
		{"taken", "tcp4", pingPongTaker{room: 1}, 2 << 10, true, 1},
		{"no room", "tcp4", pingPongTaker{room: 0}, 2 << 10, false, 0},
		{"refused", "tcp4", pingPongTaker{room: 1, refuses: true}, 2 << 10, false, 2},
		{"a unix socket", "unix", pingPongTaker{room: 1}, 2 << 10, false, 0},
		{"large messages", "tcp4", pingPongTaker{room: 1}, 100 << 10, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.taker.offered, c.taker.begun = new(atomic.Int32), new(atomic.Int64)
			refused := 0
			var moved relay.Counters
			o := relay.Options{
				WhenPingPong: []datapath.Returner{c.taker},
				Refused:      func(string, error) { refused++ },
			}
			f := relaytest.Loopback{Up: c.up, Options: o}.Path(t).Connect(t)
			f.Start(context.Background(), relay.Options{Counters: &moved})
			defer f.Client.Close()
			defer f.Server.Close()
			begin, more := time.Now(), 1000 // more, after it was taken, too
			up, down, err := relaytest.PingPong(f.Client, f.Server, c.most, func() bool {
				long := 2 * time.Second
				if c.offers > 0 { // it ends with the last of them
					long = time.Minute
				}
				if time.Since(begin) > long || c.offers > 0 && c.taker.offered.Load() >= c.offers {
					more--
				}
				return more < 0
			})
			if err != nil {
				t.Fatal(err)
			}
			f.Client.(*net.TCPConn).CloseWrite()
			if _, err := io.Copy(io.Discard, f.Server); err != nil {
				t.Error(err)
			}
			f.Server.(interface{ CloseWrite() error }).CloseWrite()
			r, want := f.Result(t), "userspace"
			if c.taken {
				want = "taker"
			}
			if u, d := moved.Load(); r.Up != up || r.Down != down || u != up || d != down ||
				r.Datapath != want || r.End != relay.EndEOF {
				t.Errorf("%d bytes up, %d down: %+v, and counted %d, %d", up, down, r, u, d)
			}
			if offers := c.taker.offered.Load(); offers < c.offers || c.offers < 2 && offers > c.offers {
				t.Errorf("offered %d times, want %d", offers, c.offers)
			}
			if c.taker.refuses != (refused > 0) {
				t.Errorf("%d refusals were told", refused)
			}
			if begun := c.taker.begun.Load(); c.taken && begun == 0 {
				t.Error("taken before it was ping-pong")
			}
		})
	}
}
