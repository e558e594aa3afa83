package server

import (
	"fmt"
	"log/slog"
	"net/url"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// killed is the reason for which an operator's flows are counted as cut.
const killed = "killed"

// Killed is what `tailsplice flows kill --json` prints.
type Killed struct {
	Format int `json:"format_version"` // flow.FormatVersion
	Killed int `json:"killed"`         // flows
}

// KillFlows resets both sides of the flows that query chooses, as [flow.ParseSelection] reads it. by is who
// asked, for the flows' log lines. The error is as that of [flow.Registry.Kill].
func (srv *Server) KillFlows(query url.Values, by string) (Killed, error) {
	k := Killed{Format: flow.FormatVersion}
	s, err := flow.ParseSelection(query)
	if err != nil {
		return k, err
	}
	k.Killed, err = srv.flows.Kill(s, fmt.Errorf("killed at the control socket by %s", by))
	srv.metrics.Cut.WithLabelValues(killed).Add(float64(k.Killed))
	return k, err
}

// Kill resets the connection. Requests that it has under way end as when the client leaves.
func (in *stream) Kill(why error) {
	if in.killed.CompareAndSwap(nil, &why) {
		tcpsock.ResetConn(in.TCPConn)
	}
}

// endKilled writes the line of a connection of requests that was killed, and counts it. Others have none:
// each of their requests has.
func (srv *Server) endKilled(fl *flow.Flow, in *stream) {
	why := in.killed.Load()
	if why == nil {
		return
	}
	srv.metrics.Ended.WithLabelValues(fl.Listener, userspace, string(relay.EndKilled)).Inc()
	if !srv.log.Enabled(srv.ctx, slog.LevelInfo) {
		return
	}
	up, down := fl.Bytes()
	srv.logEnded(slog.LevelInfo, []slog.Attr{slog.String("id", fl.ID), slog.String("node", srv.node()), slog.String("listener", fl.Listener),
		slog.String("name", fl.Name), slog.String("client", fl.Client), slog.String("downstream", fl.Downstream),
		slog.Int64("bytes_up", up), slog.Int64("bytes_down", down), duration("duration", time.Since(fl.Started)),
		slog.String("datapath", userspace), slog.String("end", string(relay.EndKilled))}, *why)
}
