package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/metrics"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// handed is the way from one server to another in this process: a record is written and read, and sockets are
// copied, as between two.
type handed struct {
	t      *testing.T
	to     *Server
	lost   chan struct{}
	asked  chan struct{} // nothing is taken, and this gets each question
	silent atomic.Bool
	more   string // fields of a record that this program does not know

	meanwhile func() // before it is decided who has a flow
	decided   func() // when it is to go, before that is told here
	keeps     bool   // it stays, since the answer comes late
}

func (h *handed) Lost() <-chan struct{} { return h.lost }

func (h *handed) Answers() bool { return !h.silent.Load() }

func (h *handed) Give(f *handover.Flow, gone func(error)) {
	go func() {
		if h.asked != nil {
			gone(errors.New("no"))
			h.asked <- struct{}{}
			return
		}
		f.Number, f.Version = 1, handover.FlowVersion
		b, err := json.Marshal(f)
		if err == nil && h.more != "" {
			b = append(append(b[:len(b)-1], h.more...), '}')
		}
		var came handover.Flow
		err = errors.Join(err, json.Unmarshal(b, &came))
		came.Down.Conn, came.Up.Conn = h.copy(f.Down.Conn), h.copy(f.Up.Conn)
		begin, forget, adoptErr := h.to.AdoptFlow(&came)
		if err = errors.Join(err, adoptErr); err != nil {
			gone(err)
			return
		}
		if h.meanwhile != nil {
			h.meanwhile()
		}
		if f.IsKilled() || h.keeps {
			forget()
			gone(errors.New("killed"))
			return
		}
		if h.decided != nil {
			h.decided()
		}
		gone(nil)
		begin()
	}()
}

func (h *handed) copy(c net.Conn) net.Conn {
	again, err := c.(*tcpsock.Bare).Copy()
	if err != nil {
		h.t.Error(err)
	}
	return again
}

// exchangeBytes sends n bytes to c, and wants them back.
func exchangeBytes(t *testing.T, c net.Conn, n int) {
	t.Helper()
	sent, got := make([]byte, n), make([]byte, n)
	rand.Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		written <- err
	}()
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil || !bytes.Equal(sent, got) {
		t.Fatalf("other bytes came back (%v)", err)
	}
}

