package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// httpServer serves one http or https listener. It lives as long as the listener, over reloads: kept-alive
// connections go on, with the new routes.
type httpServer struct {
	server *Server
	vhost  *vhost.Server
	hasTLS bool
	stop   context.CancelFunc // ends the watch over certificate files
}

// newHTTPServer starts the server of l, which has its first service. certs is nil for http.
func (srv *Server) newHTTPServer(l *listener, certs *tlsterm.Store) *httpServer {
	ctx, stop := context.WithCancel(srv.ctx)
	o := vhost.Options{Node: srv.node(), Log: srv.log, Answer: srv.acme.ServeChallenge, Count: srv.account(l), OnRequest: func(r vhost.Request) { srv.requestEnded(l, r) }, Charge: srv.charge(l), Guard: srv.listenerGuard(l),
		Route: func(r *http.Request, host, path string) (*vhost.Route, error) {
			return l.service.Load().routeRequest(r, host, path, certs)
		},
		ByPath: func(host string) bool { return l.service.Load().RoutesByPath(host) },
		HSTS:   func() string { return l.service.Load().HSTS }, Timing: func() bool { return l.service.Load().Timing }}
	if certs != nil {
		o.TLS = srv.answeringChallenges(l.askingClients(certs.Config()))
		go certs.Run(ctx)
	}
	return &httpServer{server: srv, vhost: vhost.New(o), hasTLS: certs != nil, stop: stop}
}

// pageReason gives an error of dialling the reason that chooses its page: what is known and not there now is
// another thing than what does not answer.
func pageReason(err error) error {
	de, ok := errors.AsType[*dial.Error](err)
	if !ok {
		return err
	}
	switch de.Reason {
	case dial.NodeOffline:
		return vhost.FailAbsent(de.Seen, err)
	case dial.UnknownNode, dial.ContainerStopped, dial.ContainerStarting, dial.ContainerNotStarted, dial.UnknownContainer, dial.AmbiguousContainer,
		dial.NoSocket, dial.Exhausted, dial.OffByHand:
		return vhost.Fail(vhost.ReasonAbsent, err)
	case dial.Timeout:
		return vhost.Fail(vhost.ReasonTimeout, err)
	case dial.Refused:
		return vhost.Fail(vhost.ReasonRefused, err)
	}
	return vhost.Fail(vhost.ReasonUnreachable, err)
}

// errFinalDot says what nobody can answer who terminates TLS with crypto/tls: it refuses the hello with
// decode_error, and what it reads can't be changed on the way, for both sides hash the very bytes
// (golang.org/issue/63117).
var errFinalDot = errors.New("the client sent the name with a dot at its end, which TLS forbids (RFC 6066 section 3): open the address without it")

// serve serves in until it is closed. It owns in.
func (h *httpServer) serve(in *stream) {
	srv := h.server
	if h.hasTLS {
		// What sni can't read is crypto/tls's to judge, from the same bytes and within the same time.
		hello, head, err := in.readHello()
		in.ahead = head
		if err == nil && hello.FinalDot {
			in.name = hello.ServerName
			srv.refuseHello(in, hello, errFinalDot)
			return
		}
	}
	fl := &flow.Flow{ID: in.id, Listener: in.listener.name, Route: "by request", Name: in.name,
		Client: in.client.String(), Shared: in.shared(), Downstream: in.peer.String(), Target: "by request", Datapath: func() string { return userspace },
		Account: srv.flows.Account(in.listener.name, ""), // which a request has of its route
		Started: in.accepted, Bytes: func() (up, down int64) { return in.bytesIn.Load(), in.bytesOut.Load() }, Held: in.held, Killer: in}
	srv.flows.Add(fl)
	err := h.vhost.ServeConn(in, in.arrived)
	srv.flows.Remove(fl)
	srv.endKilled(fl, in)
	if err != nil {
		srv.noteRefused(in.listener.name, "tls_handshake", "the TLS handshake failed", "id", in.id, "listener", in.listener.name, "client", in.client, "reason", "tls_handshake", "err", err)
	}
}

// shutdown lets requests end until ctx does.
func (h *httpServer) shutdown(ctx context.Context) {
	h.vhost.Shutdown(ctx)
	h.stop()
}

// close ends all connections at once.
func (h *httpServer) close() {
	h.vhost.Close()
	h.stop()
}

