package relay

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/moment"
)

// TestIdleComesBack: for how long no byte has moved is not forgotten when a flow goes to a datapath, nor when
// it comes back.
func TestIdleComesBack(t *testing.T) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	for _, c := range []struct {
		name       string
		was        time.Duration // idle in the datapath
		moved, end bool
	}{
		{"idle", 20 * time.Minute, false, false},
		{"moved", 20 * time.Minute, true, false},
		{"idle for too long", 61 * time.Minute, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, done := New(loops), make(chan Result, 1)
			defer r.Close()
			var moved Counters
			f := r.newFlow(t.Context(), nil, nil, Options{Counters: &moved, Idle: time.Hour}, func(r Result) { done <- r })
			client, down := connected(t)
			server, up := connected(t)
			defer client.Close()
			defer server.Close()
			began := time.Now()
			f.seen, f.since = 0, moment.Of(began.Add(-40*time.Minute)) // as resumed
			l := loops.Loop()
			f.attachTo(l.NewSocket(down), l.NewSocket(up))
			k := keeper{flows: make(chan datapath.Handoff, 1)}
			l.Do(func() func() { return f.handOff(k) })
			h := <-k.flows
			if !h.LastMoved.Equal(began.Add(-40 * time.Minute)) {
				t.Errorf("the datapath is told that a byte moved %v ago", time.Since(h.LastMoved))
			}
			var n int64
			last := time.Now().Add(-c.was)
			if c.moved {
				n = 5
			}
			h.Returned(down, up, nil, nil, n, 0, last, nil, context.Canceled)
			if c.end {
				select {
				case r := <-done:
					if r.End != EndIdle {
						t.Errorf("%+v", r)
					}
				case <-time.After(time.Minute):
					t.Error("it does not end")
				}
				return
			}
			parcels := make(chan *Parcel, 1)
			moved.Leave(t.Context(), func(p *Parcel, err error) {
				if err != nil {
					t.Error(err)
				}
				parcels <- p
			})
			p := <-parcels
			if p == nil {
				return
			}
			defer p.Down.Conn.Close()
			defer p.Up.Conn.Close()
			if !p.IdleSince.Equal(last) {
				t.Errorf("a byte has moved %v ago, and it should be %v", time.Since(p.IdleSince), c.was)
			}
		})
	}
}

// TestIdleByTheClock: what another process says of a flow's idle time is by the machine's clock. Once it is
// here, nobody who sets that ends the flow, or lets it live.
func TestIdleByTheClock(t *testing.T) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	r := New(loops)
	defer r.Close()
	for _, c := range []struct {
		name      string
		was, want time.Duration
	}{
		{"idle", 20 * time.Minute, 20 * time.Minute},
		{"the clock was set back", -20 * time.Minute, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, down := connectedConn(t)
			server, up := connectedConn(t)
			defer client.Close()
			defer server.Close()
			p := &Parcel{Down: ParcelSide{Conn: down}, Up: ParcelSide{Conn: up}, IdleSince: time.Now().Round(0).Add(-c.was)}
			var moved Counters
			began := time.Now()
			r.Resume(t.Context(), p, Options{Counters: &moved, Idle: time.Hour}, func(Result) {})
			parcels := make(chan *Parcel, 1)
			moved.Leave(t.Context(), func(p *Parcel, err error) {
				if err != nil {
					t.Error(err)
				}
				parcels <- p
			})
			if p = <-parcels; p == nil {
				return
			}
			defer p.Down.Conn.Close()
			defer p.Up.Conn.Close()
			ahead := p.IdleSince.Sub(began.Add(-c.want))
			if ahead < -time.Minute || ahead > time.Minute || !strings.Contains(p.IdleSince.String(), " m=") {
				t.Errorf("a byte has moved at %v, and began at %v", p.IdleSince, began)
			}
		})
	}
}

// connectedConn is connected for one who has a net.Conn.
func connectedConn(t *testing.T) (far, near net.Conn) {
	t.Helper()
	far, fd := connected(t)
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	near, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return far, near
}
