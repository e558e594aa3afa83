package front

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// httpServer serves one http or https listener. It lives as long as the
// listener, over reloads: kept-alive connections go on, with the new routes.
type httpServer struct {
	front  *Front
	server *vhost.Server
	tls    bool
	stop   context.CancelFunc // ends the watch over certificate files
}

// newHTTPServer starts the server of l, which has its first service. certs is
// nil for http.
func (f *Front) newHTTPServer(l *listener, certs *tlsterm.Store) *httpServer {
	ctx, stop := context.WithCancel(f.ctx)
	o := vhost.Options{Node: f.node(), Log: f.log, Answer: f.acme.ServeChallenge, Count: f.account(l), OnRequest: func(r vhost.Request) { f.requestEnded(l, r) }, Charge: f.charge(l), Guard: f.listenerGuard(l),
		Route: func(r *http.Request, host, path string) (*vhost.Route, error) {
			return l.service.Load().routeRequest(r, host, path, certs)
		},
		ByPath: func(host string) bool { return l.service.Load().RoutesByPath(host) },
		HSTS:   func() string { return l.service.Load().HSTS }, Timing: func() bool { return l.service.Load().Timing }}
	if certs != nil {
		o.TLS = f.answeringChallenges(l.askingClients(certs.Config()))
		go certs.Run(ctx)
	}
	return &httpServer{front: f, server: vhost.New(o), tls: certs != nil, stop: stop}
}

// pageReason gives an error of dialling the reason that chooses its page: what
// is known and not there now is another thing than what does not answer.
func pageReason(err error) error {
	var de *dial.Error
	if !errors.As(err, &de) {
		return err
	}
	switch de.Reason {
	case dial.NodeOffline:
		return vhost.FailAbsent(de.Seen, err)
	case dial.UnknownNode, dial.ContainerStopped, dial.UnknownContainer, dial.AmbiguousContainer,
		dial.NoSocket, dial.Exhausted:
		return vhost.Fail(vhost.ReasonAbsent, err)
	case dial.Timeout:
		return vhost.Fail(vhost.ReasonTimeout, err)
	case dial.Refused:
		return vhost.Fail(vhost.ReasonRefused, err)
	}
	return vhost.Fail(vhost.ReasonUnreachable, err)
}

// errFinalDot says what nobody can answer who terminates TLS with crypto/tls: it refuses the hello with decode_error,
// and what it reads can't be changed on the way, for both sides hash the very bytes (golang.org/issue/63117).
var errFinalDot = errors.New("the client sent the name with a dot at its end, which TLS forbids (RFC 6066 section 3): open the address without it")

// serve serves in until it is closed. It owns in.
func (h *httpServer) serve(in *stream) {
	f := h.front
	if h.tls {
		// What sni can't read is crypto/tls's to judge, from the same bytes and within the same time.
		hello, head, err := in.readHello()
		in.ahead = head
		if err == nil && hello.FinalDot {
			in.name = hello.ServerName
			f.refuseHello(in, hello, errFinalDot)
			return
		}
	}
	fl := &flow.Flow{ID: in.id, Listener: in.listener.name, Route: "by request", Name: in.name,
		Client: in.client.String(), Shared: in.shared(), Downstream: in.peer.String(), Target: "by request", Datapath: func() string { return userspace },
		Account: f.flows.Account(in.listener.name, ""), // which a request has of its route
		Started: in.accepted, Bytes: func() (up, down int64) { return in.bytesIn.Load(), in.bytesOut.Load() }, Held: in.held}
	f.flows.Add(fl)
	err := h.server.ServeConn(in)
	f.flows.Remove(fl)
	if err != nil {
		f.metrics.Refused.WithLabelValues(in.listener.name, "tls_handshake").Inc()
		f.limited.Warn("tls_handshake", "the TLS handshake failed", "id", in.id, "listener", in.listener.name, "client", in.client, "reason", "tls_handshake", "err", err)
	}
}

// shutdown lets requests end until ctx does.
func (h *httpServer) shutdown(ctx context.Context) {
	h.server.Shutdown(ctx)
	h.stop()
}

// close ends all connections at once.
func (h *httpServer) close() {
	h.server.Close()
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

// Judge tells vhost, for one request, whom to believe by the service that is in
// force. All who ask for that request hear the same.
func (in *conn) Judge(ctx context.Context, info *vhost.ConnInfo) {
	s := in.listener.service.Load()
	q := &asker{ctx: ctx, front: in.front, trust: s.Trust, header: s.NeedsHeader}
	info.Hops = q
	info.Trusted, info.Unknown = in.judge(q)
	var unsaid *vhost.UnsaidError
	if info.Trusted && errors.As(info.Unknown, &unsaid) {
		info.Unknown = nil // a request may say it
	}
	info.Hop = ""
	if !errors.Is(info.Unknown, errNoHeader) {
		if hop, _ := q.Hop(in.peer.Addr()); hop {
			info.Hop = q.name(in.peer.Addr())
		}
	}
}

// requestEnded writes the one line of a request, which is a flow of its own: into the access log, or where there is none,
// or none that tells all, into the daemon's. That has it all the same at level debug.
func (f *Front) requestEnded(l *listener, r vhost.Request) {
	logged := f.logAccess(l, &r)
	f.countRequest(l, &r)
	var bad *vhost.BadRequest
	if errors.As(r.Err, &bad) {
		f.metrics.Refused.WithLabelValues(l.name, bad.Reason).Inc()
		f.limited.Warn(bad.Reason, "request refused", "id", r.ID, "listener", l.name, "client", clientString(r.Client),
			"method", r.Method, "host", r.Host, "uri", r.URI, "proto", r.Proto, "reason", bad.Reason, "err", bad)
	}
	var round *passesByError
	if errors.As(r.Err, &round) {
		f.metrics.Refused.WithLabelValues(l.name, misdirected).Inc()
		f.limited.Warn(misdirected, "request refused", "id", r.ID, "listener", l.name, "client", clientString(r.Client),
			"host", r.Host, "reason", misdirected, "err", round)
	}
	end := "eof"
	if r.Err != nil {
		end = "error"
	}
	f.metrics.Ended.WithLabelValues(l.name, userspace, end).Inc()
	var over *limit.OverError
	if errors.As(r.Err, &over) {
		return // whose lines are rationed
	}
	level := slog.LevelInfo
	if logged {
		level = slog.LevelDebug
	}
	if !f.log.Enabled(context.Background(), level) {
		return // a system call and two dozen allocations for nobody
	}
	attrs := make([]slog.Attr, 0, 24)
	attrs = append(attrs, slog.String("id", r.ID), slog.String("request_id", r.RequestID), slog.String("node", f.node()),
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
	f.logEnded(level, attrs, r.Err)
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