// Info tells vhost who is at the other end.
func (in *conn) Info() vhost.ConnInfo {
	return vhost.ConnInfo{Client: in.client, Peer: in.peer, Local: in.local, Unknown: in.unknown, Crowded: in.lease.Count() > crowd, ID: in.id, ServerName: in.name}
}

// Holds learns from vhost what it holds.
func (in *stream) Holds(held func() (bytes int64, since time.Time)) { in.holds.Store(&held) }

// held is what vhost holds for the client.
func (in *stream) held() (bytes int64, since time.Time) {
	if held := in.holds.Load(); held != nil {
		return (*held)()
	}
	return 0, time.Time{}
}

// Judge tells vhost, for one request, whom to believe by the service that is in force. All who ask for that
// request hear the same.
func (in *conn) Judge(ctx context.Context, info *vhost.ConnInfo) {
	s := in.listener.service.Load()
	q := &asker{ctx: ctx, server: in.server, trust: s.Trust, needsHeader: s.NeedsHeader}
	info.Hops = q
	info.Trusted, info.Unknown = in.judge(q)
	if info.Trusted && is[*vhost.UnsaidError](info.Unknown) {
		info.Unknown = nil // a request may say it
	}
	info.Hop = ""
	if !errors.Is(info.Unknown, errNoHeader) {
		if hop, _ := q.Hop(in.peer.Addr()); hop {
			info.Hop = q.name(in.peer.Addr())
		}
	}
}

// requestEnded writes the one line of a request, which is a flow of its own: into the access log, or where
// there is none, or none that tells all, into the daemon's. That has it all the same at level debug.
func (srv *Server) requestEnded(l *listener, r vhost.Request) {
	logged := srv.logAccess(l, &r)
	srv.countRequest(l, &r)
	if bad, ok := errors.AsType[*vhost.BadRequest](r.Err); ok {
		srv.noteRefused(l.name, bad.Reason, "request refused", "id", r.ID, "listener", l.name, "client", clientString(r.Client),
			"method", r.Method, "host", r.Host, "uri", r.URI, "proto", r.Proto, "reason", bad.Reason, "err", bad)
	}
	if round, ok := errors.AsType[*passesByError](r.Err); ok {
		srv.noteRefused(l.name, misdirected, "request refused", "id", r.ID, "listener", l.name, "client", clientString(r.Client),
			"host", r.Host, "reason", misdirected, "err", round)
	}
	end := "eof"
	if r.Err != nil {
		end = "error"
	}
	srv.metrics.Ended.WithLabelValues(l.name, userspace, end).Inc()
	if is[*limit.OverError](r.Err) {
		return // whose lines are rationed
	}
	level := slog.LevelInfo
	if logged {
		level = slog.LevelDebug
	}
	if !srv.log.Enabled(context.Background(), level) {
		return // a system call and two dozen allocations for nobody
	}
	attrs := make([]slog.Attr, 0, 24)
	attrs = append(attrs, slog.String("id", r.ID), slog.String("request_id", r.RequestID), slog.String("node", srv.node()),
		slog.String("listener", l.name), slog.String("name", r.Host),
		slog.String("client", clientString(r.Client)), slog.String("downstream", r.Conn.Peer.String()),
		slog.String("method", r.Method), slog.String("path", r.Path), slog.String("proto", r.Proto), slog.Int("status", r.Status),
		slog.Int64("bytes_up", r.BytesIn), slog.Int64("bytes_down", r.BytesOut), duration("duration", time.Since(r.Started)),
		slog.String("datapath", userspace), slog.String("end", end))
	if r.Upstream != nil {
		attrs = append(attrs, slog.String("route", r.Route.Name), slog.String("target", targetOf(r.Upstream)))
	}
	if r.UpstreamConn != nil {
		attrs = append(attrs, slog.String("upstream", remoteString(r.UpstreamConn)), duration("upstream_rtt", roundTrip(r.UpstreamConn)))
	}
	if r.User != "" {
		attrs = append(attrs, slog.String("user", r.User))
	}
	srv.logEnded(level, attrs, r.Err)
}

// targetOf is the target of an upstream as the config writes it.
func targetOf(u *vhost.Upstream) string {
	target, _, _ := strings.Cut(u.Key, " ")
	return target
}

// clientString leaves out a port that is not known.
func clientString(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

// roundTrip is the kernel's estimate of c's round trip time, or 0 for what is not TCP.
func roundTrip(c net.Conn) (rtt time.Duration) {
	tcpsock.Control(c, func(fd int) { rtt = tcpsock.RoundTrip(fd) })
	return rtt
}
