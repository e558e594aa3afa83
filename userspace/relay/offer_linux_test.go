package relay

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// A refuser refuses all flows.
type refuser struct{ datapath.Returner }

func (refuser) Name() string { return "refuser" }

func (refuser) Splice(context.Context, int, int, datapath.Handoff) (func() (int64, int64), error) {
	return nil, errors.New("refused")
}

// TestNoOfferWithinPieces: a message makes a flow ping-pong, but it is not offered while the other side is read in
// pieces: the skb that is read in part would come to the verdict whole.
func TestNoOfferWithinPieces(t *testing.T) {
	r, l, done := oneLoop(t)
	f := r.newFlow(context.Background(), nil, nil, Options{WhenPingPong: []datapath.Returner{refuser{}}},
		func(r Result) { done <- r })
	client, down := connected(t)
	server, up := connected(t)
	f.attachTo(l.NewSocket(down), l.NewSocket(up))
	for _, pieces := range []int32{1, 0} {
		var then func()
		l.Do(func() func() {
			f.choice, f.up.pieces = datapath.Choice{Of: []datapath.Returner{refuser{}}, Prefers: true}, pieces
			for from := datapath.Downstream; r.chooser.Message(&f.choice, from, 1) == nil; {
				from = datapath.Downstream + datapath.Upstream - from
			}
			if _, err := client.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			for n := 0; n == 0; time.Sleep(time.Millisecond) {
				n, _ = unix.IoctlGetInt(down, unix.SIOCINQ)
			}
			then = f.down.pass(false)
			return nil
		})
		if offered := then != nil; offered != (pieces == 0) {
			t.Errorf("after %d pieces of the other side it is offered: %v", pieces, offered)
		}
		if then != nil {
			then()
		}
	}
	client.Close()
	server.Close()
	<-done
}

// TestNotGivenBack: a flow that its datapath does not give back, and that stands still, stays when it is to leave.
func TestNotGivenBack(t *testing.T) {
	r, l, done := oneLoop(t)
	var moved Counters
	f := r.newFlow(t.Context(), nil, nil, Options{Counters: &moved}, func(r Result) { done <- r })
	client, down := connected(t)
	server, up := connected(t)
	defer client.Close()
	defer server.Close()
	f.attachTo(l.NewSocket(down), l.NewSocket(up))
	k := keeper{flows: make(chan datapath.Handoff, 1)}
	l.Do(func() func() { return f.handOff(k) })
	h := <-k.flows
	recalled, answer := make(chan struct{}, 1), make(chan error, 1)
	h.Recallable(func() { recalled <- struct{}{} })
	moved.Leave(t.Context(), func(p *Parcel, err error) { answer <- err })
	<-recalled
	select {
	case err := <-answer:
		if err != errStopped {
			t.Errorf("it is not given back, and leaves: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it is waited for without an end")
	}
	h.Ended(0, 0, string(EndEOF), nil)
	<-done
}

// TestLateLook: a timer that had fired when its flow went to a loop does nothing there, and leaves the loop's
// timer alone.
func TestLateLook(t *testing.T) {
	r, l, done := oneLoop(t)
	f := r.newFlow(context.Background(), nil, nil, Options{Idle: time.Hour}, func(r Result) { done <- r })
	client, down := connected(t)
	server, up := connected(t)
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		for !f.isIn(onLoop) {
			runtime.Gosched()
		}
		f.checkIdle() // while the loop makes a timer of its own: the race detector would tell
	}()
	f.attachTo(l.NewSocket(down), l.NewSocket(up))
	<-looked
	f.mu.Lock()
	if f.state != onLoop || f.end != "" {
		t.Errorf("it is in state %v, and ended by %q", f.state, f.end)
	}
	f.mu.Unlock()
	client.Close()
	server.Close()
	<-done
}

// oneLoop is a relay with a single loop, and where one of its flows may tell of its end.
func oneLoop(t *testing.T) (*Relay, *loop.Loop, chan Result) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(loops.Close)
	r := New(loops)
	t.Cleanup(r.Close) // before that of loops
	return r, loops.Loop(), make(chan Result, 1)
}

