package server

import (
	"context"
	"errors"
	"iter"
	"slices"
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
	// Flows that have ended stay in the queue until it is renewed: at once where more than mostEndedKept
	// have, and more than live, and else renewEvery, or so many times what that takes.
	mostEndedKept = 64
	renewEvery    = 10 * time.Second
	renewRest     = 100
	// copyWait is how long a flow that is kept may be between two who move its bytes when a copy of it is
	// wanted: without one it would be kept no more, until the next look.
	copyWait = 100 * time.Millisecond
	// mostTries is how often a copy of a flow is tried.
	mostTries = 10
)

// flowKeeper is a [*handover.Queue].
type flowKeeper interface {
	Len() (flows int, isWhole bool)
	Put(flows iter.Seq2[*handover.KeptFlow, error]) (kept int, err error)
	Renew(flows iter.Seq2[*handover.KeptFlow, error], least int) (kept int, err error)
}

// keeping is how flows are kept for the process after a crash.
type keeping struct {
	isOn     atomic.Bool
	isAwake  atomic.Bool // a look is due soon
	hasEnded atomic.Bool // a kept flow has, which the next look knows
	isShort  atomic.Bool // of memory, of which flows that have ended hold some
	woken    wakeup

	said    string    // the last error
	renewed time.Time // when that was tried last
	failed  bool      // it was not done then
	rest    time.Duration
}

// wake has another look taken, unless one is due.
func (k *keeping) wake() {
	if k.isOn.Load() && !k.isAwake.Load() && k.isAwake.CompareAndSwap(false, true) {
		k.woken.wake()
	}
}

// ended notes that a kept flow has.
func (k *keeping) ended() {
	if !k.hasEnded.Swap(true) {
		k.wake()
	}
}

// giveBack has the sockets of kept flows that have ended closed soon: until then the kernel does not take
// them for orphans, which it bounds.
func (k *keeping) giveBack() {
	if k.hasEnded.Load() && !k.isShort.Swap(true) {
		k.wake()
	}
}

// KeepFlows has q keep the flows of sni and tcp listeners that last, until ctx ends. While mayRenew is false
// there may be others in q than those that live here. While no flow begins or ends it does nothing.
func (srv *Server) KeepFlows(ctx context.Context, q flowKeeper, mayRenew func() bool) {
	k := &srv.keeping
	k.isOn.Store(true)
	defer k.isOn.Store(false)
	for timer := time.NewTimer(0); ; { // there may be flows that have come from another process
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-k.woken:
			timer.Reset(keepEvery)
			continue
		case <-timer.C:
		}
		k.isAwake.Store(false)
		if next := srv.keepNow(q, mayRenew(), time.Now()); next > 0 {
			timer.Reset(next)
		}
	}
}

// keepNow has q keep what is old enough. next is when another look is due; 0: when a flow begins or ends.
func (srv *Server) keepNow(q flowKeeper, mayRenew bool, now time.Time) (next time.Duration) {
	k := &srv.keeping
	k.hasEnded.Store(false)
	isShort := k.isShort.Swap(false)
	var kept, fresh []*spliced
	again := !mayRenew
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
	if mayRenew && k.isDue(now, ended, len(kept), isWhole, isShort) {
		all, had := append(kept, fresh...), len(kept)
		sent, began := &sending{}, time.Now()
		n, err := q.Renew(sent.flows(all), had)
		k.failed = err != nil && (n < had || n == 0)
		k.renewed, k.rest = now, max(renewEvery, renewRest*time.Since(began))
		if !k.failed {
			for _, s := range all {
				s.isKept.Store(false)
			}
			again = sent.done(n) || again
			queued, kept, fresh, isWhole = n, sent.all[:n], nil, true
		}
		k.say(srv, err)
	}
	// Where so many have ended and it could not be renewed, there are not to be more.
	if len(fresh) > 0 && queued-len(kept) <= max(mostEndedKept, len(kept)) {
		sent := &sending{}
		n, err := q.Put(sent.flows(fresh))
		again = sent.done(n) || again
		queued, kept = queued+n, append(kept, sent.all[:n]...)
		k.say(srv, err)
	}
	if queued > len(kept) || slices.ContainsFunc(kept, func(s *spliced) bool { return s.isGone.Load() }) {
		k.hasEnded.Store(true) // it may not have known that it was kept
	}
	switch {
	case again:
		return keepEvery
	case k.hasEnded.Load(), !isWhole:
		return max(k.renewed.Add(k.rest).Sub(now), keepEvery)
	}
	return 0
}

// isDue reports whether the queue is to be renewed.
func (k *keeping) isDue(now time.Time, ended, kept int, isWhole, isShort bool) bool {
	switch rested := now.Sub(k.renewed); {
	case isWhole && ended <= 0:
		return false
	case rested >= max(k.rest, renewEvery):
		return true
	case k.failed:
		return false
	case isShort && rested >= k.rest/renewRest*20:
		return true
	}
	return ended > mostEndedKept && ended > kept
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

// flows are the records of all that can be kept now, up to an error that all others would have.
func (g *sending) flows(all []*spliced) iter.Seq2[*handover.KeptFlow, error] {
	return func(yield func(*handover.KeptFlow, error) bool) {
		for _, s := range all {
			k, isLater, err := s.kept()
			g.later = g.later || isLater || err != nil
			if err != nil {
				yield(nil, err)
				return
			}
			if k == nil {
				continue
			}
			g.all = append(g.all, s)
			if !yield(k, nil) {
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

// kept is s for a [handover.Queue], or nil where it can't be, or not now. An error is that of all flows:
// there are no descriptors.
func (s *spliced) kept() (k *handover.KeptFlow, isLater bool, err error) {
	var down, up int
	for end := time.Now().Add(copyWait); ; time.Sleep(time.Millisecond) {
		if down, up, err = s.Copies(); err == nil {
			break
		} else if outOfResources(err) {
			return nil, true, err
		} else if s.isGone.Load() || !s.isKept.Load() || time.Now().After(end) {
			s.tries++
			s.cannotKeep.Store(s.tries > mostTries)
			return nil, s.tries <= mostTries, nil
		}
	}
	r := s.describe()
	r.Kept = s.balance
	k = handover.NewKeptFlow(r, down, up)
	for _, fd := range []int{down, up} {
		if _, err := tcpsock.PositionOf(fd); err != nil {
			s.cannotKeep.Store(!errors.Is(err, syscall.ENOTCONN)) // it is no TCP
			k.Close()
			return nil, false, nil
		}
	}
	return k, false, nil
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
