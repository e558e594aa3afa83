package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// spliced is a flow of sni and tcp while it lives. It is the [flow.Flow.Killer] of its entry in the registry.
type spliced struct {
	relay.Counters
	flow  flow.Flow
	in    *conn
	terms terms
	// endUse ends the use of its container here; nil: it has none.
	endUse func()

	isLeaving atomic.Bool                // it is on its way to another process, or is asked to be
	stays     atomic.Bool                // it could not leave when it was asked last, which took its time
	notTaken  atomic.Pointer[notTaken]   // it was on its way, and came back; nil: never
	unknown   map[string]json.RawMessage // of its record, what this program does not know

	balance    *handover.Balance // of what is kept of it; nil: it can't be kept
	isKept     atomic.Bool       // for the process after a crash
	cannotKeep atomic.Bool
	isGone     atomic.Bool // it is removed
	tries      int32       // to keep it; for KeepFlows
}

// terms are how a flow is relayed: as its route had it when it began, wherever it is.
type terms struct {
	buffer      int64
	idle        time.Duration
	datapath    string // the configuration's word
	transparent bool   // it was asked for
	container   string // that [containerOf] names, or ""
}

// splice registers the flow of in which fl describes, but for how it is counted and ended. balance is nil
// where the flow can't be kept. isKept: it is.
func (srv *Server) splice(in *conn, fl flow.Flow, t terms, balance *handover.Balance, isKept bool) *spliced {
	s := &spliced{flow: fl, in: in, terms: t, endUse: srv.wakes.begin(t.container), balance: balance}
	s.isKept.Store(isKept)
	s.flow.Bytes, s.flow.Held, s.flow.Datapath, s.flow.Killer = s.bytes, s.Held, s.Datapath, s
	s.flow.Account = srv.flows.Account(fl.Listener, fl.Route)
	srv.flows.Add(&s.flow)
	srv.keeping.wake()
	return s
}

// bytes are those that the flow has moved, also before it was begun in this process.
func (s *spliced) bytes() (up, down int64) {
	up, down = s.Load()
	return max(up, s.flow.BeforeUp), max(down, s.flow.BeforeDown)
}

// remove forgets s, which has ended or goes on elsewhere.
func (s *spliced) remove() {
	s.isGone.Store(true)
	s.in.server.flows.Remove(&s.flow)
	if s.isKept.Load() {
		s.in.server.keeping.ended()
	}
	if s.endUse != nil {
		s.endUse()
	}
}

// ended says that s has, and ends its connection.
func (s *spliced) ended(res relay.Result) {
	srv := s.in.server
	s.remove()
	end := func() {
		srv.ended(&s.flow, res)
		s.in.release()
	}
	if srv.log.Enabled(srv.ctx, slog.LevelInfo) {
		go end() // a line takes its time to be made, and relay's goroutine has other flows
		return
	}
	end()
}

// relayOptions are those of s, without what is to be written first.
func (srv *Server) relayOptions(s *spliced) relay.Options {
	o := relay.Options{Buffer: s.terms.buffer, Idle: s.terms.idle, Counters: &s.Counters,
		Copied: s.balance != nil, ID: s.flow.ID, Route: s.flow.Route,
		Datapaths:  srv.named(s.terms.datapath),
		MeasureRTT: srv.log.Enabled(srv.ctx, slog.LevelInfo), // only the log wants it
		Refused: func(datapath string, reason error) {
			srv.metrics.Demoted.WithLabelValues(datapath, reason.Error()).Inc()
		},
	}
	if auto := srv.auto.Load(); s.terms.datapath == plan.Auto && auto != nil {
		o.WhenPingPong = *auto
	}
	return o
}

