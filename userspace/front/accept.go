package front

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// accept takes connections from s until it is closed. It never blocks on a
// peer: whatever waits for bytes has a goroutine of its own.
func (f *Front) accept(s *socket) {
	defer close(s.done)
	for {
		f.spare.refill()
		c, err := s.ln.AcceptTCP()
		switch {
		case err == nil:
		case errors.Is(err, net.ErrClosed):
			return
		case outOfResources(err):
			f.complain.Warn("out_of_files", "out of file descriptors: connections are closed at once: raise LimitNOFILE= or `ulimit -n`, or lower limits.connections", "err", err)
			if f.spare.shed(s.ln) {
				f.metrics.Refused.WithLabelValues(s.owner.Load().name, "out_of_files").Inc()
			} else {
				time.Sleep(shedPause)
			}
			continue
		default: // the peer was gone before we came (ECONNABORTED), or a passing network error
			continue
		}
		f.admit(s.owner.Load(), c)
	}
}

// admit counts c, checks the limits, and starts serving it. It is called on
// the accept loop: a connection over the limit costs no goroutine.
func (f *Front) admit(l *listener, c *net.TCPConn) {
	f.metrics.Accepted.WithLabelValues(l.name).Inc()
	svc := l.service.Load()
	peer := addrPort(c.RemoteAddr())
	src := peer.Addr()
	if svc.trust != nil {
		// Who it is isn't known yet; a trusted hop carries many clients, so
		// here it counts in the total only. identify charges the real source.
		src = netip.Addr{}
	}
	lease, err := f.limiter.Acquire(src)
	if err != nil {
		f.overLimit(l, c, err)
		return
	}
	in := &inbound{TCPConn: c, front: f, listener: l, service: svc, peer: peer, client: peer,
		local: addrPort(c.LocalAddr()), lease: lease, accepted: time.Now()}
	f.conns.Add(1)
	if !f.express(in) {
		go f.serve(in)
	}
}

// overLimit refuses c at once, with a reset so that nothing lingers.
func (f *Front) overLimit(l *listener, c *net.TCPConn, err error) {
	f.metrics.Refused.WithLabelValues(l.name, "over_limit").Inc()
	f.complain.Warn("over_limit", "connection refused: over the limit", "listener", l.name, "err", err)
	reset(c)
}

// reset closes c with a RST.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
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

const (
	spares = 8
	// shedPause keeps a daemon that can't even shed off the CPU.
	shedPause = 10 * time.Millisecond
)

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

// shed refuses the connection that waits on ln with a reset, and reports
// whether it could.
func (s *spareFiles) shed(ln *net.TCPListener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.refillLocked()
	for n := len(s.files); n > 0; n-- {
		s.files[n-1].Close()
		s.files = s.files[:n-1]
		s.missing.Store(true)
		// Whoever waited may be gone by now.
		ln.SetDeadline(time.Now().Add(shedPause))
		c, err := ln.AcceptTCP()
		ln.SetDeadline(time.Time{})
		if err == nil {
			reset(c)
			return true
		}
		if !outOfResources(err) {
			return false
		}
	}
	return false
}