// TestGiveFlows: flows go to another server, which has neither their listener nor their route. There they are
// shown, counted, limited, killed and logged as before, and the old one ends.
func TestGiveFlows(t *testing.T) {
	echo := backend(t, func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	addr, other := freeAddr(t), freeAddr(t)
	old := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", addr, echo))
	next := start(t, fmt.Sprintf(`
limits: { connections_per_source: 1 }
listeners: [ { name: other, listen: [%q], mode: tcp, default: { forward: %q } } ]
`, other, echo))
	var all []net.Conn
	for range 5 {
		c := dialTCP(t, addr)
		exchangeBytes(t, c, 1000)
		all = append(all, c)
	}
	half := dialTCP(t, addr) // half of it has ended
	if _, err := half.Write([]byte("word")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "6 flows", func() bool { return old.Flows().Len() == 6 })
	before := old.Flows().Snapshot(flow.Query{})
	old.Leave()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h := &handed{t: t, to: next.Server, lost: make(chan struct{}), more: `,"new":1`}
	gave := make(chan struct{})
	go func() {
		defer close(gave)
		old.GiveFlows(ctx, h)
	}()
	if err := old.Drain(t.Context()); err != nil { // with its last flow
		t.Error(err)
	}
	cancel()
	<-gave
	for _, c := range all {
		exchangeBytes(t, c, 300_000)
	}
	if n := next.Flows().Len(); n != 6 {
		t.Fatalf("%d flows have come, want 6", n)
	}
	for i, f := range next.Flows().Snapshot(flow.Query{}) {
		b := before[i]
		if f.ID != b.ID || !f.Started.Equal(b.Started) || f.Client != b.Client || f.Listener != "web" || f.Route != b.Route ||
			f.Target != echo || f.Upstream != b.Upstream || f.BytesUp < b.BytesUp {
			t.Errorf("it was shown as %+v, and is as %+v", b, f)
		}
	}
	if err := half.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if word, err := io.ReadAll(half); err != nil || string(word) != "word" {
		t.Errorf("after half of the flow has ended: %q, %v", word, err)
	}
	if late, err := net.Dial("tcp", other); err == nil { // else it was reset at once: this source has 5 too many
		defer late.Close()
		if _, err := late.Read(make([]byte, 1)); err == nil {
			t.Error("connections that have come are not counted for their source")
		}
	}
	eventually(t, "5 connections", func() bool { return next.limiter.Total() == 5 })
	eventually(t, "the bytes that were moved here, and no others, are counted", func() bool { // after they are written
		traffic, _ := next.Flows().Traffic()
		return slices.ContainsFunc(traffic, func(n flow.Traffic) bool {
			return n.Listener == "web" && n.Route == "" && n.Up >= 5*300_000 && n.Up < 5*301_000
		})
	})
	for _, f := range next.Flows().Live() { // and on to a third
		if s := f.Killer.(*spliced); string(s.unknown["new"]) != "1" {
			t.Errorf("what is not known of its record is %q", s.unknown)
		}
	}
	if n, err := next.KillFlows(url.Values{"id": {before[0].ID}}, "a test"); err != nil || n.Killed != 1 {
		t.Errorf("kill: %+v, %v", n, err)
	}
	if _, err := all[0].Read(make([]byte, 1)); err == nil {
		t.Error("it was killed, and lives")
	}
	for _, c := range all[1:] {
		c.Close()
	}
	eventually(t, "all flows have ended", func() bool { return next.Flows().Len() == 0 && next.limiter.Total() == 0 })
	eventually(t, "each has a line", func() bool { return next.log.Count(`msg="flow ended"`) == 6 })
	if n := old.log.Count(`msg="flow ended"`); n != 0 {
		t.Errorf("the old server has %d lines of flows that went on", n)
	}
	if n := metrics.Totals(old.metrics.Ended, "end"); len(n) != 0 {
		t.Errorf("the old server counts the ends %v", n)
	}
}

// slowly notes when flows are given.
type slowly struct {
	*handed
	mu    sync.Mutex
	given []time.Time
}

func (s *slowly) Give(f *handover.Flow, gone func(error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.given = append(s.given, time.Now())
	s.handed.Give(f, gone)
}

// two are a server with an echoing target, and one that takes flows over.
func two(t *testing.T) (addr string, old, next *daemon) {
	to := backend(t, echo)
	addr = freeAddr(t)
	old = start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", addr, to))
	next = start(t, fmt.Sprintf("listeners: [ { name: other, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", freeAddr(t), to))
	return addr, old, next
}

// TestIdleFlowsPause: between some idle flows and the next that are given others have the processors.
func TestIdleFlowsPause(t *testing.T) {
	addr, old, next := two(t)
	const pauses = 3
	flows := pauses*idleTogether*old.opts.Loops.Len() + 1
	for range flows {
		exchangeBytes(t, dialTCP(t, addr), 10)
	}
	h := &slowly{handed: &handed{t: t, to: next.Server, lost: make(chan struct{})}}
	ctx, cancel := context.WithCancel(t.Context())
	gave := make(chan struct{})
	go func() {
		defer close(gave)
		old.GiveFlows(ctx, h)
	}()
	eventually(t, "all have gone", func() bool { return next.Flows().Len() == flows && old.Flows().Len() == 0 })
	cancel()
	<-gave
	if took := h.given[flows-1].Sub(h.given[0]); took < pauses*idlePause {
		t.Errorf("%d flows were given within %v", flows, took)
	}
}

// TestGiveFlowsRefused: what is not taken goes on, and can be given later, by another upgrade.
func TestGiveFlowsRefused(t *testing.T) {
	addr, old, next := two(t)
	c := dialTCP(t, addr)
	exchangeBytes(t, c, 1000)
	give := func(h *handed) (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		gave := make(chan struct{})
		go func() {
			defer close(gave)
			old.GiveFlows(ctx, h)
		}()
		return func() {
			cancel()
			<-gave
		}
	}
	asked := make(chan struct{}, 1000)
	h := &handed{t: t, lost: make(chan struct{}), asked: asked}
	stop := give(h)
	for range 2 { // and again
		<-asked
	}
	stop()
	// A process that does not answer is asked when it does.
	h.silent.Store(true)
	stop = give(h)
	time.Sleep(4 * measureSoon)
	if len(asked) > 0 {
		t.Error("a flow is given to who does not answer")
	}
	h.silent.Store(false)
	<-asked
	stop()
	exchangeBytes(t, c, 100_000)
	if old.Flows().Len() != 1 || next.Flows().Len() != 0 {
		t.Errorf("the old server has %d flows, the new one %d", old.Flows().Len(), next.Flows().Len())
	}
	next.Leave()
	if _, _, err := next.AdoptFlow(&handover.Flow{}); !errors.Is(err, handover.ErrLeft) {
		t.Errorf("a server that is at its end takes flows: %v", err)
	}
	if _, _, err := next.AdoptFlow(&handover.Flow{Source: "nobody"}); err == nil {
		t.Error("a record that makes no sense is taken")
	}
	third := start(t, fmt.Sprintf("listeners: [ { name: third, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", freeAddr(t), backend(t, echo)))
	stop = give(&handed{t: t, to: third.Server, lost: make(chan struct{})})
	eventually(t, "it has gone", func() bool { return old.Flows().Len() == 0 })
	stop()
	exchangeBytes(t, c, 100_000)
}

// TestNotTaken: a flow stands still ever less often for a process that does not take it.
func TestNotTaken(t *testing.T) {
	now := time.Now()
	var n *notTaken
	for _, want := range []time.Duration{2, 4, 8, 16, 30, 30} {
		n = n.again(now)
		if want *= time.Second; n.isOver(now.Add(want-1)) || !n.isOver(now.Add(want)) {
			t.Errorf("after %d times it is not offered again after %v", n.times+1, want)
		}
	}
}

// TestMeasureFlows: flows that are idle go before interactive ones, and those before bulk.
func TestMeasureFlows(t *testing.T) {
	echo := backend(t, func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", addr, echo))
	var all []net.Conn
	for range 3 {
		c := dialTCP(t, addr)
		exchangeBytes(t, c, 1000)
		all = append(all, c)
	}
	counted := func(want int64) { // a byte may be counted after it has arrived
		eventually(t, "all is counted", func() bool {
			n := int64(0)
			for _, fl := range d.Flows().Live() {
				up, down := fl.Killer.(*spliced).Load()
				n += up + down
			}
			return n == want
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	counted(6000)
	g := newGiving(ctx, d.Server, &handed{t: t})
	check := func(want [3]int) {
		t.Helper()
		if got := [3]int{len(g.idle.flows), len(g.interactive.flows), len(g.bulk.flows)}; got != want {
			t.Errorf("idle, interactive and bulk: %v, want %v", got, want)
		}
	}
	measure := func(want [3]int) {
		t.Helper()
		g.measure()
		check(want)
	}
	check([3]int{0, 3, 0}) // nothing is known of them
	exchangeBytes(t, all[0], 1000)
	exchangeBytes(t, all[1], 300_000)
	counted(608_000)
	measure([3]int{1, 1, 1})
	measure([3]int{3, 0, 0})
	// One that can't leave holds up none of the others.
	cancel()
	over := make(chan error, 1)
	g.give(g.idle.flows[0], func(err error) { over <- err })
	if err := <-over; err == nil {
		t.Error("it leaves though ctx is over")
	}
	measure([3]int{2, 0, 1})
}

// TestForgetFlow: a flow that the other process keeps, or that is not begun when the server ends, leaves nothing.
func TestForgetFlow(t *testing.T) {
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { reject: true } } ]\n", freeAddr(t)))
	come := func() (forget func()) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		down, up := dialTCP(t, ln.Addr().String()), dialTCP(t, ln.Addr().String())
		_, forget, err = d.AdoptFlow(&handover.Flow{Listener: "web", Route: "default", Source: "192.0.2.1", BytesUp: 5,
			Down: handover.Side{Conn: down}, Up: handover.Side{Conn: up}})
		if err != nil {
			t.Fatal(err)
		}
		return forget
	}
	eventually(t, "nobody is connected, and memory is not watched", d.memory.IsIdle)
	forget := come()
	eventually(t, "memory is watched", func() bool { return !d.memory.IsIdle() })
	if d.Flows().Len() != 1 || d.limiter.Total() != 1 {
		t.Error("it is not counted")
	}
	forget()
	if d.Flows().Len() != 0 || d.limiter.Total() != 0 {
		t.Error("it is still counted")
	}
	traffic, _ := d.Flows().Traffic()
	for _, n := range traffic {
		if n.Up != 0 {
			t.Errorf("%+v is counted for a flow that never was here", n)
		}
	}
	come()
	d.Close() // which waits for all
}

// TestAdoptAtEnd: a flow that comes while the server closes is not counted before it needs what Close holds.
func TestAdoptAtEnd(t *testing.T) {
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { reject: true } } ]\n", freeAddr(t)))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r := &handover.Flow{Listener: "web", Route: "default", Transparent: true,
		Down: handover.Side{Conn: dialTCP(t, ln.Addr().String())}, Up: handover.Side{Conn: dialTCP(t, ln.Addr().String())}}
	d.mu.Lock()
	said := make(chan error, 1)
	go func() {
		_, _, err := d.AdoptFlow(r)
		said <- err
	}()
	time.Sleep(20 * time.Millisecond) // it waits now, as a rule
	d.adoption.end()
	d.isClosed = true
	d.mu.Unlock()
	if err := <-said; !errors.Is(err, handover.ErrLeft) {
		t.Errorf("it is taken: %v", err)
	}
	if d.returnPath.Load() != nil {
		t.Error("a server that is closed opens a return path")
	}
}