const (
	flowsLeaving = 64 // flows that are asked at a time, or whose bytes nobody moves: each waits for all
	bulkLeaving  = 16 // the same of those that move much: they take their time
	talkLeaving  = 4  // and of those that talk, which go when no more than so many are on their way
	// calmBytes is how much a flow moves within measureBulk at most that goes before the others.
	calmBytes   = 64 << 10
	measureBulk = 50 * time.Millisecond
	// Idle flows go so many for each processor at a time. Then others have it for idleRest: the flows that
	// talk, here and in the other process, and what else runs on the machine.
	idleTogether = 16
	idleRest     = 4 * time.Millisecond
	leaveWait    = 5 * time.Second // for a moment at which nothing of a flow is held here
	leaveAgain   = 500 * time.Millisecond
	// giveAgain is for a flow that the other process did not take, since it stood still meanwhile: twice as
	// long each time, up to mostGiveAgain.
	giveAgain     = 2 * time.Second
	mostGiveAgain = 30 * time.Second
)

// giver is a [*handover.Giver].
type giver interface {
	Give(f *handover.Flow, gone func(error))
	Lost() <-chan struct{}
	Answers() bool
}

// GiveFlows gives the flows of sni and tcp listeners to another process, those that begin meanwhile, too,
// until ctx ends or g is lost. What can't go goes on here. It returns when no flow is on its way. Those that
// are idle go first, and those that move much last: a flow on its way waits for those before it.
func (srv *Server) GiveFlows(ctx context.Context, g giver) {
	var all sync.WaitGroup
	var given atomic.Int64
	defer func() {
		all.Wait()
		if n := given.Load(); n > 0 {
			srv.log.Info("flows have gone to the process that has taken over", "flows", n)
		}
	}()
	calm, talking, bulk := make(chan struct{}, flowsLeaving), make(chan struct{}, talkLeaving), make(chan struct{}, bulkLeaving)
	var moving atomic.Int32 // flows whose bytes nobody moves
	moved, begin := map[*spliced]int64{}, time.Now()
	srv.measureFlows(moved)
	for wait := measureBulk; ; wait = leaveAgain {
		select {
		case <-ctx.Done():
			return
		case <-g.Lost():
			return
		case <-time.After(wait):
		}
		if !g.Answers() { // each would stand still for nothing
			continue
		}
		still, talk, busy := srv.measureFlows(moved)
		for _, part := range []struct {
			flows []*spliced
			room  chan struct{}
			most  int32
			rests bool
		}{
			{still, calm, math.MaxInt32, true},
			{talk, talking, talkLeaving, false},
			{busy, bulk, talkLeaving, false},
		} {
			together := 0
			for _, s := range part.flows {
				if n := s.notTaken.Load(); n != nil && n.at.After(begin) && !n.isOver(time.Now()) {
					continue
				}
				if together++; part.rests && together > idleTogether*runtime.NumCPU() {
					together = 1
					select {
					case <-ctx.Done():
						return
					case <-g.Lost():
						return
					case <-time.After(idleRest):
					}
				}
				for moving.Load() >= part.most {
					select {
					case <-ctx.Done():
						return
					case <-g.Lost():
						return
					case <-time.After(time.Millisecond):
					}
				}
				select {
				case <-ctx.Done():
					return
				case <-g.Lost():
					return
				case part.room <- struct{}{}:
				}
				all.Add(1)
				srv.give(ctx, s, g, &moving, func(err error) {
					if err == nil {
						given.Add(1)
					} else {
						srv.log.Debug("a flow stays in this process", "id", s.flow.ID, "err", err)
					}
					<-part.room
					all.Done()
				})
			}
		}
	}
}

// notTaken is when a flow was last not taken by another process, and how often that was so before.
type notTaken struct {
	at    time.Time
	times int
}

// isOver reports whether the flow may be offered again.
func (n *notTaken) isOver(now time.Time) bool {
	return now.Sub(n.at) >= min(giveAgain<<min(n.times, 10), mostGiveAgain)
}

// again is n for a flow that was not taken once more.
func (n *notTaken) again(now time.Time) *notTaken {
	if n == nil {
		return &notTaken{at: now}
	}
	return &notTaken{now, n.times + 1}
}

