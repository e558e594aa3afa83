package sockmap

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// Who asks for sweeps has them soon, though the sweep that is under way asks for none.
func TestSweeperAsked(t *testing.T) {
	s, swept := newSweeper(), make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.run(func(time.Time) time.Duration {
			s.atLeast(time.Millisecond)
			select {
			case swept <- struct{}{}:
			case <-s.quit:
			}
			return time.Hour
		})
	}()
	defer func() { s.close(); <-done }()
	for range 4 {
		select {
		case <-swept:
		case <-time.After(loadertest.Patience):
			t.Fatal("no sweep is made")
		}
	}
}

// There are sweeps each second while there is a flow, in the sockmap or not, and few while there is none.
func TestSweepRests(t *testing.T) {
	l := open(t, nil, 16)
	want := func(what string, pause time.Duration) {
		t.Helper()
		if got := l.sweep(time.Now()); got != pause {
			t.Errorf("%s: the next sweep is in %v, want %v", what, got, pause)
		}
	}
	pause := func() time.Duration {
		l.sweeper.mu.Lock()
		defer l.sweeper.mu.Unlock()
		return l.sweeper.pause
	}
	rests := func() bool { return pause() == restEvery }
	want("without a flow", restEvery)
	loadertest.WaitFor(t, rests, "the sweeper to rest")
	client, d := loadertest.Connect(t, "tcp4")
	u, server := loadertest.Connect(t, "tcp4")
	defer client.Close()
	defer server.Close()
	forget := recordFlow(t, l, d, u, Flow{ID: "swept", Buffer: 1 << 20})
	if rests() {
		t.Error("it rests beside a flow")
	}
	want("with a flow that userspace has", sweepEvery)
	forget()
	want("without a flow once more", restEvery)
}

// A flow that comes is idle since its last byte, wherever that moved, and who gets it back is told of that.
func TestLastMoved(t *testing.T) {
	l := open(t, nil, 16)
	before := time.Now().Add(-time.Hour)
	for _, c := range []struct {
		name                string
		idle                time.Duration
		isSwept, moves, end bool
	}{
		{"idle", 2 * time.Hour, false, false, false},
		{"swept", 2 * time.Hour, true, false, false},
		{"moved", 2 * time.Hour, false, true, false},
		{"moved and swept", 2 * time.Hour, true, true, false},
		{"idle for too long", time.Hour, true, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, d := loadertest.Connect(t, "tcp4")
			u, server := loadertest.Connect(t, "tcp4")
			defer client.Close()
			defer server.Close()
			var fds [2]int
			for i, conn := range []*net.TCPConn{d, u} {
				s, err := dup(conn)
				loadertest.Must(t, err)
				loadertest.Must(t, conn.Close())
				fds[i] = int(s)
			}
			back, ended := make(chan time.Time, 1), make(chan string, 1)
			forgets := make(chan func(), 1)
			o := Flow{ID: "last", Buffer: 1 << 20, Idle: c.idle, Up: 5, Down: 7, LastMoved: before,
				Moved: func() (up, down int64) { return 5, 7 },
				Ended: func(_, _ int64, end string, _ error) { ended <- end },
				Returned: func(_, _ int, _, _ []byte, _, _ int64, lastMoved time.Time, forget func(), _ error) {
					forgets <- forget
					back <- lastMoved
				}}
			came := time.Now()
			_, err := l.Splice(t.Context(), fds[0], fds[1], o)
			loadertest.Must(t, err)
			if c.moves {
				loadertest.Must(t, loadertest.SendPart(client, server, 1, 1000))
			}
			if c.isSwept {
				l.sweep(time.Now())
				l.sweep(time.Now())
			}
			if c.end {
				if end := <-ended; end != prove.EndIdle {
					t.Error(end)
				}
				return
			}
			loadertest.WaitFor(t, func() bool { leave(l); return len(back) > 0 }, "the flow to be given back")
			if last := <-back; c.moves && last.Before(came) || !c.moves && last != before {
				t.Errorf("a byte was last seen to move %v before the flow came", came.Sub(last))
			}
			(<-forgets)()
			loadertest.Must(t, errors.Join(unix.Close(fds[0]), unix.Close(fds[1])))
		})
	}
}