// TestAdoptTransparent: a flow with its client's own address is not taken where answers to that would not come
// back.
func TestAdoptTransparent(t *testing.T) {
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { reject: true } } ]\n", freeAddr(t)))
	why := errors.New("not permitted")
	d.mu.Lock()
	d.returnPathErr = why
	d.mu.Unlock()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r := &handover.Flow{Listener: "web", Route: "default", Transparent: true,
		Down: handover.Side{Conn: dialTCP(t, ln.Addr().String())}, Up: handover.Side{Conn: dialTCP(t, ln.Addr().String())}}
	if _, _, err := d.AdoptFlow(r); !errors.Is(err, why) || errors.Is(err, handover.ErrLeft) {
		t.Errorf("it is taken, or for another reason not: %v", err)
	}
	if d.Flows().Len() != 0 || d.limiter.Total() != 0 {
		t.Error("it is counted")
	}
	if err := r.Down.Conn.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("its connection is not closed: %v", err)
	}
}

// TestKilledWhileGiven: a flow that is killed while another process has its record ends, in whichever process it
// is killed.
func TestKilledWhileGiven(t *testing.T) {
	echo := backend(t, func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	for _, when := range []string{"before it is decided", "just when it goes", "in the other process, which does not get it"} {
		t.Run(when, func(t *testing.T) {
			addr := freeAddr(t)
			old := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", addr, echo))
			next := start(t, fmt.Sprintf("listeners: [ { name: other, listen: [%q], mode: tcp, default: { reject: true } } ]\n", freeAddr(t)))
			c := dialTCP(t, addr)
			exchangeBytes(t, c, 1000)
			kill := func(d *daemon) func() {
				return func() {
					if k, err := d.KillFlows(url.Values{"route": {"default"}}, "a test"); err != nil || k.Killed != 1 {
						t.Errorf("%+v, %v", k, err)
					}
				}
			}
			h := &handed{t: t, to: next.Server, lost: make(chan struct{})}
			switch when {
			case "before it is decided":
				h.meanwhile = kill(old)
			case "just when it goes":
				h.decided = kill(old)
			default:
				h.meanwhile = kill(next)
				h.keeps = true
			}
			ctx, cancel := context.WithCancel(t.Context())
			gave := make(chan struct{})
			go func() {
				defer close(gave)
				old.GiveFlows(ctx, h)
			}()
			c.SetReadDeadline(time.Now().Add(time.Minute))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("its client reads %v", err)
			}
			eventually(t, "both are rid of it", func() bool { return old.Flows().Len()+next.Flows().Len() == 0 })
			cancel()
			<-gave
		})
	}
}

// TestKilledOnItsWay: a flow that is killed when it has left, and is not given yet, ends here.
func TestKilledOnItsWay(t *testing.T) {
	echo := backend(t, func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q } } ]\n", addr, echo))
	c := dialTCP(t, addr)
	exchangeBytes(t, c, 1000)
	s := d.Flows().Live()[0].Killer.(*spliced)
	left := make(chan *relay.Parcel, 1)
	s.Leave(t.Context(), func(p *relay.Parcel, err error) {
		if err != nil {
			t.Error(err)
		}
		left <- p
	})
	p := <-left
	if p == nil {
		return
	}
	s.Kill(errors.New("a test"))
	h := &handed{t: t, asked: make(chan struct{}, 1)}
	over := make(chan error, 1)
	newGiving(t.Context(), d.Server, h).handOver(s, p, func(err error) { over <- err })
	if err := <-over; err == nil || err.Error() != "a test" {
		t.Errorf("it is given: %v", err)
	}
	eventually(t, "it has ended", func() bool { return d.Flows().Len() == 0 })
	if n := len(h.asked); n != 0 {
		t.Error("another process was asked to take it")
	}
}
