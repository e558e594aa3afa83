package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// rebindEvery is how often an address that could not be bound is tried again: who has the port may end, and
// an interface gets its address late. tailscaled, too, announces an address shortly before the interface has
// it.
const rebindEvery = time.Second

// listenerSocket is one bound address. Its owner may change at a reload, the socket itself stays, so that no
// connection is refused meanwhile.
type listenerSocket struct {
	written  string   // what was asked for: "host:port"
	addr     net.Addr // as bound
	acceptor          // how this system accepts
	owner    atomic.Pointer[listener]

	onTailnet atomic.Bool  // for those who come by the tailnet: see admitTailnet
	via       atomic.Int64 // the interface by which they came last

	took  int64 // how many were accepted when lookAtQueues looked; guarded by Server.mu
	stood bool  // whether any waited then; guarded by Server.mu
}

// binding is one address that should be bound, and for whom.
type binding struct {
	addr        string // "host:port" for net.Listen
	written     string // how the config has it
	owner       *listener
	onTailnet   bool // it may come and go
	onInterface bool // it is that of a named interface, and may come and go
}

// bindings lists what cfg wants bound now, given this node's tailnet addresses and those of the places that
// it names: nothing for listeners that are shut or drained. lacks says which interfaces have no address now.
//
// Server.mu is held.
func bindings(cfg *config.Config, owners map[string]*listener, tailnetAddrs []netip.Addr,
	places map[string]place) (want []binding, lacks map[lack]error) {
	lacks = map[lack]error{}
	for _, l := range cfg.Listeners {
		owner := owners[l.Name]
		if !owner.drained.IsZero() && !owner.lingers || l.WhileDown == whileDownClose && owner.isShut {
			continue
		}
		for _, written := range l.Listen {
			host, port, _ := net.SplitHostPort(written) // config has checked it
			p, named := places[host]
			switch {
			case named && p.isInterface && len(p.addrs) == 0:
				lacks[lack{written, l.Name}] = fmt.Errorf("the interface %s is not there, or has no address: see `ip address`", host)
			case named:
				for _, a := range p.addrs {
					b := binding{addr: netip.AddrPortFrom(a, parsePort(port)).String(), written: written, owner: owner, onInterface: p.isInterface}
					// Two names of one listener may have the same address.
					if !slices.ContainsFunc(want, func(o binding) bool { return o.addr == b.addr && o.owner == b.owner }) {
						want = append(want, b)
					}
				}
			case host == config.Tailnet:
				for _, a := range tailnetAddrs {
					want = append(want, binding{addr: net.JoinHostPort(a.String(), port), written: written, owner: owner, onTailnet: true})
				}
			default:
				want = append(want, binding{addr: written, written: written, owner: owner})
			}
		}
	}
	return want, lacks
}

// warnOfTailscaled logs what tailscaled's own settings keep from those addresses of listeners.
func (srv *Server) warnOfTailscaled(listens []string) {
	if len(listens) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(srv.ctx, 10*time.Second)
	defer cancel()
	in, err := srv.tailnet.Inbound(ctx)
	if err != nil {
		return // whatever else needs tailscaled says so
	}
	for _, a := range listens {
		if problem := in.Problem(parsePort(portOf(a))); problem != "" {
			srv.log.Warn("a tailnet listener gets no connections", "listen", a, "problem", problem)
		}
	}
}

// listen binds addr. MPTCP is off because a real MPTCP socket can not be spliced in the kernel. The error
// says what to do about it.
//
// leaving are sockets on the same port that are about to be closed. Where one of them is in the way (":443"
// becomes "192.0.2.1:443"), both are bound for a moment, so that the old one need not be closed before it is
// known that the new one works. SO_REUSEPORT allows that, and is asked for then only: it would let a second
// daemon take the port unnoticed.
func listen(addr string, leaving ...*listenerSocket) (*listenerSocket, error) {
	s, err := listenOnce(addr, nil)
	if len(leaving) == 0 || !errors.Is(err, syscall.EADDRINUSE) {
		return s, err
	}
	for _, l := range leaving {
		if shareErr := l.sharePort(true); shareErr != nil {
			return nil, err
		}
		defer l.sharePort(false)
	}
	s, err = listenOnce(addr, shareNewPort)
	if err != nil {
		return nil, err
	}
	if err := s.sharePort(false); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func shareNewPort(_, _ string, raw syscall.RawConn) error {
	var optErr error
	err := raw.Control(func(fd uintptr) { optErr = sharePort(fd, true) })
	return errors.Join(err, optErr)
}

func sharePort(fd uintptr, on bool) error {
	v := 0
	if on {
		v = 1
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, v))
}

