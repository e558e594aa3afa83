package front

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// inbound is one accepted connection on its way through the front. It is a
// net.Conn whose Read gives first the bytes that were read ahead.
type inbound struct {
	*net.TCPConn
	front    *Front
	listener *listener
	service  *service // as it was when the connection came
	lease    *limit.Lease
	accepted time.Time
	waited   time.Duration // for the hello, before serve

	id        string         // the path's id
	peer      netip.AddrPort // the socket's other end
	client    netip.AddrPort // the client, as far back as it is believed
	local     netip.AddrPort // what the client connected to, as far as it is known
	trusted   bool           // accept_proxy.from names the peer
	anonymous bool           // the peer speaks for somebody, and can't say for whom
	name      string         // server name, once known

	ahead []byte // read from the socket, not yet consumed

	bytesIn, bytesOut atomic.Int64 // through Read and Write: HTTP's share
	uncut             func() bool  // from here on f.ctx ends it no more, somebody else does
	closeOnce         sync.Once
}

func (in *inbound) Read(b []byte) (int, error) {
	var n int
	var err error
	if len(in.ahead) > 0 {
		n = copy(b, in.ahead)
		in.ahead = in.ahead[n:]
		if len(in.ahead) == 0 {
			in.ahead = nil
		}
	} else {
		n, err = in.TCPConn.Read(b)
	}
	in.bytesIn.Add(int64(n))
	return n, err
}

func (in *inbound) Write(b []byte) (int, error) {
	n, err := in.TCPConn.Write(b)
	in.bytesOut.Add(int64(n))
	return n, err
}

// ReadFrom and WriteTo hide TCPConn's, which would pass the bytes that were
// read ahead, and the counters, by.
func (in *inbound) ReadFrom(r io.Reader) (int64, error) {
	n, err := in.TCPConn.ReadFrom(r)
	in.bytesOut.Add(n)
	return n, err
}

func (in *inbound) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{in})
}

// Close closes the socket and ends what the limits and the drain count.
func (in *inbound) Close() error {
	err := in.TCPConn.Close()
	in.release()
	return err
}

// release ends what the limits and the drain count, when somebody else closes
// the socket. It may be called more than once.
func (in *inbound) release() {
	in.closeOnce.Do(func() {
		in.uncut()
		in.lease.Release()
		in.front.conns.Done()
	})
}

// takeAhead gives the bytes that were read ahead to a caller who uses the bare
// TCPConn from here on.
func (in *inbound) takeAhead() []byte {
	b := in.ahead
	in.ahead = nil
	return b
}

// serve brings one connection from accept to its end. It owns in.
func (f *Front) serve(in *inbound) {
	if in.service.trust != nil {
		if err := f.identify(in); err != nil {
			f.refuseInbound(in, err)
			return
		}
	}
	if in.id == "" {
		in.id = flow.NewID()
	}
	switch in.service.mode {
	case "tcp":
		if r := in.service.fallback; r != nil {
			if err := f.permit(f.ctx, in.visitor(), in.service.allow, r.allow); err != nil {
				f.refuseInbound(in, err)
				return
			}
		}
		f.spliceTo(in, in.service.fallback, nil)
	case "sni":
		f.serveSNI(in)
	default: // http, https
		in.listener.http.serve(in)
	}
}

// identify reads the PROXY header of a connection to a listener that has
// accept_proxy, and believes it only from whom the config names. Such a peer
// may leave the header out where the client speaks first and the bytes tell
// (an HTTP hop says the client's address in the request); a tcp listener can't
// tell and needs it.
func (f *Front) identify(in *inbound) error {
	ctx, cancel := context.WithTimeout(f.ctx, in.service.limits.HelloTimeout)
	defer cancel()
	trusted, who := in.service.trust.check(ctx, in.peer.Addr(), f.tailnet.WhoIs)
	in.trusted = trusted
	if !trusted {
		if err := in.lease.Move(in.peer.Addr()); err != nil {
			return err
		}
		if in.service.mode == "tcp" {
			return &strangerError{who}
		}
	}
	h, rest, err := proxyheader.Read(in.TCPConn, in.service.limits.HelloBytes, in.service.limits.HelloTimeout)
	in.ahead = rest
	switch {
	case err != nil:
		return err
	case h == nil && in.service.mode == "tcp":
		return errNoHeader
	case h == nil:
		return nil
	case !trusted:
		return &strangerError{who}
	}
	in.id = h.ID
	in.name = h.ServerName
	if h.Local {
		return nil // the hop itself: a health check
	}
	if !h.Source.IsValid() {
		// Somebody behind the hop, and it can't say who: what they write about
		// themselves in a request is not the hop's word.
		in.trusted, in.anonymous = false, true
		return nil
	}
	in.client = h.Source
	if h.Destination.IsValid() {
		in.local = h.Destination
	}
	return in.lease.Move(h.Source.Addr())
}

// shutdown is the metric's word for a connection that was cut before it had a route, because the daemon ends.
const shutdown = "shutdown"

type strangerError struct{ who string }

func (e *strangerError) Error() string { return errStranger.Error() + ": " + e.who }
func (e *strangerError) Unwrap() error { return errStranger }

var errNoHeader = errors.New("no PROXY header: a tcp listener with accept_proxy needs one on each connection (send_proxy: v2 at the hop before)")

// refuseInbound ends a connection that did not get as far as its mode.
func (f *Front) refuseInbound(in *inbound, err error) {
	defer in.release()
	reason := refusal(err)
	if f.ctx.Err() != nil {
		reason = shutdown
	}
	f.metrics.Refused.WithLabelValues(in.listener.name, reason).Inc()
	switch reason {
	case "empty", shutdown: // opened and closed: a port scan or a health check; or cut by us
	case "over_limit":
		f.complain.Warn("over_limit", "connection refused: over the limit", "listener", in.listener.name, "err", err)
	default:
		f.complain.Warn(reason, "connection refused", "listener", in.listener.name, "client", in.client, "peer", in.peer, "reason", reason, "err", err)
	}
	reset(in.TCPConn)
}

// refusal is the metric's word for why a connection was refused before it had
// a route.
func refusal(err error) string {
	var over *limit.OverError
	var stranger *notAllowedError
	switch {
	case errors.As(err, &stranger):
		return notAllowed
	case errors.As(err, &over):
		return "over_limit"
	case errors.Is(err, errStranger):
		return "proxy_from_stranger"
	case errors.Is(err, errNoHeader):
		return "proxy_missing"
	case errors.Is(err, proxyheader.ErrEOF):
		return "empty"
	case errors.Is(err, proxyheader.ErrTimeout):
		return "proxy_timeout"
	}
	return "proxy_invalid"
}
