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
	open := map[netip.Addr]net.Listener{}
	defer func() {
		for _, ln := range open {
			ln.Close()
		}
	}()
	var last string
	for {
		addrs, err := selfAddrs(ctx, srv.tailnet)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = srv.openTailnet(open, addrs, port, serve)
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

// openTailnet makes open the listeners of addrs.
func (srv *Server) openTailnet(open map[netip.Addr]net.Listener, addrs []netip.Addr, port string,
	serve func(net.Listener)) error {
	here := map[netip.Addr]bool{}
	var errs []error
	for _, a := range addrs {
		here[a] = true
		if open[a] != nil {
			continue
		}
		addr := net.JoinHostPort(a.String(), port)
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			errs = append(errs, &bindError{addr, err})
			continue
		}
		srv.log.Info("health is served", "address", addr)
		open[a] = ln
		go serve(byTailnet{ln})
	}
	for a, ln := range open {
		if !here[a] {
			ln.Close()
			delete(open, a)
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