func listenOnce(addr string, control func(network, address string, c syscall.RawConn) error) (*listenerSocket, error) {
	lc := net.ListenConfig{Control: control}
	keepFlowsAlive(&lc)
	lc.SetMultipathTCP(false)
	// "tcp" would make 0.0.0.0 and :: listen on both families.
	network := "tcp"
	if ap, err := netip.ParseAddrPort(addr); err == nil {
		network = "tcp6"
		if ap.Addr().Is4() {
			network = "tcp4"
		}
	}
	ln, err := lc.Listen(context.Background(), network, addr)
	if err != nil {
		return nil, &bindError{addr, err}
	}
	return newListenerSocket(addr, ln.(*net.TCPListener))
}

func parsePort(s string) uint16 {
	n, _ := strconv.ParseUint(s, 10, 16) // config has checked it
	return uint16(n)
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

type bindError struct {
	addr string
	err  error
}

func (e *bindError) Unwrap() error { return e.err }

func (e *bindError) Error() string {
	host, port, _ := net.SplitHostPort(e.addr)
	switch {
	case errors.Is(e.err, syscall.EADDRINUSE):
		n, _ := strconv.Atoi(port)
		if who := portOwner(uint16(n)); who != "" {
			return fmt.Sprintf("listen on %s: the port is in use by %s: stop it, or choose another address", e.addr, who)
		}
		return fmt.Sprintf("listen on %s: the port is in use by another program (`ss -ltnp 'sport = :%s'` as root names it): stop it, or choose another address", e.addr, port)
	case errors.Is(e.err, fs.ErrPermission):
		return fmt.Sprintf("listen on %s: permission denied: ports below %s need root or CAP_NET_BIND_SERVICE: use the systemd unit, run as root, or choose a higher port", e.addr, firstFreePort())
	case errors.Is(e.err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf("listen on %s: no interface of this machine has the address %s: `ip address` lists them; \":%s\" listens on all", e.addr, host, port)
	case errors.Is(e.err, syscall.EAFNOSUPPORT):
		return fmt.Sprintf("listen on %s: this kernel has no support for that address family (is IPv6 disabled?)", e.addr)
	}
	return fmt.Sprintf("listen on %s: %v", e.addr, e.err)
}

func firstFreePort() string {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return "1024"
	}
	return strings.TrimSpace(string(b))
}

// bindMissing opens what want lists and is not bound yet, and accepts nothing there yet. failed says why the
// rest could not be opened, by address.
//
// +checklocks:srv.mu
func (srv *Server) bindMissing(want []binding) (opened map[string]*listenerSocket, failed map[string]error) {
	opened, failed = map[string]*listenerSocket{}, map[string]error{}
	wanted := map[string]bool{}
	for _, b := range want {
		wanted[b.addr] = true
	}
	leaving := map[string][]*listenerSocket{} // by port
	for addr, s := range srv.sockets {
		if !wanted[addr] {
			leaving[portOf(addr)] = append(leaving[portOf(addr)], s)
		}
	}
	for _, b := range want {
		if srv.sockets[b.addr] != nil {
			continue
		}
		if s, err := listen(b.addr, leaving[portOf(b.addr)]...); err != nil {
			failed[b.addr] = err
		} else {
			s.prepare(srv)
			opened[b.addr] = s
		}
	}
	return opened, failed
}

// rebind makes the sockets those that want lists: hands over what stays, starts what bindMissing has opened,
// closes the rest.
//
// +checklocks:srv.mu
func (srv *Server) rebind(want []binding, opened map[string]*listenerSocket) {
	wanted := map[string]bool{}
	for _, b := range want {
		wanted[b.addr] = true
		if s := srv.sockets[b.addr]; s != nil {
			s.owner.Store(b.owner)
			s.onTailnet.Store(b.onTailnet)
		} else if s := opened[b.addr]; s != nil {
			s.owner.Store(b.owner)
			s.onTailnet.Store(b.onTailnet)
			srv.sockets[b.addr] = s
			srv.notePort(tcpsock.AddrPortOf(s.addr).Port())
			srv.start(s)
		}
	}
	for addr, s := range srv.sockets {
		if wanted[addr] {
			continue
		}
		if srv.isHeld { // it is another process's until this one accepts
			srv.unwanted = append(srv.unwanted, s)
		} else {
			s.end()
		}
		delete(srv.sockets, addr)
		srv.log.Info("stopped listening", "address", addr)
	}
	srv.opts.moved()
	bound := map[netip.AddrPort]bool{}
	for _, s := range srv.sockets {
		bound[tcpsock.AddrPortOf(s.addr)] = true
	}
	srv.bound.Store(&bound)
}

// isListeningAt reports whether connections are accepted at local, which then nobody else is bound to.
func (srv *Server) isListeningAt(local netip.AddrPort) bool {
	bound := *srv.bound.Load()
	return bound[local] || bound[netip.AddrPortFrom(netip.IPv6Unspecified(), local.Port())] ||
		bound[netip.AddrPortFrom(netip.IPv4Unspecified(), local.Port())]
}

// noteUnbound remembers what the listeners do without: what could not be bound, clashes of addresses,
// interfaces without one, and why this node's tailnet addresses are not known. It logs what is new of that.
//
// +checklocks:srv.mu
func (srv *Server) noteUnbound(b bound) {
	unbound := b.lacks
	maps.Copy(unbound, b.clashes)
	for _, w := range b.want {
		if err := b.failed[w.addr]; err != nil {
			unbound[lack{w.addr, w.owner.name}] = err
		}
	}
	for c, err := range unbound {
		if before := srv.unbound[c]; before == nil || before.Error() != err.Error() {
			srv.log.Warn("an address of a listener can't be bound yet: it is tried again each second",
				"listener", c.listener, "address", c.addr, "err", err)
		}
	}
	if b.tailnetErr != nil && (srv.tailnetErr == nil || srv.tailnetErr.Error() != b.tailnetErr.Error()) {
		srv.log.Warn("tailnet listeners wait until the tailnet is up", "err", b.tailnetErr)
	}
	srv.unbound, srv.tailnetErr = unbound, b.tailnetErr
}

// lacksAddresses says whether a later try may bind more.
//
// +checklocks:srv.mu
func (srv *Server) lacksAddresses() bool { return srv.tailnetErr != nil || len(srv.unbound) > 0 }

// A wakeup makes a goroutine look again, soon.
type wakeup chan struct{}

func (w wakeup) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// followAddresses keeps the listeners bound to the addresses that they should have, this node's present ones
// among them, until ctx ends.
func (srv *Server) followAddresses(ctx context.Context) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-srv.addressesMoved:
		case <-retry.C:
		}
		srv.mu.Lock()
		listens, lacked, named := srv.plan.Needs.Listens, srv.lacksAddresses(), srv.namesInterface()
		srv.mu.Unlock()
		if len(listens) == 0 && !lacked && !named {
			continue
		}
		var addrs []netip.Addr
		var err error
		if len(listens) > 0 {
			addrs, err = selfAddrs(ctx, srv.tailnet) // which may take a while
		}
		srv.mu.Lock()
		srv.useTailnetAddrs(addrs)
		srv.rebindNow(err)
		lacks := srv.lacksAddresses()
		listens = srv.plan.Needs.Listens
		srv.mu.Unlock()
		if lacks {
			retry.Reset(rebindEvery)
		} else if lacked {
			srv.warnOfTailscaled(listens)
		}
	}
}

