//go:build !linux

package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// acceptor is a listener with a goroutine that accepts.
type acceptor struct {
	ln   *net.TCPListener
	run  func()
	done chan struct{} // closed when run has ended; nil before accept
}

// admit takes in what was accepted, and starts serving it.
func (srv *Server) admit(l *listener, s accepted, peer netip.AddrPort) {
	if in := srv.takeIn(l, s, peer); in != nil {
		go srv.slowPath(in, s, nil)
	}
}

func newListenerSocket(written string, ln *net.TCPListener) (*listenerSocket, error) {
	return &listenerSocket{written: written, addr: ln.Addr(), acceptor: acceptor{ln: ln}}, nil
}

// prepare makes accept possible.
func (s *listenerSocket) prepare(srv *Server) {
	s.run = func() {
		defer close(s.done)
		for {
			srv.spare.refill()
			c, err := s.ln.AcceptTCP()
			switch {
			case err == nil:
				srv.admit(s.owner.Load(), accepted{c}, tcpsock.AddrPortOf(c.RemoteAddr()))
			case errors.Is(err, net.ErrClosed):
				return
			case !srv.failed(s, err):
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
}

// accept begins to admit connections.
func (s *listenerSocket) accept() {
	s.done = make(chan struct{})
	go s.run()
}

// stop and its like are for a process that hands over its sockets, as none does here.
func (s *listenerSocket) stop()           {}
func (s *listenerSocket) isStopped() bool { return false }
func (s *listenerSocket) listens() bool   { return true }

// copy returns a copy of the socket.
func (s *listenerSocket) copy() (*os.File, error) { return s.ln.File() }

// Close ends that, and waits until nobody is being admitted.
func (s *listenerSocket) Close() {
	s.ln.Close()
	if s.done != nil {
		<-s.done
	}
}

// end is Close: no other process has the socket.
func (s *listenerSocket) end() { s.Close() }

// queue can't be looked at here.
func (s *listenerSocket) queue() (taken int64, waits bool) { return 0, false }

// refuseOne resets the connection that waits.
func (s *listenerSocket) refuseOne() error {
	s.ln.SetDeadline(time.Now().Add(10 * time.Millisecond)) // it may be gone by now
	defer s.ln.SetDeadline(time.Time{})
	c, err := s.ln.AcceptTCP()
	if err == nil {
		tcpsock.ResetConn(c)
	}
	return err
}

func (s *listenerSocket) sharePort(on bool) error {
	raw, err := s.ln.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { optErr = sharePort(fd, on) })
	return errors.Join(err, optErr)
}

// accepted is a connection that nobody reads from yet.
type accepted struct{ c *net.TCPConn }

func (a accepted) Conn() (*net.TCPConn, error) { return a.c, nil }
func (a accepted) Reset()                      { tcpsock.ResetConn(a.c) }

// cameByTailnet can't be told here.
func cameByTailnet(*net.TCPConn) bool { return true }

// keepFlowsAlive gives the connections that lc's listeners accept the options of a flow's socket.
func keepFlowsAlive(lc *net.ListenConfig) { lc.KeepAliveConfig = tcpsock.KeepAlive }

// portOwner can't tell here: see listen_linux.go.
func portOwner(uint16) string { return "" }

// followInterfaces does nothing here: a reload looks at the interfaces again.
func (srv *Server) followInterfaces(context.Context) {}
