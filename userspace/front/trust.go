package front

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// asker asks tailscaled who has an address, for one request, or for one connection
// before its requests. Each address is asked about once, so that all who want to
// know hear the same, and all of it together takes no longer than whoWait. It is
// not safe for concurrent use.
type asker struct {
	ctx     context.Context
	front   *Front
	trust   *plan.Peers // accept_proxy.from; nil: nobody
	header  bool        // a connection without a PROXY header is not believed, nor is it a client
	onLoop  bool        // it may not wait, and has the answers that are known already
	mustAsk bool        // it had no answer for that reason: nothing may be concluded
	until   time.Time
	answers []answer
}

type answer struct {
	addr netip.Addr
	id   tailnet.Identity
	err  error
}

const (
	// whoWait is how long tailscaled may take to say who somebody is, where
	// something depends on it.
	whoWait = 5 * time.Second
	// nameWait is how long it may take where nothing does: for a name to show.
	nameWait = time.Second
)

// WhoIs says who has an address. The error is a *plan.NotIdentifiedError, or wraps
// tailnet.ErrNotPeer.
func (q *asker) WhoIs(a netip.Addr) (tailnet.Identity, error) { return q.whoIsWithin(whoWait, a) }

// whoIsWithin is WhoIs for those who wait for a part of whoWait only: that they
// got no answer is not the answer that others get.
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
		q.front.watchTailnet.Do(func() { go q.front.tailnet.Run(q.front.ctx) })
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
		return q.front.tailnet.Known(a)
	}
	if q.until.IsZero() {
		q.until = time.Now().Add(whoWait)
	}
	ctx, cancel := context.WithDeadline(q.ctx, q.until.Add(wait-whoWait))
	defer cancel()
	return q.front.tailnet.WhoIs(ctx, a)
}

// Hop says whether accept_proxy.from names an address: who has it speaks for
// others, and is never a client. The error is a *plan.NotIdentifiedError.
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
	id, _ := q.front.tailnet.Known(a)
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
