package server

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// routeRequest finds the route of a request. certs is nil for http.
func (s *service) routeRequest(req *http.Request, host, path string, certs *tlsterm.Store) (*vhost.Route, error) {
	r, exactly, err := s.ByRequest(req, host, path)
	if by := s.passesBy(req, host, certs); by != "" {
		return nil, &passesByError{by, host}
	}
	switch {
	case err != nil:
		return nil, err
	case !exactly && coalesced(req, host, certs):
		return nil, vhost.ErrMisdirected
	case r.Reject:
		return nil, vhost.ErrRejected
	}
	return r.HTTP.Route, nil
}

// coalesced says whether a browser sends the request on a connection that it has made for another name,
// because their certificate is the same. A connection for this name might have led elsewhere: edges choose by
// the name in the hello. So only a route for the very name takes such requests.
func coalesced(req *http.Request, host string, certs *tlsterm.Store) bool {
	if certs == nil || req.ProtoMajor < 2 || req.TLS == nil {
		return false
	}
	asked := certs.Asked(req.TLS.ServerName)
	return asked != "" && asked != host && certs.Shared(asked, host)
}

type passesByError struct{ edge, host string }

func (e *passesByError) Error() string {
	return fmt.Sprintf("%v: the sni listener %s, by which it may have come, does not let everybody have %s",
		vhost.ErrMisdirected, e.edge, e.host)
}
func (e *passesByError) Unwrap() error { return vhost.ErrMisdirected }

// passesBy names the sni listener of this daemon that a request goes round: its connection may have come by
// that, with a name in its hello by which it was let through, and the request is for a host whose name would
// not have been, or only for some. A client comes again with a connection of its own then.
func (s *service) passesBy(req *http.Request, host string, certs *tlsterm.Store) (listener string) {
	if len(s.edges) == 0 || certs == nil || req.TLS == nil {
		return ""
	}
	asked := certs.Asked(req.TLS.ServerName)
	if asked == host || !fromHere(req) {
		return ""
	}
	for _, edge := range s.edges {
		by := edge.service.Load()
		if by == nil {
			continue // a reload has just made it, and nobody has come by it
		}
		came, needs := by.ByName(asked), by.ByName(host)
		if came == nil || came.Reject || came == needs {
			continue // that is not the way by which it came, or it is the same
		}
		if needs == nil || needs.Reject || needs.Allow != nil {
			return edge.name
		}
	}
	return ""
}

// fromHere says whether the other end of a request's connection is this host itself.
func fromHere(req *http.Request) bool {
	peer, err := netip.ParseAddrPort(req.RemoteAddr)
	local, ok := req.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return err == nil && (peer.Addr().IsLoopback() || ok && tcpsock.AddrPortOf(local).Addr() == peer.Addr().Unmap())
}

// completeUpstream sets in up, where the requests of r go, what dials it and watches it.
func (srv *Server) completeUpstream(listener string, r *plan.Rule, up *vhost.Upstream) {
	up.Dial = func(ctx context.Context) (net.Conn, error) {
		info, _ := vhost.Info(ctx)
		up, err := srv.dialUpstream(ctx, listener, r, requesterOf(ctx))
		if err != nil {
			srv.limited.Warn("dial "+r.Written, "upstream can't be reached", "id", info.ID, "listener", listener, "route", r.Name, "target", r.Written, "client", info.Client, "err", err)
			return nil, pageReason(err)
		}
		if r.SendProxy {
			h := proxyheader.Header{Source: info.Client, Destination: info.Local, ServerName: info.ServerName, ID: info.ID}
			if !vhost.MayTell(info.Client.Addr(), info.Unknown) {
				h.Source = netip.AddrPort{} // as in proxyHeader
			}
			if _, err := up.Write(h.Append(nil)); err != nil {
				up.Close()
				return nil, fmt.Errorf("send the PROXY header: %w", err)
			}
		}
		return up, nil
	}
	up.IsFault = func(err error) bool { return isFault(r, err) }
	up.Refuses = func() error {
		if err := srv.disabled.Check(r.To, r.Written); err != nil {
			return pageReason(err)
		}
		return nil
	}
	if name := containerOf(r); name != "" {
		up.Using = func() func() { return srv.wakes.begin(name) }
	}
	if r.Hold > 0 {
		up.Watch = &vhost.Watch{Soon: holdFirst, Late: max(r.Hold, holdFirst), Unheard: unheard}
	}
}

// requesterOf is who a request is from: ctx is what an upstream's Dial gets.
func requesterOf(ctx context.Context) plan.Visitor {
	info, _ := vhost.Info(ctx)
	return plan.Visitor{Client: info.Client.Addr(), Unknown: info.Unknown}
}

// unheard says whether something that c has sent is not acknowledged, and its other end has acknowledged
// nothing for d.
func unheard(c net.Conn, d time.Duration) (silent bool) {
	tcpsock.Control(c, func(fd int) { silent = tcpsock.IsUnheard(fd, d) })
	return silent
}
