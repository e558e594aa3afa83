package server

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/limit"
)

// takeIn counts what was accepted, and checks the limits. It returns nil where it has refused it.
func (srv *Server) takeIn(l *listener, s accepted, peer netip.AddrPort) *conn {
	srv.metrics.Accepted.WithLabelValues(l.name).Inc()
	svc := l.service.Load()
	src := peer.Addr()
	if svc.Trust != nil {
		// Who it is isn't known yet; a trusted hop carries many clients, so here it counts in the total only.
		// identify charges the real source.
		src = netip.Addr{}
	}
	err := srv.screen(svc, peer.Addr(), src)
	var lease *limit.Lease
	if err == nil {
		lease, err = srv.limiter.Acquire(src)
	}
	if err != nil {
		srv.turnedAway(l.name, peer, refusal(err), err) // which whoever is told by the reset can look up
		s.Reset()                                       // so that nothing lingers
		return nil
	}
	srv.memory.Connected()
	in := &conn{server: srv, listener: l, service: svc, peer: peer, client: peer, lease: lease, accepted: time.Now(), stopCancel: func() bool { return true }}
	srv.conns.Add(1)
	if l.http != nil {
		l.arriving.Add(1)
		in.isArriving.Store(true)
	}
	return in
}

// slowPath brings in, which comes by s, to its end on a goroutine, after what was read ahead. It owns both.
func (srv *Server) slowPath(in *conn, s accepted, ahead []byte) {
	srv.slowPaths.Add(1)
	tcp, err := s.Conn()
	if err != nil {
		srv.noteRefused(in.listener.name, outOfFiles, outOfFilesText, "err", err)
		in.release()
		return
	}
	tcp.SetKeepAliveConfig(tcpsock.KeepAlive)
	if !in.local.IsValid() { // else a PROXY header has said it
		in.local = tcpsock.AddrPortOf(tcp.LocalAddr())
	}
	in.stopCancel()
	in.stopCancel = context.AfterFunc(srv.ctx, func() { tcp.Close() })
	srv.serve(&stream{TCPConn: tcp, conn: in, ahead: ahead})
}

const outOfFilesText = "out of file descriptors: connections are closed at once: raise LimitNOFILE= or `ulimit -n`, or lower limits.connections"

// failed sees to an error of accept on s. goOn says that the next try may do better.
func (srv *Server) failed(s *listenerSocket, err error) (goOn bool) {
	if !outOfResources(err) {
		// The peer was gone before we came (ECONNABORTED), or it is a passing network error. But a socket
		// that another process has ended (EINVAL) stays ready.
		return !errors.Is(err, syscall.EINVAL)
	}
	srv.limited.Warn(outOfFiles, outOfFilesText, "err", err)
	if !srv.spare.shed(s) {
		return false
	}
	srv.metrics.Refused.WithLabelValues(s.owner.Load().name, outOfFiles).Inc()
	return true
}

func outOfResources(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// spareFiles are file descriptors held back for the day when there are none left: one is given up to accept,
// and close, the connection that waits, which would otherwise make accept fail in a busy loop while the
// client hangs.
//
// There are a few, because whoever dials at that moment may take the one that was given up, and keep it for a
// long time.
type spareFiles struct {
	missing atomic.Bool

	mu sync.Mutex
	// +checklocks:mu
	files []*os.File
}

const spares = 8

func newSpareFiles() *spareFiles {
	s := &spareFiles{}
	s.missing.Store(true)
	s.refill()
	return s
}

// refill takes back what was given up, before anybody else does. It costs nothing when nothing is missing.
func (s *spareFiles) refill() {
	if !s.missing.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refillLocked()
}

// +checklocks:s.mu
func (s *spareFiles) refillLocked() {
	for len(s.files) < spares {
		file, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		s.files = append(s.files, file)
	}
	s.missing.Store(len(s.files) < spares)
}

// shed refuses the connection that waits at from with a reset, and reports whether it could.
func (s *spareFiles) shed(from *listenerSocket) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.refillLocked()
	for n := len(s.files); n > 0; n-- {
		s.files[n-1].Close()
		s.files = s.files[:n-1]
		s.missing.Store(true)
		if err := from.refuseOne(); err == nil || !outOfResources(err) {
			return err == nil // else whoever waited is gone
		}
	}
	return false
}