// bound are the addresses that should be bound now, what was bound for that and accepts nothing yet, and what
// is lacking.
type bound struct {
	want       []binding
	opened     map[string]*listenerSocket // by address
	failed     map[string]error           // by address
	clashes    map[lack]error             // of two listeners
	lacks      map[lack]error             // of interfaces
	tailnetErr error                      // why this node's addresses are not known
}

// bind binds what listeners want by cfg, and is not bound yet. tailnetErr is why this node's addresses are
// not known, or nil.
//
// +checklocks:srv.mu
func (srv *Server) bind(cfg *config.Config, listeners map[string]*listener, places map[string]place, tailnetErr error) bound {
	b := bound{tailnetErr: tailnetErr}
	want, lacks := bindings(cfg, listeners, srv.tailnetAddrs, places)
	b.lacks = lacks
	b.want, b.clashes = srv.apart(want)
	b.opened, b.failed = srv.bindMissing(b.want)
	return b
}

// rebindNow brings the sockets in line with what should be bound now. tailnetErr is as in bind.
//
// +checklocks:srv.mu
func (srv *Server) rebindNow(tailnetErr error) {
	defer srv.tellOthers()
	if srv.isClosed || srv.isFrozen {
		return
	}
	srv.refreshInterfaces()
	b := srv.bind(srv.plan.Config, srv.listeners, srv.places, tailnetErr)
	srv.rebind(b.want, b.opened)
	srv.noteUnbound(b)
}

// selfAddrs asks tailscaled for this node's addresses.
func selfAddrs(ctx context.Context, c *tailnet.Client) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return c.SelfAddrs(ctx)
}

// useTailnetAddrs takes what selfAddrs returned. Without an answer the last known ones stay, and so what is
// bound stays bound: tailscaled may only be restarting.
//
// +checklocks:srv.mu
func (srv *Server) useTailnetAddrs(addrs []netip.Addr) {
	if len(addrs) > 0 {
		srv.tailnetAddrs = addrs
	}
}
