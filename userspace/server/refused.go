package server

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/memory"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// Reasons for which connections and requests are refused: words of the metric and of the log.
const (
	// before a connection has a route
	denied            = "denied"
	overRate          = "over_rate"
	overLimit         = "over_limit"
	overMemory        = memory.OfBudget
	notByTailnet      = "not_by_tailnet" // it came to a tailnet listener by another network
	outOfFiles        = "out_of_files"
	proxyFromStranger = "proxy_from_stranger"
	proxyMissing      = "proxy_missing"
	shutdown          = "shutdown" // it was cut because the daemon ends
	rejected          = "rejected" // by the default of a tcp listener, or for want of one

	// a hello was not complete: in time, before others needed its place, or when the client left
	helloTimeout    = "hello_timeout"
	helloDisplaced  = "hello_displaced"
	helloIncomplete = "hello_incomplete"

	// of connections and of requests
	notAllowed    = "not_allowed"
	notIdentified = "not_identified" // tailscaled did not say who it is

	// of requests
	overRequests = "requests_over_limit"
	misdirected  = "misdirected" // it goes round an sni listener
	noRoute      = "none"        // where a route is counted: it has none
)

// lineEvery is how often a stranger's doing may write a log line of one kind: a flood of bad connections must
// not become a flood of lines.
const lineEvery = 5 * time.Second

// rateLimited logs what strangers cause, at most one line of a kind in lineEvery; the next line says how many
// were left out. The metrics count all of them.
type rateLimited struct {
	log *slog.Logger

	mu sync.Mutex
	// +checklocks:mu
	last map[string]*lines
}

type lines struct {
	at      time.Time
	omitted int
}

func (c *rateLimited) Warn(kind, msg string, args ...any) { c.line(slog.LevelWarn, kind, msg, args) }

func (c *rateLimited) Info(kind, msg string, args ...any) { c.line(slog.LevelInfo, kind, msg, args) }

func (c *rateLimited) line(level slog.Level, kind, msg string, args []any) {
	c.mu.Lock()
	l := c.last[kind]
	if l == nil {
		l = &lines{}
		c.last[kind] = l
	}
	if time.Since(l.at) < lineEvery {
		l.omitted++
		c.mu.Unlock()
		return
	}
	omitted := l.omitted
	*l = lines{at: time.Now()}
	c.mu.Unlock()
	if omitted > 0 {
		args = append(args, "omitted", omitted)
	}
	c.log.Log(context.Background(), level, msg, args...)
}

// noteRefused counts what was refused, and says so.
func (srv *Server) noteRefused(listener, reason, msg string, args ...any) {
	srv.metrics.Refused.WithLabelValues(listener, reason).Inc()
	srv.limited.Warn(reason, msg, args...)
}

// turnedAway counts and logs a connection that was refused for whose it is.
func (srv *Server) turnedAway(listener string, peer netip.AddrPort, reason string, err error) {
	msg := "connection refused"
	if reason == overLimit {
		msg += ": over the limit"
	}
	srv.noteRefused(listener, reason, msg, "listener", listener, "peer", peer, "reason", reason, "err", err)
}

// refuseConn ends a connection that did not get as far as its mode.
func (srv *Server) refuseConn(in *stream, err error) {
	defer in.release()
	srv.connRefused(in.conn, err)
	tcpsock.ResetConn(in.TCPConn)
}

// connRefused counts and logs a connection that did not get as far as its mode.
func (srv *Server) connRefused(in *conn, err error) {
	reason := refusal(err)
	if srv.ctx.Err() != nil {
		reason = shutdown
	}
	srv.metrics.Refused.WithLabelValues(in.listener.name, reason).Inc()
	switch reason {
	case "empty", shutdown, rejected: // opened and closed: a port scan or a health check; or cut by us
	case overLimit:
		srv.limited.Warn(overLimit, "connection refused: over the limit", "listener", in.listener.name, "err", err)
	default:
		srv.limited.Warn(reason, "connection refused", "listener", in.listener.name, "client", in.client, "peer", in.peer, "reason", reason, "err", err)
	}
}

// refuseHello ends a connection whose hello leads nowhere, with the alert that TLS has for it. It owns in.
func (srv *Server) refuseHello(in *stream, hello sni.Hello, err error) {
	defer in.release() // after Refuse, which takes its time
	alert, speaksTLS := sni.AlertFor(err)
	var reason string
	switch {
	case is[*plan.NotAllowedError](err):
		reason, alert, speaksTLS = notAllowed, sni.AlertAccessDenied, true
	case is[*plan.NotIdentifiedError](err):
		reason, alert, speaksTLS = notIdentified, sni.AlertAccessDenied, true
	case errors.Is(err, plan.ErrNobodyServes), errors.Is(err, plan.ErrRejectedName), errors.Is(err, errFinalDot):
		reason, alert, speaksTLS = "unrecognized_name", sni.AlertUnrecognizedName, true
	case is[*sni.RejectError](err):
		reason = "hello_rejected"
	case errors.Is(err, sni.ErrNotTLS):
		reason = "not_tls"
	case errors.Is(err, sni.ErrTooLarge):
		reason = "hello_too_large"
	case errors.Is(err, sni.ErrTimeout):
		reason = helloTimeout
	case errors.Is(err, sni.ErrEOF): // a port scan, or a health check
		reason = "empty"
	default:
		reason = helloIncomplete
	}
	srv.helloRefused(in.conn, hello.ServerName, reason, err)
	if speaksTLS && srv.ctx.Err() == nil {
		sni.Refuse(in.TCPConn, alert)
		return
	}
	tcpsock.ResetConn(in.TCPConn)
}

// helloRefused counts a connection that leads nowhere, and says so.
func (srv *Server) helloRefused(in *conn, name, reason string, err error) {
	if srv.ctx.Err() != nil {
		reason = shutdown
	}
	srv.metrics.Refused.WithLabelValues(in.listener.name, reason).Inc()
	if reason != "empty" && reason != shutdown {
		msg := "connection refused"
		if reason == helloIncomplete {
			msg = "the client left before its TLS hello was complete"
		}
		srv.limited.Warn(reason, msg, "id", in.id, "listener", in.listener.name, "client", in.client, "name", name, "reason", reason, "err", err)
	}
}

// requestRefused counts and logs a request that a guard refuses.
func (srv *Server) requestRefused(listener string, v *vhost.Visit, reason string, err error) {
	srv.noteRefused(listener, reason, "request refused", "id", v.ID, "listener", listener, "client", clientString(v.Client),
		"host", v.URI.Host, "path", v.URI.Path, "reason", reason, "err", err)
}

// is reports whether an E is in err's tree.
func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// refusal is the metric's word for why a connection was refused before it had a route.
func refusal(err error) string {
	switch {
	case is[*plan.NotAllowedError](err):
		return notAllowed
	case is[*plan.NotIdentifiedError](err):
		return notIdentified
	case is[*limit.OverError](err):
		return overLimit
	case is[*limit.RateError](err):
		return overRate
	case is[*deniedError](err):
		return denied
	case is[*memory.GreedyError](err):
		return overMemory
	case errors.Is(err, plan.ErrRejected):
		return rejected
	case errors.Is(err, errStranger):
		return proxyFromStranger
	case errors.Is(err, errNoHeader):
		return proxyMissing
	case errors.Is(err, proxyheader.ErrEOF):
		return "empty"
	case errors.Is(err, proxyheader.ErrTimeout):
		return "proxy_timeout"
	}
	return "proxy_invalid"
}
