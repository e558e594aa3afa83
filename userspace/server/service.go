package server

import (
	"context"
	"crypto/tls"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/announce"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// listener is a configured listener while the daemon lives. What it does is its service, which a reload
// swaps; what it is (name and mode) stays.
type listener struct {
	name, mode string
	service    atomic.Pointer[service]
	http       *httpServer    // http and https only
	certs      *tlsterm.Store // https only
	arriving   atomic.Int64   // its connections that its HTTP server has not got yet; see arrived

	gate    *gate // with while_down: close only; guarded by Server.mu, and so are the next two
	isShut  bool  // its sockets are to be closed; without while_down: close it says nothing
	wasOpen bool  // the gate has opened or shut it, here or in another process

	drained time.Time // when an operator had its sockets closed, or zero; guarded by Server.mu
	lingers bool      // it is drained, and its sockets are still open; guarded by Server.mu
	until   time.Time // when those close; zero: its announcement is not withdrawn yet; guarded by Server.mu

	announcer *announce.Announcer // nil: nobody is told; guarded by Server.mu
}

// retire ends what l does beside its flows, which go on; requests do until ctx ends.
//
// Server.mu is held.
func (l *listener) retire(ctx context.Context) {
	l.endRequests(ctx)
	l.gate.stop()
}

// endRequests has those of l end until ctx does. Nothing new may come.
func (l *listener) endRequests(ctx context.Context) {
	if l.http != nil {
		l.http.vhost.AnswerLast() // at once: settle may take as long as a hello may
		go func() {
			l.settle(ctx) // what came last would be refused
			l.http.shutdown(ctx)
		}()
	}
}

// settle waits until l's HTTP server has each of its connections, or it is over, or ctx ends.
func (l *listener) settle(ctx context.Context) {
	for l.arriving.Load() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// service is what a listener does by the plan, and what is open for that. It is immutable: a flow that has
// begun with one keeps it.
type service struct {
	*plan.Service
	deny      *denials       // nil: nobody
	edges     []*listener    // https only: this daemon's sni listeners, by which connections may have come
	accessLog *accesslog.Log // http(s) only; nil: none
}

// answeringChallenges makes c answer an authority's hello before any name is looked up: the name has no
// certificate yet.
func (srv *Server) answeringChallenges(c *tls.Config) *tls.Config {
	next := c.GetConfigForClient
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if answer := srv.acme.ChallengeConfig(hello); answer != nil {
			return answer, nil
		}
		if next == nil {
			return nil, nil
		}
		return next(hello)
	}
	return c
}

// askingClients makes c ask for a certificate where a route wants one, and nowhere else: browsers ask their
// user. No session is resumed there, for it would bring the certificate, or the lack of it, of the first
// handshake.
func (l *listener) askingClients(c *tls.Config) *tls.Config {
	next := c.GetConfigForClient
	asking := c.Clone()
	asking.GetConfigForClient = nil
	asking.ClientAuth = tls.RequestClientCert
	asking.SessionTicketsDisabled = true
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if next != nil {
			if own, err := next(hello); own != nil || err != nil {
				return own, err
			}
		}
		if l.service.Load().AsksClients(l.certs.Asked(hello.ServerName)) {
			return asking, nil
		}
		return nil, nil
	}
	return c
}
