package front

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/limit"
)

// admit takes in what was accepted, and starts serving it. It blocks on nothing, and is called for any number of
// connections at the same time: one over the limit costs no more than to be closed.
func (f *Front) admit(l *listener, s accepted, peer netip.AddrPort) {
	if in := f.takeIn(l, s, peer); in != nil && !f.takeFastPath(in, s) {
		go f.slowPath(in, s, nil)
	}
}

// takeIn counts what was accepted, and checks the limits. It returns nil where it has refused it.
func (f *Front) takeIn(l *listener, s accepted, peer netip.AddrPort) *conn {
	f.metrics.Accepted.WithLabelValues(l.name).Inc()
	svc := l.service.Load()
	src := peer.Addr()
	if svc.Trust != nil {
		// Who it is isn't known yet; a trusted hop carries many clients, so
		// here it counts in the total only. identify charges the real source.
		src = netip.Addr{}
	}
	err := f.screen(svc, peer.Addr(), src)
	var lease *limit.Lease
	if err == nil {
		lease, err = f.limiter.Acquire(src)
	}
	if err != nil {
		f.turnedAway(l.name, peer, refusal(err), err) // which whoever is told by the reset can look up
		s.Reset()                                     // so that nothing lingers
		return nil
	}
	in := &conn{front: f, listener: l, service: svc, peer: peer, client: peer, lease: lease, accepted: time.Now(), stopCancel: func() bool { return true }}
	f.conns.Add(1)
	return in
}

// turnedAway counts and logs a connection that was refused for whose it is.
func (f *Front) turnedAway(listener string, peer netip.AddrPort, reason string, err error) {
	f.metrics.Refused.WithLabelValues(listener, reason).Inc()
	msg := "connection refused"
	if reason == overLimit {
		msg += ": over the limit"
	}
	f.limited.Warn(reason, msg, "listener", listener, "peer", peer, "reason", reason, "err", err)
}

// slowPath brings in, which comes by s, to its end on a goroutine, after what was read ahead. It owns both.
func (f *Front) slowPath(in *conn, s accepted, ahead []byte) {
	tcp, err := s.Conn()
	if err != nil {
		f.metrics.Refused.WithLabelValues(in.listener.name, "out_of_files").Inc()
		f.limited.Warn("out_of_files", outOfFiles, "err", err)
		in.release()
		return
	}
	tcp.SetKeepAliveConfig(tcpsock.KeepAlive)
	if !in.local.IsValid() { // else a PROXY header has said it
		in.local = addrPort(tcp.LocalAddr())
	}
	in.stopCancel()
	in.stopCancel = context.AfterFunc(f.ctx, func() { tcp.Close() })
	f.serve(&stream{TCPConn: tcp, conn: in, ahead: ahead})
}

const outOfFiles = "out of file descriptors: connections are closed at once: raise LimitNOFILE= or `ulimit -n`, or lower limits.connections"

// failed sees to an error of accept on s. goOn says that the next try may do better.
func (f *Front) failed(s *listenerSocket, err error) (goOn bool) {
	if !outOfResources(err) {
		return true // the peer was gone before we came (ECONNABORTED), or a passing network error
	}
	f.limited.Warn("out_of_files", outOfFiles, "err", err)
	if !f.spare.shed(s) {
		return false
	}
	f.metrics.Refused.WithLabelValues(s.owner.Load().name, "out_of_files").Inc()
	return true
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func outOfResources(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// spareFiles are file descriptors held back for the day when there are none
// left: one is given up to accept, and close, the connection that waits, which
// would otherwise make accept fail in a busy loop while the client hangs.
//
// There are a few, because whoever dials at that moment may take the one that
// was given up, and keep it for a long time.
type spareFiles struct {
	mu      sync.Mutex
	files   []*os.File
	missing atomic.Bool
}

const spares = 8

func newSpareFiles() *spareFiles {
	s := &spareFiles{}
	s.missing.Store(true)
	s.refill()
	return s
}

// refill takes back what was given up, before anybody else does. It costs
// nothing when nothing is missing.
func (s *spareFiles) refill() {
	if !s.missing.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refillLocked()
}

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

// shed refuses the connection that waits at from with a reset, and reports
// whether it could.
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
