package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
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
	srv.memory.Connected()
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
