package server

import (
	"errors"
	"maps"
	"net"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/handover"
)

// errHandover is why the configuration stays as it is for now.
var errHandover = errors.New("an upgrade is under way: reload again when it has ended")

// Sockets are copies of all that is bound, for another process: the caller closes them. What is bound stays
// as it is until Resume or Leave, and connections are accepted until Pause.
func (srv *Server) Sockets() (all []handover.Socket, err error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isClosed {
		return nil, errors.New("the daemon is shutting down")
	}
	srv.isFrozen = true
	return srv.copies()
}

// Bound are copies as of Sockets, and everything goes on.
func (srv *Server) Bound() ([]handover.Socket, error) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return srv.copies()
}

// copies are copies of all that is bound.
//
// +checklocks:srv.mu
func (srv *Server) copies() (all []handover.Socket, err error) {
	for addr, s := range srv.sockets {
		f, err := s.copy()
		if err != nil {
			handover.Close(all)
			return nil, err
		}
		all = append(all, handover.Socket{Kind: handover.KindListener, Name: s.owner.Load().name, Address: addr,
			Tailnet: s.onTailnet.Load(), File: f})
	}
	for addr, ln := range srv.healthSockets {
		f, err := ln.File()
		if err != nil {
			handover.Close(all)
			return nil, err
		}
		all = append(all, handover.Socket{Kind: handover.KindHealth, Address: addr, File: f})
	}
	return all, nil
}

// Pause stops accepting; who connects waits in the queues of the sockets, which stay open. When it returns
// nobody is being admitted.
func (srv *Server) Pause() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.pause(true)
	for _, s := range srv.sockets {
		s.stop()
	}
}

// pause has the announcers tell nothing while another process may be doing so.
//
// +checklocks:srv.mu
func (srv *Server) pause(isPaused bool) {
	srv.isPaused = isPaused
	for _, l := range srv.listeners {
		if l.announcer != nil {
			l.announcer.Hold(isPaused)
		}
	}
}

// Resume accepts again, and lets what is bound change again.
func (srv *Server) Resume() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.isFrozen = false
	srv.wakes.collect(false)
	srv.pause(false)
	if srv.isClosed {
		return
	}
	for addr, s := range srv.sockets {
		switch {
		case !s.isStopped():
		case !s.listens(): // the other process did not want it, and ended it: rebindNow binds anew
			s.Close()
			delete(srv.sockets, addr)
		default:
			s.prepare(srv)
			s.accept()
		}
	}
	srv.rebindNow(srv.tailnetErr)
	if srv.lacksAddresses() {
		srv.addressesMoved.wake()
	}
}

// Leave closes what is bound, which is another process's now, and ends what goes on for new connections only.
// Drain comes next.
func (srv *Server) Leave() {
	srv.stopAccepting()
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.hasLeft = true
	for addr, ln := range srv.healthSockets {
		ln.Close()
		delete(srv.healthSockets, addr)
	}
	for _, l := range srv.listeners {
		l.gate.stop()
		if l.announcer != nil {
			l.announcer.Leave()
		}
	}
	for _, d := range srv.datapaths() {
		if l, ok := d.(datapath.Leaver); ok {
			l.Leave()
		}
	}
	srv.health.Use(srv.ctx, srv.checksOfFlows())
	go srv.acme.Close()
}

// Remaining is how many flows live, and how many connections of clients are open, theirs included.
func (srv *Server) Remaining() (flows, connections int) { return srv.flows.Len(), srv.limiter.Total() }

// adopt takes over sockets of another process, as if they were bound already. It closes them.
//
// +checklocks:srv.mu
func (srv *Server) adopt(all []handover.Socket) error {
	defer handover.Close(all)
	for _, handed := range all {
		ln, err := net.FileListener(handed.File)
		if err != nil {
			return err
		}
		t, ok := ln.(*net.TCPListener)
		if !ok {
			ln.Close()
			continue
		}
		if handed.Kind == handover.KindHealth {
			srv.healthSockets[handed.Address] = t
			continue
		}
		s, err := newListenerSocket(handed.Address, t)
		if err != nil {
			return err
		}
		srv.sockets[handed.Address] = s
		srv.wereOpen[handed.Name] = true
		if handed.Tailnet { // tailscaled may not answer just now
			srv.tailnetAddrs = append(srv.tailnetAddrs, tcpsock.AddrPortOf(s.addr).Addr())
		}
		s.prepare(srv)
		srv.notePort(tcpsock.AddrPortOf(s.addr).Port())
	}
	return nil
}

// notePort remembers that connections are accepted at a port, or were.
func (srv *Server) notePort(port uint16) {
	for old := srv.ports.Load(); !(*old)[port]; old = srv.ports.Load() {
		ports := maps.Clone(*old)
		ports[port] = true
		if srv.ports.CompareAndSwap(old, &ports) {
			return
		}
	}
}

// Accept begins to accept, where Options.Held kept New from it.
func (srv *Server) Accept() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.isHeld = false
	srv.containers.Doubt() // who had the connections before may have started or stopped some
	for _, s := range srv.unwanted {
		s.end()
	}
	srv.unwanted = nil
	for _, s := range srv.sockets {
		srv.start(s)
	}
	srv.tellOthers()
	srv.lingerOn()
}

// start has s accept, unless New is to return first.
//
// +checklocks:srv.mu
func (srv *Server) start(s *listenerSocket) {
	if srv.isHeld {
		return
	}
	l := s.owner.Load()
	srv.log.Info("listening", "address", s.bound(), "listener", l.name, "mode", l.mode)
	s.accept()
}
