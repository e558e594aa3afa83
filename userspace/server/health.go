package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/config"
)

// Alive is an error where what moves connections does not go on before ctx ends.
func (srv *Server) Alive(ctx context.Context) error { return srv.opts.Loops.Alive(ctx) }

// ServeTailnet has serve answer on a port of this node's tailnet addresses, as they come and go, until ctx
// ends. serve is called for each address, and returns when its listener is closed. Connections are those of
// the tailnet and of this host, as with a listener on "tailnet:PORT". What can't be bound is tried again each
// second.
func (srv *Server) ServeTailnet(ctx context.Context, port string, serve func(net.Listener)) {
	defer func() {
		srv.mu.Lock()
		defer srv.mu.Unlock()
		for _, ln := range srv.healthSockets {
			ln.Close()
		}
	}()
	served := map[net.Listener]bool{}
	var last string
	for {
		addrs, err := selfAddrs(ctx, srv.tailnet)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = srv.openTailnet(served, addrs, port, serve)
		}
		said := ""
		if err != nil {
			said = err.Error()
		}
		if said != last && err != nil {
			srv.log.Warn("control.health can't be bound yet: it is tried again each second",
				"port", port, "err", err)
		}
		last = said
		srv.mu.Lock()
		srv.healthErr = err
		srv.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(rebindEvery):
		}
	}
}

// openTailnet opens the listeners of addrs, and has those served that are not yet.
func (srv *Server) openTailnet(served map[net.Listener]bool, addrs []netip.Addr, port string,
	serve func(net.Listener)) error {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if srv.isFrozen || srv.hasLeft {
		return nil
	}
	open, here := srv.healthSockets, map[string]bool{}
	var errs []error
	for _, a := range addrs {
		addr := net.JoinHostPort(a.String(), port)
		here[addr] = true
		if open[addr] == nil {
			ln, err := net.Listen("tcp", addr)
			if err != nil {
				errs = append(errs, &bindError{addr, err})
				continue
			}
			open[addr] = ln.(*net.TCPListener)
			srv.opts.moved()
		}
		if ln := open[addr]; !served[ln] {
			srv.log.Info("health is served", "address", addr)
			served[ln] = true
			go serve(byTailnet{ln})
		}
	}
	for addr, ln := range open {
		if !here[addr] {
			ln.Close()
			delete(open, addr)
			delete(served, ln)
			srv.opts.moved()
		}
	}
	return errors.Join(errs...)
}

// byTailnet gives only the connections that came by the tailnet, or from this host.
type byTailnet struct{ net.Listener }

func (l byTailnet) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || cameByTailnet(c.(*net.TCPConn)) {
			return c, err
		}
		tcpsock.ResetConn(c)
	}
}

// TailnetPort is the port of an address of the config that stands for this node's, such as "tailnet:9465".
func TailnetPort(listen string) (port string, ok bool) {
	return portOf(listen), config.OnTailnet(listen)
}
