package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/announce"
	"github.com/tailsplice/tailsplice/userspace/config"
)

// tellOthers has the announcers tell whether their listeners should get connections. A process that another
// one has not handed over to yet, or that has handed over, tells nothing.
//
// +checklocks:srv.mu
func (srv *Server) tellOthers() {
	if srv.isHeld || srv.isPaused || srv.hasLeft || srv.plan == nil {
		return
	}
	left := srv.announced
	srv.announced = nil
	var fresh []*announce.Announcer
	for _, c := range srv.plan.Config.Listeners {
		l := srv.listeners[c.Name]
		switch {
		case c.Announce == nil && l.announcer != nil:
			srv.endAnnouncer(l.announcer, "announce is no longer configured")
			l.announcer = nil
		case c.Announce != nil && l.announcer == nil:
			l.announcer = announce.New(srv.log)
			fresh = append(fresh, l.announcer)
			if i := slices.IndexFunc(left, announceSpec(c).Continues); i >= 0 {
				l.announcer.Inherit(left[i])
				left = slices.Delete(left, i, i+1)
			}
		}
	}
	for _, spec := range left {
		a := announce.New(srv.log)
		a.Inherit(spec)
		a.Set(spec, false, "")
		srv.endAnnouncer(a, "the listener is no longer configured")
	}
	for _, a := range fresh {
		a.After(srv.withdrawn)
	}
	for _, c := range srv.plan.Config.Listeners {
		if c.Announce == nil {
			continue
		}
		l, reason := srv.listeners[c.Name], ""
		why := srv.notServing(c, l)
		if why != nil {
			reason = why.Error()
		}
		l.announcer.Set(announceSpec(c), why == nil, reason)
	}
}

// endAnnouncer has a withdraw what it has announced. Announcers that begin later wait for that: theirs may be
// an announcement of the same, by other programs for a listener of another name.
//
// +checklocks:srv.mu
func (srv *Server) endAnnouncer(a *announce.Announcer, reason string) {
	before, done := srv.withdrawn, make(chan struct{})
	srv.withdrawn = done
	go func() {
		defer close(done)
		a.End(reason)
		if before != nil {
			<-before
		}
	}()
}

// Withdrawn waits until what is no longer configured to be announced is withdrawn, or could not be: another
// process may announce the same. An error is that ctx has ended before.
func (srv *Server) Withdrawn(ctx context.Context) error {
	srv.mu.Lock()
	withdrawn := srv.withdrawn
	srv.mu.Unlock()
	if withdrawn == nil {
		return nil
	}
	select {
	case <-withdrawn:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-withdrawn: // both are over
		return nil
	default:
		return fmt.Errorf("an announcement is still being withdrawn: %w", context.Cause(ctx))
	}
}

func announceSpec(c *config.Listener) announce.Spec {
	a := c.Announce
	return announce.Spec{Listener: c.Name, File: a.File, Up: a.Up, Down: a.Down, Timeout: a.Timeout}
}

// notServing is why l should get no connections, or nil. Certificates are no reason: those of another edge
// have most likely the same problem.
//
// +checklocks:srv.mu
func (srv *Server) notServing(c *config.Listener, l *listener) error {
	switch {
	case srv.isEnding || srv.isClosed:
		return errors.New("the daemon ends")
	case !l.drained.IsZero():
		return errors.New("the listener is drained")
	case c.WhileDown == whileDownClose && l.isShut:
		if err := l.gate.closed(); err != nil {
			return err
		}
		return errUnchecked
	}
	for lacking, err := range srv.unbound {
		if lacking.listener == c.Name {
			return err
		}
	}
	if len(srv.tailnetAddrs) == 0 && srv.tailnetErr != nil && slices.ContainsFunc(c.Listen, config.OnTailnet) {
		return srv.tailnetErr
	}
	if len(srv.boundOf(l)) == 0 {
		return errors.New("none of its addresses is bound")
	}
	return nil
}

