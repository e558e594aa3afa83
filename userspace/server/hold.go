package server

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

const (
	// heldMost bounds the requests that wait, in all, and heldPerSource those of one visitor: who reloads a
	// page doesn't queue up for ever, nor take the places of others.
	heldMost      = 256
	heldPerSource = 32
	// holdFirst bounds the first try, which is often the only one.
	holdFirst = 4 * time.Second
	// holdTry bounds each further try: one that began before the node was back would wait for TCP's next,
	// later and later, repetition.
	holdTry = 2 * time.Second
	// holdPause is between tries that fail at once, and how often it is looked whether the client still
	// waits.
	holdPause = 250 * time.Millisecond
)

// dialUpstream connects to the upstream of a request. Where the route has hold, the request waits for a node
// that does not answer as long as the tailnet knows it, nothing of the request's body has been read, and the
// client is there.
func (srv *Server) dialUpstream(ctx context.Context, listener string, r *plan.Rule, who plan.Visitor) (net.Conn, error) {
	if r.HTTP.Hold == 0 {
		return srv.dialRule(ctx, listener, r, who)
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the dial
		tick := time.NewTicker(holdPause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if vhost.ClientLeft(ctx) {
					cancel()
				}
			}
		}
	}()
	first, done := context.WithTimeout(ctx, holdFirst)
	up, err := srv.dialRule(first, listener, r, who)
	done()
	if err == nil || !mayComeBack(err) || time.Since(began) >= r.HTTP.Hold {
		return up, err
	}
	place, full := srv.heldBy.Acquire(who.Source())
	if full != nil {
		srv.limited.Warn("hold_source", "too many requests of one source wait for nodes that do not answer: this one gets the error page at once", "listener", listener, "route", r.Name, "client", who.Client, "waiting", heldPerSource)
		return nil, err
	}
	defer place.Release()
	if srv.held.Add(1) > heldMost {
		srv.held.Add(-1)
		srv.limited.Warn("hold", "too many requests wait for nodes that do not answer: this one gets the error page at once", "listener", listener, "route", r.Name, "waiting", heldMost)
		return nil, err
	}
	defer srv.held.Add(-1)
	srv.limited.Warn("held "+r.Written, "a request waits for a node that does not answer", "listener", listener, "route", r.Name, "target", r.Written, "hold", r.HTTP.Hold.String(), "err", err)
	until := time.NewTimer(r.HTTP.Hold - time.Since(began))
	defer until.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, err
		case <-until.C:
			return nil, err
		case <-time.After(holdPause):
		}
		try, done := context.WithTimeout(ctx, min(holdTry, max(holdPause, r.HTTP.Hold-time.Since(began))))
		up, again := srv.deps.Dialer.Dial(try, r.To, who.Client)
		done()
		if again == nil {
			srv.targets.Made(r.Written)
			return up, nil
		}
		srv.targets.Note(r.Written, again)
		if ctx.Err() == nil && !mayComeBack(again) {
			return nil, again
		}
	}
}

// mayComeBack says whether an error of dialling a node is that of one which is known and does not answer:
// asleep, between networks, or starting.
func mayComeBack(err error) bool {
	de, ok := errors.AsType[*dial.Error](err)
	if !ok {
		return false
	}
	switch de.Reason {
	case dial.NodeOffline, dial.Timeout, dial.Unreachable, dial.Refused:
		return true
	}
	return false
}
