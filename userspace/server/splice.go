package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// serveSNI reads the hello of a connection and sends it where its name says. It owns in.
func (srv *Server) serveSNI(in *stream) {
	hello, head, err := in.readHello()
	in.ahead = head
	if err != nil {
		srv.refuseHello(in, hello, err)
		return
	}
	r, err := in.decide(&hello)
	if err != nil {
		srv.refuseHello(in, hello, err)
		return
	}
	srv.spliceTo(in, r, &hello)
}

// decide says which rule takes in, by its hello, which is nil on a tcp listener, or why none does. Both ways
// of a connection ask it. On the loop the asker may have to ask: then nothing may be concluded.
func (in *conn) decide(hello *sni.Hello) (*plan.Rule, error) {
	if hello != nil {
		in.name = hello.ServerName
	}
	return in.service.Decide(hello, in.visitor(), in.asker)
}

var errDisplaced = errors.New("its PROXY header or hello was not complete when a newer connection needed its place")

// readHello reads the hello of in, as far as it has not been read already. head is all that was.
func (in *stream) readHello() (hello sni.Hello, head []byte, err error) {
	return sni.Read(in.TCPConn, in.takeAhead(), in.service.Limits.HelloBytes, in.timeForHello())
}

// timeForHello is what in has left for its hello.
func (in *conn) timeForHello() time.Duration {
	return max(1, in.service.HelloTimeout()+in.afterHeader-time.Since(in.accepted))
}

// spliceTo dials r's target and relays the connection to it. It owns in, and may return before the flow has
// ended.
func (srv *Server) spliceTo(in *stream, r *plan.Rule, hello *sni.Hello) {
	r, up, err := srv.dialTarget(in, r)
	if err != nil {
		defer in.release()
		srv.limited.Warn("dial "+r.Written, "upstream can't be reached", "id", in.id, "listener", in.listener.name, "route", r.Name, "target", r.Written, "client", in.client, "name", in.name, "err", err)
		if hello != nil {
			sni.Refuse(in.TCPConn, sni.AlertInternalError)
			return
		}
		tcpsock.ResetConn(in.TCPConn)
		return
	}
	_, o, done := srv.begin(in.conn, r, hello, remoteString(up))
	o.Head = in.takeAhead()
	in.stopCancel()
	srv.opts.Relay.Run(srv.ctx, in.TCPConn, up, o, done)
}

// begin registers the flow of in, and says how it is to be relayed. The result's done ends in.
func (srv *Server) begin(in *conn, r *plan.Rule, hello *sni.Hello, upstream string) (*flow.Flow, relay.Options, func(relay.Result)) {
	var preface []byte
	if r.SendProxy {
		preface = srv.proxyHeader(in, hello).Append(nil)
	}
	s := srv.splice(in, flow.Flow{ID: in.id, Listener: in.listener.name, Route: r.Name, Name: in.name,
		Client: in.client.String(), Shared: in.shared(), Downstream: in.peer.String(), Upstream: upstream,
		Target: r.Written, Started: in.accepted},
		terms{in.service.Limits.FlowBuffer, in.service.Limits.IdleTimeout, r.Datapath, r.Transparent, containerOf(r)},
		in.beginning(preface), false)
	in.asker, in.header = nil, nil // the flow may last
	o := srv.relayOptions(s)
	o.Preface = preface
	return &s.flow, o, s.ended
}

// dialRule connects to r's target and counts how that went.
func (srv *Server) dialRule(ctx context.Context, listener string, r *plan.Rule, who plan.Visitor) (net.Conn, error) {
	started := time.Now()
	var up net.Conn
	err := srv.disabled.Check(r.To, r.Written)
	if endUse := srv.wakes.begin(containerOf(r)); endUse != nil {
		defer endUse()
	}
	if err == nil {
		err = srv.wake(ctx, r)
	}
	switch {
	case err != nil:
	case r.Label != nil:
		up, err = dialLabelled(ctx, r, who.Client)
	case r.Transparent:
		up, err = srv.dialTransparent(ctx, listener, r, who)
	default:
		up, err = r.Dialer.Dial(ctx, r.To, who.Client)
	}
	if err != nil && errors.Is(context.Cause(ctx), balance.ErrSlow) { // which says nothing about it
		return nil, err
	}
	srv.metrics.DialTime.Observe(time.Since(started).Seconds())
	if err != nil {
		srv.noteFailed(listener, r, err)
		return nil, err
	}
	if context.Cause(ctx) != balance.ErrSlow { // else another target has the connection
		srv.targets.Made(r.Written)
	}
	return up, nil
}

// noteFailed counts an attempt to connect to r's target that has failed.
func (srv *Server) noteFailed(listener string, r *plan.Rule, err error) {
	srv.targets.Note(r.Written, err)
	reason := "error"
	if de, ok := errors.AsType[*dial.Error](err); ok {
		reason = string(de.Reason)
	}
	srv.metrics.DialError.WithLabelValues(listener, reason).Inc()
}

// proxyHeader says to the next hop what this one knows of the client.
func (srv *Server) proxyHeader(in *conn, hello *sni.Hello) proxyheader.Header {
	h := proxyheader.Header{Source: in.client, Destination: in.local, ServerName: in.name, ID: in.id}
	if !vhost.MayTell(in.client.Addr(), in.unknown) {
		h.Source = netip.AddrPort{}
	}
	if hello != nil && len(hello.ALPN) > 0 {
		h.ALPN = hello.ALPN[0] // the one that the client likes best
	}
	return h
}

// ended writes the one line of a flow that has ended, and counts it.
func (srv *Server) ended(fl *flow.Flow, res relay.Result) {
	srv.metrics.Ended.WithLabelValues(fl.Listener, res.Datapath, string(res.End)).Inc()
	srv.metrics.RouteFlows.WithLabelValues(fl.Listener, fl.Account.Route).Observe(time.Since(fl.Started).Seconds())
	if !srv.log.Enabled(srv.ctx, slog.LevelInfo) {
		return
	}
	srv.logEnded(slog.LevelInfo, []slog.Attr{slog.String("id", fl.ID), slog.String("node", srv.node()), slog.String("listener", fl.Listener),
		slog.String("route", fl.Route), slog.String("name", fl.Name),
		slog.String("client", fl.Client), slog.String("downstream", fl.Downstream),
		slog.String("upstream", fl.Upstream), slog.String("target", fl.Target),
		slog.Int64("bytes_up", res.Up), slog.Int64("bytes_down", res.Down), duration("duration", time.Since(fl.Started)),
		slog.String("datapath", res.Datapath), slog.String("end", string(res.End)),
		duration("downstream_rtt", res.RTT[0]), duration("upstream_rtt", res.RTT[1])}, res.Err)
}

// logEnded writes the line of a flow or a request. It gives it to the handler itself: slog.Logger looks up
// the caller first, which takes as long as the line.
func (srv *Server) logEnded(level slog.Level, attrs []slog.Attr, err error) {
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	r := slog.NewRecord(time.Now(), level, "flow ended", 0)
	r.AddAttrs(attrs...)
	_ = srv.log.Handler().Handle(srv.ctx, r)
}

func duration(key string, d time.Duration) slog.Attr { return slog.Float64(key, seconds(d)) }

// seconds is how logs and JSON give a duration: seconds, to the microsecond.
func seconds(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Second)
}

func remoteString(c net.Conn) string {
	if a := tcpsock.AddrPortOf(c.RemoteAddr()); a.IsValid() {
		return a.String()
	}
	return fmt.Sprint(c.RemoteAddr())
}
