package server

import (
	"errors"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// crowd is how many connections of a source are more than a client needs: each of them may then have few
// streams.
const crowd = 8

// retryAfter is in seconds, for those who were refused for what others, or they themselves, have under way.
const retryAfter = "2"

// requestLease is a vhost.Lease.
type requestLease struct {
	*limit.Lease
	server   *Server
	listener *listener
}

// charge counts the requests to l that are under way, in all and for whom they are from. A trusted hop that
// doesn't say for whom it speaks carries many clients, so its requests count in the total only, as its
// connections do.
func (srv *Server) charge(l *listener) func(*vhost.Visit) (vhost.Lease, error) {
	return func(v *vhost.Visit) (vhost.Lease, error) {
		lease, err := srv.requests.Acquire(netip.Addr{})
		if err != nil {
			return nil, srv.noRoom(l.name, v, err)
		}
		return &requestLease{lease, srv, l}, nil
	}
}

// requestWait is how long a request waits where its source has too many under way, behind requestsWaiting
// times as many as it may have: those who come from behind one address load their pages at the same time.
const (
	requestWait     = 2 * time.Second
	requestsWaiting = 3
)

func (q *requestLease) Name(v *vhost.Visit) error {
	source := visitorOf(v).Source()
	if err := q.server.deniedRequest(q.listener, v, v.Client.Addr()); err != nil {
		return err
	}
	if err := q.MoveSoon(v.Request.Context(), source, requestsWaiting, requestWait); err != nil {
		return q.server.noRoom(q.listener.name, v, err)
	}
	return nil
}

// noRoom is the answer to a request that is one too many.
func (srv *Server) noRoom(listener string, v *vhost.Visit, err error) error {
	srv.requestRefused(listener, v, overRequests, err)
	no := &vhost.Refusal{Status: http.StatusServiceUnavailable, Title: "Too many requests at once",
		Text: srv.node() + " can't take more requests at the moment.", Hint: "Try again in a few minutes.",
		Header: http.Header{"Retry-After": {retryAfter}}, Err: err}
	if errors.Is(err, limit.ErrSource) {
		no.Status, no.Title = http.StatusTooManyRequests, "Too many requests from your address"
		no.Text = srv.node() + " can't take more requests from your address at the same time."
		no.Hint = "Try again when some of them have ended."
	}
	return no
}