// measureFlows are the flows that may be given, by whether they have moved nothing, little or much since the
// last time. Those that could not leave are busy. moved is what each had moved then, and has now.
func (srv *Server) measureFlows(moved map[*spliced]int64) (still, talk, busy []*spliced) {
	live := map[*spliced]bool{}
	for _, fl := range srv.flows.Live() {
		s, ok := fl.Killer.(*spliced)
		if !ok || s.isLeaving.Load() {
			continue
		}
		live[s] = true
		up, down := s.Load()
		before, isKnown := moved[s]
		moved[s] = up + down
		switch n := up + down - before; {
		case s.stays.Load():
			busy = append(busy, s)
		case isKnown && n == 0:
			still = append(still, s)
		case !isKnown || n <= calmBytes:
			talk = append(talk, s)
		default:
			busy = append(busy, s)
		}
	}
	maps.DeleteFunc(moved, func(s *spliced, _ int64) bool { return !live[s] })
	return still, talk, busy
}

// give gives s away, and calls over when it is known whose it is. moving counts it while it is on its way.
func (srv *Server) give(ctx context.Context, s *spliced, g giver, moving *atomic.Int32, over func(error)) {
	if s.isLeaving.Swap(true) {
		over(errors.New("it is on its way"))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, leaveWait)
	s.Leave(ctx, func(p *relay.Parcel, err error) {
		cancel()
		s.stays.Store(err != nil)
		if err != nil {
			s.isLeaving.Store(false)
			over(err)
			return
		}
		srv.handOver(s, p, g, moving, over)
	})
}

// handOver gives s, which has left as p, to g, unless it was killed meanwhile: then it ends here. It does not
// block.
func (srv *Server) handOver(s *spliced, p *relay.Parcel, g giver, moving *atomic.Int32, over func(error)) {
	stay := func(why error) {
		s.isLeaving.Store(false)
		srv.resume(s, p)
		over(why)
	}
	if why := s.Killed(); why != nil {
		go stay(why)
		return
	}
	moving.Add(1)
	r := s.record(p)
	r.IsKilled = func() bool { return s.Killed() != nil }
	g.Give(r, func(err error) {
		moving.Add(-1)
		if err != nil {
			s.notTaken.Store(s.notTaken.Load().again(time.Now()))
			stay(err)
			return
		}
		s.remove()
		if s.Killed() != nil { // just now: the other process learns it by its sockets
			tcpsock.ResetConn(p.Down.Conn)
			tcpsock.ResetConn(p.Up.Conn)
		}
		p.Down.Conn.Close()
		p.Up.Conn.Close()
		s.in.release()
		over(nil)
	})
}

// resume goes on with s, which had left.
func (srv *Server) resume(s *spliced, p *relay.Parcel) {
	srv.opts.Relay.Resume(srv.ctx, p, srv.relayOptions(s), s.ended)
}

// record is s, which has left as p, for another process.
func (s *spliced) record(p *relay.Parcel) *handover.Flow {
	r := s.describe()
	r.BytesUp, r.BytesDown, r.IdleSince = p.UpBytes, p.DownBytes, p.IdleSince
	r.Down, r.Up = handover.Side(p.Down), handover.Side(p.Up)
	return r
}

// describe is a record of s, but for what moves.
func (s *spliced) describe() *handover.Flow {
	fl := &s.flow
	r := &handover.Flow{ID: fl.ID, Listener: fl.Listener, Route: fl.Route, Name: fl.Name, Client: fl.Client,
		Downstream: fl.Downstream, Upstream: fl.Upstream, Target: fl.Target, Started: fl.Started, Shared: fl.Shared,
		Transparent: s.terms.transparent, Datapath: s.terms.datapath, Buffer: s.terms.buffer,
		IdleTimeout: s.terms.idle.Milliseconds(), Container: s.terms.container}
	if src := s.in.lease.Source(); src.IsValid() {
		r.Source = src.Addr().String()
	}
	r.SetUnknown(s.unknown)
	return r
}

