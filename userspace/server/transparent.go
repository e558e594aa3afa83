package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/transparent"
)

// clientUnknown is the reason where a hop speaks for somebody, and doesn't say for whom.
const clientUnknown = "client_unknown"

// openReturnPath makes sure that answers to clients' own addresses come back here, if that is wanted. What
// was opened stays to the end: flows that a reload leaves alone need it.
//
// +checklocks:srv.mu
func (srv *Server) openReturnPath(wanted bool) {
	srv.returnPathErr = nil
	if srv.returnPath.Load() != nil || !wanted {
		return
	}
	path, err := transparent.Open(srv.log)
	if err != nil {
		srv.log.Warn("transparent does not work here: targets see this host's address instead of the client's", "err", err)
		srv.returnPathErr = fmt.Errorf("transparent does not work here: %w", err)
		return
	}
	srv.returnPath.Store(path)
}

func (srv *Server) closeReturnPath() {
	if path := srv.returnPath.Swap(nil); path != nil {
		if err := path.Close(); err != nil {
			srv.log.Warn("the rules for transparent could not be removed: `ip rule` and `nft list tables` show them", "err", err)
		}
	}
}

// dialTransparent connects to r's target from the client's own address, where that can be. Where it can't the
// target sees this host, and the reason is counted.
func (srv *Server) dialTransparent(ctx context.Context, listener string, r *plan.Rule, who plan.Visitor) (net.Conn, error) {
	path, client := srv.returnPath.Load(), who.Client
	fits := func(to netip.Addr) error {
		if who.Unknown != nil {
			return who.Unknown
		}
		return path.Fits(client, to)
	}
	d := *r.Dialer
	d.AsClient = true
	var asked atomic.Bool // some address was asked to answer the client
	d.From = func(nd *net.Dialer, to netip.Addr) {
		if fits(to) == nil {
			asked.Store(true)
			transparent.From(nd, client)
		}
	}
	up, err := d.Dial(ctx, r.To, client)
	if err != nil {
		if de, ok := errors.AsType[*dial.Error](err); ok && de.Reason == dial.Timeout && asked.Load() {
			return nil, fmt.Errorf("%w; with transparent it answers %s directly: that works only if this host is its default gateway on the network that it is reached through", err, client)
		}
		return nil, err
	}
	if tcpsock.AddrPortOf(up.LocalAddr()).Addr() == client.Unmap() {
		return up, nil
	}
	reason, why := clientUnknown, fits(tcpsock.AddrPortOf(up.RemoteAddr()).Addr())
	if te, ok := errors.AsType[*transparent.Error](why); ok {
		reason = string(te.Reason)
	}
	srv.metrics.NotTransparent.WithLabelValues(listener, reason).Inc()
	srv.limited.Warn("not_transparent "+reason, "the target sees this host's address instead of the client's", "listener", listener, "route", r.Name, "target", r.Written, "client", client, "reason", reason, "err", why)
	return up, nil
}
