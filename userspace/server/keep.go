package server

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/handover"
)

const (
	// keepAfter is how old a flow is that is kept for the time after a crash: most are over before that, and
	// cost nothing.
	keepAfter = time.Second
	// keepEvery is how often is looked for those that have become so old, while there are younger ones.
	keepEvery = keepAfter / 4
	// mostEndedKept is how many flows that have ended may be among those that are kept, beside as many as
	// live.
	mostEndedKept = 64
	// copyWait is how long a flow that is kept may be between two who move its bytes when a copy of it is
	// wanted: without one it would be kept no more, until the next look.
	copyWait = 100 * time.Millisecond
	// mostTries is how often a copy of a flow is tried.
	mostTries = 10
)

// flowKeeper is a [*handover.Queue].
type flowKeeper interface {
	Len() (flows int, isWhole bool)
	Put(flows iter.Seq[*handover.KeptFlow]) (kept int, err error)
	Renew(flows iter.Seq[*handover.KeptFlow]) (kept int, err error)
}

// keeping is how flows are kept for the process after a crash.
type keeping struct {
	isOn    atomic.Bool
	isAwake atomic.Bool  // a look is due anyhow
	room    atomic.Int64 // how many more of the kept flows may end before the next look
	woken   wakeup
	said    string // the last error
}

// wake has another look taken, unless one is due.
func (k *keeping) wake() {
	if k.isOn.Load() && !k.isAwake.Load() && k.isAwake.CompareAndSwap(false, true) {
		k.woken.wake()
	}
}

// ended counts a kept flow that has.
func (k *keeping) ended() {
	if k.room.Add(-1) < 0 {
		k.wake()
	}
}

// KeepFlows has q keep the flows of sni and tcp listeners that last, until ctx ends. While mayRenew is false
// there may be others in q than those that live here. While no flow begins or ends it does nothing.
func (srv *Server) KeepFlows(ctx context.Context, q flowKeeper, mayRenew func() bool) {
	k := &srv.keeping
	k.isOn.Store(true)
	defer k.isOn.Store(false)
	k.wake()
	pause := time.Duration(0) // there may be those that have come from another process
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.woken:
		}
		for again := true; again; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			pause = keepEvery
			k.isAwake.Store(false)
			if again = srv.keepNow(q, mayRenew()); again {
				k.isAwake.Store(true)
			}
		}
	}
}

// keepNow has q keep what is old enough. again: another look is due soon.
func (srv *Server) keepNow(q flowKeeper, mayRenew bool) (again bool) {
	k := &srv.keeping
	var kept, fresh []*spliced
	now := time.Now()
	for _, fl := range srv.flows.Live() {
		s, ok := fl.Killer.(*spliced)
		switch {
		case !ok || s.balance == nil || s.cannotKeep.Load():
		case s.isKept.Load():
			kept = append(kept, s)
		case s.isLeaving.Load() || now.Sub(fl.Started) < keepAfter:
			again = true
		default:
			fresh = append(fresh, s)
		}
	}
	queued, isWhole := q.Len()
	ended := queued - len(kept)
	if !mayRenew {
		again = true
	} else if !isWhole || ended > mostEndedKept && ended > len(kept) {
		all := append(kept, fresh...)
		sent := &sending{}
		n, err := q.Renew(sent.flows(all))
		if err == nil {
			for _, s := range all {
				s.isKept.Store(false)
			}
			again = sent.done(n) || again
			queued, kept, fresh = n, sent.all[:n], nil
		}
		k.say(srv, err)
	}
	if len(fresh) > 0 {
		sent := &sending{}
		n, err := q.Put(sent.flows(fresh))
		again = sent.done(n) || again
		queued, kept = queued+n, append(kept, sent.all[:n]...)
		k.say(srv, err)
	}
	k.room.Store(int64(max(mostEndedKept, queued/2) - (queued - len(kept))))
	for _, s := range kept {
		if s.isGone.Load() && k.room.Add(-1) < 0 { // it may not have known that it was kept
			return true
		}
	}
	return again
}

// say logs that not all flows are kept, once for each reason.
func (k *keeping) say(srv *Server, err error) {
	if err == nil || errors.Is(err, handover.ErrQueueClosed) || err.Error() == k.said {
		return
	}
	k.said = err.Error()
	srv.log.Warn("not all flows are kept for the time after a crash, which would cut those that are not", "err", err)
}

// sending are flows on their way to a flowKeeper.
type sending struct {
	all   []*spliced
	later bool // some can't go now
}

// flows are the records of all that can be kept now.
func (g *sending) flows(all []*spliced) iter.Seq[*handover.KeptFlow] {
	return func(yield func(*handover.KeptFlow) bool) {
		for _, s := range all {
			k, isLater := s.kept()
			g.later = g.later || isLater
			if k == nil {
				continue
			}
			g.all = append(g.all, s)
			if !yield(k) {
				return
			}
		}
	}
}

// done notes that the first n are kept. later: some are to be tried again.
func (g *sending) done(n int) (later bool) {
	for _, s := range g.all[:n] {
		s.isKept.Store(true)
	}
	return g.later
}

// kept is s for a [handover.Queue], or nil where it can't be, or not now.
func (s *spliced) kept() (k *handover.KeptFlow, isLater bool) {
	var down, up int
	var err error
	for end := time.Now().Add(copyWait); ; time.Sleep(time.Millisecond) {
		if down, up, err = s.Copies(); err == nil {
			break
		} else if s.isGone.Load() || !s.isKept.Load() || time.Now().After(end) {
			s.tries++
			s.cannotKeep.Store(s.tries > mostTries)
			return nil, s.tries <= mostTries
		}
	}
	r := s.describe()
	r.Kept = s.balance
	k = handover.NewKeptFlow(r, down, up)
	for _, fd := range []int{down, up} {
		if _, err := tcpsock.PositionOf(fd); err != nil {
			s.cannotKeep.Store(!errors.Is(err, syscall.ENOTCONN)) // it is no TCP
			k.Close()
			return nil, false
		}
	}
	return k, false
}

// beginning is the balance of a flow that begins, of which preface is to be written first; nil: it is not
// known. A socket that was dialled has written one byte, by the count of its kernel. What was read after the
// header is the flow's.
func (in *conn) beginning(preface []byte) *handover.Balance {
	if in.headerBytes < 0 || !in.server.opts.KeepsFlows {
		return nil
	}
	return &handover.Balance{Up: 1 + int64(len(preface)) - in.headerBytes, UpFrom: in.headerBytes}
}

// balanceOf is that of a flow that has come, whose bytes nobody moves; nil: it is not known.
func (srv *Server) balanceOf(r *handover.Flow) (b *handover.Balance) {
	if !srv.opts.KeepsFlows {
		return nil
	}
	var down, up tcpsock.Position
	err := errors.ErrUnsupported
	tcpsock.Control(r.Down.Conn, func(fd int) { down, err = tcpsock.PositionOf(fd) })
	if err != nil {
		return nil
	}
	tcpsock.Control(r.Up.Conn, func(fd int) { up, err = tcpsock.PositionOf(fd) })
	if err != nil {
		return nil
	}
	is := handover.BalanceOf(r, down, up)
	return &is
}
