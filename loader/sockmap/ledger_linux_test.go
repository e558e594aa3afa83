package sockmap

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// recordFlow records the flow between down and up, of which userspace moves nothing.
func recordFlow(t testing.TB, l *Engine, down, up *net.TCPConn, o Flow) (forget func()) {
	t.Helper()
	var fds [2]int
	for i, c := range []*net.TCPConn{down, up} {
		raw, err := c.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	o.Moved = func() (up, down int64) { return o.Up, o.Down }
	forget, err := l.Record(fds[0], fds[1], o)
	if err != nil {
		t.Fatal(err)
	}
	return forget
}

// hasID reports whether an entry is of the flow of that id.
func hasID(e sockmapFlow, id string) bool {
	var want sockmapFlow
	text(want.Id[:], id)
	return e.Id == want.Id
}

// A recorded flow is in the flows map, with all that it has moved by whoever moved it, until it is forgotten.
func TestRecord(t *testing.T) {
	l := open(t, nil, 16)
	client, d := loadertest.Connect(t, "tcp4")
	u, server := loadertest.Connect(t, "tcp4")
	defer client.Close()
	defer server.Close()
	var fds [2]int
	for i, c := range []*net.TCPConn{d, u} {
		s, err := dup(c)
		loadertest.Must(t, err)
		loadertest.Must(t, c.Close())
		fds[i] = int(s)
	}
	type returned struct{ up, down int64 }
	var moved [2]atomic.Int64
	back, ended := make(chan returned, 1), make(chan loadertest.Result, 1)
	o := Flow{ID: "recorded", Up: 5, Buffer: 1 << 20,
		Ended: func(up, down int64, end string, err error) {
			ended <- loadertest.Result{Up: up, Down: down, End: end, Err: err}
		},
		Returned: func(_, _ int, downRest, upRest []byte, up, down int64, _ time.Time, _ func(), _ error) {
			if len(downRest)+len(upRest) > 0 {
				t.Errorf("%d and %d bytes were left", len(downRest), len(upRest))
			}
			l.ledger.publish() // before userspace knows what was moved here
			if e := l.entry(t); e.Up.Bytes != uint64(up) || e.Down.Bytes != uint64(down) || int64(e.Up.Passed) < 0 {
				t.Errorf("%d bytes up and %d down, and listed are %+v", up, down, e)
			}
			moved[0].Store(up)
			moved[1].Store(down)
			back <- returned{up, down}
		}}
	moved[0].Store(5)
	o.Moved = func() (up, down int64) { return moved[0].Load(), moved[1].Load() }
	forget, err := l.Record(fds[0], fds[1], o)
	loadertest.Must(t, err)
	if e := l.entry(t); e.Up.Before != 5 || e.Up.Bytes != 5 || !hasID(e, "recorded") {
		t.Errorf("%+v", e)
	}
	moved[0].Add(100) // by userspace
	loadertest.WaitFor(t, func() bool { return l.entry(t).Up.Bytes == 105 && l.entry(t).Up.Passed == 100 }, "the sweep")
	for round := range int64(3) {
		o.Up, o.Down = moved[0].Load(), moved[1].Load()
		count, err := l.Splice(t.Context(), fds[0], fds[1], o)
		loadertest.Must(t, err)
		loadertest.Must(t, loadertest.SendPart(client, server, 1, 1000))
		loadertest.Must(t, loadertest.SendPart(server, client, 2, 2000))
		if up, down := count(); up != 105+1000*(round+1) || down != 2000*(round+1) {
			t.Errorf("round %d: %d bytes up, %d down", round, up, down)
		}
		loadertest.WaitFor(t, func() bool { leave(l); return len(back) > 0 }, "the flow to be given back")
		if r := <-back; r.up != 105+1000*(round+1) || r.down != 2000*(round+1) {
			t.Errorf("round %d: it came back with %+v", round, r)
		}
		e := l.entry(t)
		if n := uint64(round + 1); e.Up.Redirected+e.Up.Passed != 100+1000*n || e.Up.Redirected == 0 ||
			e.Up.Bytes != 105+1000*n || e.Down.Bytes != 2000*n || e.Up.Before != 5 || e.Up.Passed < 100 {
			t.Errorf("round %d: %+v", round, e)
		}
		var key uint64
		var place sockmapPlace
		if l.objects.Places.Iterate().Next(&key, &place) {
			t.Errorf("round %d: socket %d has a place, %+v", round, key, place)
		}
	}
	if n := l.flows(); n != 1 {
		t.Errorf("%d flows", n)
	}
	forget()
	forget()
	if l.flows() != 0 || entries(l.objects.Flows) != 0 {
		t.Errorf("%d flows, %d in the map", l.flows(), entries(l.objects.Flows))
	}
	loadertest.Must(t, unix.Close(fds[0]))
	loadertest.Must(t, unix.Close(fds[1]))
}

// A recorded flow whose sockets the kernel does not take stays recorded; a burst of them switches the
// datapath off.
func TestRefusedWhenItIsHandedOff(t *testing.T) {
	l := open(t, nil, 2*burstFailures)
	loadertest.Must(t, l.objects.Sources.Freeze())
	for i := range burstFailures {
		_, d := loadertest.Connect(t, "tcp4")
		u, _ := loadertest.Connect(t, "tcp4")
		o := Flow{ID: fmt.Sprint(i), Up: 7}
		forget := recordFlow(t, l, d, u, o)
		if _, err := loadertest.Splice(t.Context(), l, d, u, o); err != refusedInsert {
			t.Fatalf("%v", err)
		}
		if off, _ := l.Health(); (off != "") != (i == burstFailures-1) {
			t.Fatalf("after %d: %q", i+1, off)
		}
		if e := l.entry(t); !hasID(e, o.ID) || e.Up.Bytes != 7 || e.Up.Passed != 0 {
			t.Errorf("%+v", e)
		}
		forget()
		loadertest.Must(t, d.Close())
		loadertest.Must(t, u.Close())
	}
	if l.flows() != 0 || entries(l.objects.Flows) != 0 || l.inside.Load() != 0 {
		t.Errorf("%d flows, %d in the map, %d spliced", l.flows(), entries(l.objects.Flows), l.inside.Load())
	}
}

// No more flows are recorded than the flows map has room for.
func TestRecordIsFull(t *testing.T) {
	l := open(t, nil, 1)
	_, d := loadertest.Connect(t, "tcp4")
	u, _ := loadertest.Connect(t, "tcp4")
	forget := recordFlow(t, l, d, u, Flow{})
	_, other := loadertest.Connect(t, "tcp4")
	s, err := dup(other)
	loadertest.Must(t, err)
	defer s.close()
	none := Flow{Moved: func() (up, down int64) { return 0, 0 }}
	if _, err := l.Record(int(s), int(s), none); err != refusedFull {
		t.Errorf("%v", err)
	}
	forget()
	forget, err = l.Record(int(s), int(s), none)
	loadertest.Must(t, err)
	forget()
}