// connected is a connection, and the descriptor of its other end.
func connected(t *testing.T) (net.Conn, int) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	far, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	near, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	raw, err := near.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := tcpsock.Dup(raw)
	if err != nil {
		t.Fatal(err)
	}
	return far, fd
}

// A recorder records all flows, and takes none.
type recorder struct{ refuser }

func (recorder) Record(int, int, datapath.Handoff) (forget func(), err error) { return func() {}, nil }

// TestBrokenBeforeBegin: where upstream is reset before a flow begins, the end says so, with the error that the
// first write has got. A further one would be told EPIPE.
func TestBrokenBeforeBegin(t *testing.T) {
	r, l, done := oneLoop(t)
	for name, datapaths := range map[string][]datapath.Datapath{"alone": nil, "with a datapath": {recorder{}}} {
		client, down := connected(t)
		server, up := connected(t)
		server.(*net.TCPConn).SetLinger(0)
		server.Close()
		for !tcpsock.IsClosed(up) { // the reset comes by itself
			time.Sleep(time.Millisecond)
		}
		r.RunConnecting(context.Background(), l.NewSocket(down), Connecting{FD: up, Connected: true},
			Options{Head: []byte("head"), Datapaths: datapaths}, func(r Result) { done <- r })
		if got := <-done; got.End != EndUpstreamReset || !errors.Is(got.Err, unix.ECONNRESET) {
			t.Errorf("%s: it ends by %s: %v", name, got.End, got.Err)
		}
		client.Close()
	}
}

// notYet refuses all flows, the first of them for now only; new ones too, or not.
type notYet struct {
	offers *atomic.Int32
	isNew  bool
}

func (notYet) Name() string { return "not yet" }

func (d notYet) Splice(context.Context, int, int, datapath.Handoff) (func() (int64, int64), error) {
	if d.offers.Add(1) > 1 {
		return nil, errors.New("not at all")
	}
	return nil, refusedForNow(d)
}

type refusedForNow notYet

func (refusedForNow) Error() string           { return "not yet" }
func (r refusedForNow) Later(isNew bool) bool { return r.isNew || !isNew }

// A countingRecorder is a recorder that counts what it is offered.
type countingRecorder struct {
	recorder
	offers *atomic.Int32
}

func (d countingRecorder) Splice(ctx context.Context, down, up int, h datapath.Handoff) (func() (int64, int64), error) {
	d.offers.Add(1)
	return d.recorder.Splice(ctx, down, up, h)
}

// TestOfferedLater: a datapath that takes flows as they begin is offered one that has been elsewhere before
// again, if it refuses that for now only, when the flow is handed off; also one that could not be offered as it
// began. It is offered a new one again where it says so.
func TestOfferedLater(t *testing.T) {
	r, l, done := oneLoop(t)
	for _, c := range []struct {
		name        string
		elsewhere   *elsewhere
		isNew       bool  // it may have new ones later
		first, then int32 // how often it is offered as it begins, and when it has been handed off twice
	}{
		{"new", nil, false, 1, 1}, {"new, and it may be later", nil, true, 1, 2}, {"resumed", &elsewhere{}, false, 1, 2},
		{"resumed with bytes", &elsewhere{isWet: true}, false, 0, 2},
	} {
		var begun, later atomic.Int32
		client, down := connected(t)
		server, up := connected(t)
		o := Options{Datapaths: []datapath.Datapath{notYet{&begun, c.isNew}, countingRecorder{offers: &later}}}
		f := r.newFlow(context.Background(), nil, nil, o, func(r Result) { done <- r })
		f.elsewhere = c.elsewhere
		f.begin(l.NewSocket(down), l.NewSocket(up))
		if n := begun.Load(); n != c.first {
			t.Errorf("%s: it is offered %d times as it begins", c.name, n)
		}
		for b := make([]byte, 1); later.Load() < 2; {
			for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
				if _, err := way[0].Write(b); err != nil {
					t.Fatal(err)
				}
				if _, err := way[1].Read(b); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n := begun.Load(); n != c.then {
			t.Errorf("%s: it is offered %d times in the end", c.name, n)
		}
		client.Close()
		server.Close()
		<-done
	}
}
