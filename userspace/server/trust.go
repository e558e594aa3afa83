package server

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// asker asks tailscaled who has an address, for one request, or for one connection before its requests. Each
// address is asked about once, so that all who want to know hear the same, and all of it together takes no
// longer than whoWait. It is not safe for concurrent use.
type asker struct {
	ctx         context.Context
	server      *Server
	trust       *plan.Peers // accept_proxy.from; nil: nobody
	needsHeader bool        // a connection without a PROXY header is not believed, nor is it a client
	onLoop      bool        // it may not wait, and has the answers that are known already
	mustAsk     bool        // it had no answer for that reason: nothing may be concluded
	until       time.Time
	answers     []answer
}

type answer struct {
	addr netip.Addr
	id   tailnet.Identity
	err  error
}

const (
	// whoWait is how long tailscaled may take to say who somebody is, where something depends on it.
	whoWait = 5 * time.Second
	// nameWait is how long it may take where nothing does: for a name to show.
	nameWait = time.Second
)

// WhoIs says who has an address. The error is a *plan.NotIdentifiedError, or wraps tailnet.ErrNotPeer.
func (q *asker) WhoIs(a netip.Addr) (tailnet.Identity, error) { return q.whoIsWithin(whoWait, a) }

// whoIsWithin is WhoIs for those who wait for a part of whoWait only: that they got no answer is not the
// answer that others get.
func (q *asker) whoIsWithin(wait time.Duration, a netip.Addr) (tailnet.Identity, error) {
	for i := range q.answers {
		if q.answers[i].addr == a {
			return q.answers[i].id, q.answers[i].err
		}
	}
	id, err := q.ask(wait, a)
	switch {
	case err == nil:
		// Who asks once asks again: from now on tailscaled is followed instead.
		q.server.watchTailnet.Do(func() { go q.server.tailnet.Run(q.server.ctx) })
	case !errors.Is(err, tailnet.ErrNotPeer):
		q.mustAsk = q.mustAsk || err == tailnet.ErrMustAsk
		err = &plan.NotIdentifiedError{Addr: a, Err: err}
		if q.onLoop || wait < whoWait {
			return id, err
		}
	}
	q.answers = append(q.answers, answer{a, id, err})
	return id, err
}

func (q *asker) ask(wait time.Duration, a netip.Addr) (tailnet.Identity, error) {
	if q.onLoop {
		return q.server.tailnet.Known(a)
	}
	if q.until.IsZero() {
		q.until = time.Now().Add(whoWait)
	}
	ctx, cancel := context.WithDeadline(q.ctx, q.until.Add(wait-whoWait))
	defer cancel()
	return q.server.tailnet.WhoIs(ctx, a)
}

// Hop says whether accept_proxy.from names an address: who has it speaks for others, and is never a client.
// The error is a *plan.NotIdentifiedError.
func (q *asker) Hop(a netip.Addr) (bool, error) {
	if q.trust == nil {
		return false, nil
	}
	return q.trust.Contains(a, q.WhoIs)
}

// name is that of the node which has an address, if it is known already; else "".
func (q *asker) name(a netip.Addr) string {
	for i := range q.answers {
		if q.answers[i].addr == a {
			return q.answers[i].id.Node
		}
	}
	id, _ := q.server.tailnet.Known(a)
	return id.Node
}

// Describe says who has an address, for the log.
func (q *asker) Describe(a netip.Addr) string {
	if !tailnet.Contains(a) {
		return a.String() + " (not a tailnet address)"
	}
	id, err := q.whoIsWithin(nameWait, a)
	if err != nil {
		return fmt.Sprintf("%s (tailscaled can't say who it is: %v)", a, err)
	}
	return describe(id)
}

func describe(id tailnet.Identity) string {
	if len(id.Tags) > 0 {
		return id.Node + " (" + strings.Join(id.Tags, ", ") + ")"
	}
	return id.Node + " (" + id.User + ")"
}

var errStranger = errors.New("PROXY header from a peer that accept_proxy.from does not name")

type strangerError struct{ who string }

func (e *strangerError) Error() string { return errStranger.Error() + ": " + e.who }

func (e *strangerError) Unwrap() error { return errStranger }

var errNoHeader = errors.New("no PROXY header: a tcp listener with accept_proxy, or one with accept_proxy.required, needs one on each connection (send_proxy: v2 at the previous hop)")

// shared reports whether many clients may be behind in's: where a trusted hop does not say whom it speaks
// for, and where it comes from one that another listener trusts, or from a node of the tailnet, which
// strangers are not. What one of them holds must not be another's fault: then each connection counts for
// itself.
func (in *conn) shared() bool {
	if in.unknown != nil {
		return true
	}
	return in.server.mayBeMany(in.client.Addr())
}

// mayBeMany reports whether many clients may be behind an address, as shared says.
func (srv *Server) mayBeMany(a netip.Addr) bool {
	hop, _ := srv.hops.Load().Contains(a, func(netip.Addr) (tailnet.Identity, error) { return tailnet.Identity{}, tailnet.ErrNotPeer })
	return hop || tailnet.Contains(a)
}

// hopsOf are all whom accept_proxy.from names.
func hopsOf(cfg *config.Config) *plan.Peers {
	var from []string
	for _, l := range cfg.Listeners {
		if a := l.AcceptProxy; a != nil {
			from = append(from, a.From...)
		}
	}
	return plan.NewPeers(from)
}