// AdoptFlow is a [handover.Adopt] of flows of another process: they are counted and shown as before, and
// never refused for being too many. The configuration need not have their listener and route any more.
func (srv *Server) AdoptFlow(r *handover.Flow) (begin, forget func(), err error) {
	var source netip.Addr
	if r.Source != "" {
		if source, err = netip.ParseAddr(r.Source); err != nil {
			r.Close()
			return nil, nil, fmt.Errorf("its source: %w", err)
		}
	}
	if r.Transparent {
		// First: Close holds srv.mu until what is counted has ended.
		if err := srv.needReturnPath(); err != nil {
			r.Close()
			return nil, nil, fmt.Errorf("its target sees the client's own address: %w", err)
		}
	}
	if !srv.mayAdopt() {
		r.Close()
		return nil, nil, handover.ErrLeft
	}
	in := &conn{server: srv, lease: srv.limiter.Adopt(source), accepted: r.Started, stopCancel: func() bool { return true }}
	if srv.memoryRests.Load() && srv.memoryRests.CompareAndSwap(true, false) {
		srv.memoryWake.wake()
	}
	srv.notePort(tcpsock.AddrPortOf(r.Down.Conn.LocalAddr()).Port())
	s := srv.splice(in, flow.Flow{ID: r.ID, Listener: r.Listener, Route: r.Route, Name: r.Name, Client: r.Client,
		Shared: r.Shared, Downstream: r.Downstream, Upstream: r.Upstream, Target: r.Target, Started: r.Started,
		BeforeUp: r.BytesUp, BeforeDown: r.BytesDown},
		terms{r.Buffer, time.Duration(r.IdleTimeout) * time.Millisecond, r.Datapath, r.Transparent, r.Container},
		srv.balanceOf(r), r.Kept != nil)
	s.isLeaving.Store(true) // until it has come
	s.unknown = r.Unknown()
	drop := func() {
		s.remove()
		r.Close()
		in.release()
	}
	stop := context.AfterFunc(srv.ctx, drop) // before it is begun nobody else ends it
	begin = func() {
		if stop() {
			s.isLeaving.Store(false)
			srv.opts.Relay.Resume(srv.ctx, &relay.Parcel{Down: relay.ParcelSide(r.Down), Up: relay.ParcelSide(r.Up),
				UpBytes: r.BytesUp, DownBytes: r.BytesDown, IdleSince: r.IdleSince}, srv.relayOptions(s), s.ended)
		}
	}
	forget = func() {
		if !stop() {
			return
		}
		if s.Killed() != nil { // here, where it was known already: the other process learns it by its sockets
			tcpsock.ResetConn(r.Down.Conn)
			tcpsock.ResetConn(r.Up.Conn)
		}
		drop()
	}
	return begin, forget, nil
}

// adoption is whether flows of another process are taken.
type adoption struct {
	mu sync.Mutex
	// +checklocks:mu
	isOver bool
}

// mayAdopt counts one more connection, unless none is taken in any more.
func (srv *Server) mayAdopt() bool {
	srv.adoption.mu.Lock()
	defer srv.adoption.mu.Unlock()
	if !srv.adoption.isOver {
		srv.conns.Add(1)
	}
	return !srv.adoption.isOver
}

// end has no more flows taken.
func (a *adoption) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.isOver = true
}

// needReturnPath is for flows that go on with clients' own addresses, whatever the configuration has. The
// error says why answers to these would not come back here.
func (srv *Server) needReturnPath() error {
	if srv.returnPath.Load() != nil {
		return nil
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isClosed {
		return handover.ErrLeft
	}
	if srv.returnPathErr == nil {
		srv.openReturnPath(true)
	}
	return srv.returnPathErr
}