// bequeath gives the announcers of listeners that c replaces to those that come in their place. Each other
// announcement ends.
//
// +checklocks:srv.mu
func (srv *Server) bequeath(c *change) {
	for name, old := range srv.listeners {
		if old.announcer == nil || c.listeners[name] == old {
			continue
		}
		spec := old.announcer.Spec()
		for _, next := range c.plan.Config.Listeners {
			if heir := c.listeners[next.Name]; next.Announce != nil && heir.announcer == nil && old.announcer != nil &&
				announceSpec(next).Continues(spec) {
				heir.announcer, old.announcer = old.announcer, nil
			}
		}
		if old.announcer != nil {
			srv.endAnnouncer(old.announcer, "the listener is no longer configured")
		}
	}
}

// linger has a listener that was drained at since go on accepting, until what it returns is over: its
// announcement, which tellOthers is to withdraw before, is withdrawn then, and its grace is over. Where that
// has begun in another process, the rest is left.
//
// +checklocks:srv.mu
func (srv *Server) linger(l *listener, since time.Time) func() {
	grace := srv.grace(l)
	if grace == 0 && !l.lingers {
		return func() {}
	}
	l.lingers = true
	a, until := l.announcer, l.until
	return func() {
		rest := grace
		if until.IsZero() {
			if a != nil {
				a.Wait(srv.ctx)
			}
			until = time.Now().Add(grace)
			srv.mu.Lock()
			if l.lingers && l.drained.Equal(since) {
				l.until = until
			}
			srv.mu.Unlock()
		} else if rest = time.Until(until); grace > 0 {
			rest = min(rest, grace) // until is of the wall clock, which may have been set back
		}
		sleep(srv.ctx, rest)
		srv.mu.Lock()
		defer srv.mu.Unlock()
		if l.lingers && l.drained.Equal(since) {
			l.lingers, l.until = false, time.Time{}
			srv.rebindNow(srv.tailnetErr)
		}
	}
}

// lingerOn goes on with what linger has begun in another process.
//
// +checklocks:srv.mu
func (srv *Server) lingerOn() {
	for _, l := range srv.listeners {
		if l.lingers {
			go srv.linger(l, l.drained)()
		}
	}
}

// grace is how long l accepts connections after its announcement is withdrawn; 0 where it is not announced.
//
// +checklocks:srv.mu
func (srv *Server) grace(l *listener) time.Duration {
	if l.announcer == nil {
		return 0
	}
	isUp, _, _ := l.announcer.State()
	for _, c := range srv.plan.Config.Listeners {
		if c.Name == l.name && c.Announce != nil && (isUp || l.lingers) {
			return c.Announce.Grace
		}
	}
	return 0
}

// sleep waits, unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Withdraw withdraws all announcements, and accepts connections until others know that and the grace of each
// listener is over, or ctx ends.
func (srv *Server) Withdraw(ctx context.Context) {
	defer srv.stopAccepting()
	srv.mu.Lock()
	if srv.hasLeft || srv.isHeld || srv.plan == nil {
		srv.mu.Unlock()
		return
	}
	graces := map[*announce.Announcer]time.Duration{}
	for _, l := range srv.listeners {
		if l.announcer != nil && !srv.isEnding {
			graces[l.announcer] = srv.grace(l)
		}
	}
	srv.isEnding = true
	srv.tellOthers()
	srv.mu.Unlock()
	var all sync.WaitGroup
	for a, grace := range graces {
		all.Go(func() {
			a.Wait(ctx)
			sleep(ctx, grace)
		})
	}
	all.Wait()
}

// endAnnouncements withdraws what is announced, and waits until others know, or could not be told; what is
// another process's stays.
func (srv *Server) endAnnouncements() {
	srv.mu.Lock()
	var all sync.WaitGroup
	isOurs := !srv.hasLeft && !srv.isHeld && !srv.isPaused
	withdrawn := srv.withdrawn
	srv.isEnding = srv.isEnding || isOurs
	for _, l := range srv.listeners {
		switch a := l.announcer; {
		case a == nil:
		case isOurs:
			all.Go(func() { a.End("the daemon ends") })
		default:
			a.Leave()
		}
	}
	srv.mu.Unlock()
	all.Wait()
	if isOurs && withdrawn != nil {
		<-withdrawn
	}
}
