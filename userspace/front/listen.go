package front

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

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// rebindEvery is how often an address that could not be bound is tried again: who
// has the port may end, and an interface gets its address late. tailscaled, too,
// announces an address shortly before the interface has it.
const rebindEvery = time.Second

// listenerSocket is one bound address. Its owner may change at a reload, the socket
// itself stays, so that no connection is refused meanwhile.
type listenerSocket struct {
	written  string   // what was asked for: "host:port"
	addr     net.Addr // as bound
	acceptor          // how this system accepts
	owner    atomic.Pointer[listener]

	tailnet atomic.Bool  // for those who come by the tailnet: see admitTailnet
	via     atomic.Int64 // the interface by which they came last
}

// binding is one address that should be bound, and for whom.
type binding struct {
	addr    string // "host:port" for net.Listen
	written string // how the config has it
	owner   *listener
	tailnet bool // may come and go
	place   bool // likewise: of an interface or a host
}

// bindings lists what cfg wants bound now, given this node's tailnet addresses and those of the places that it
// names: nothing for listeners that are shut.
//
// f.mu is held.
func bindings(cfg *config.Config, owners map[string]*listener, tailnetAddrs []netip.Addr,
	places map[string]place) []binding {
	var out []binding
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		if l.WhileDown == whileDownClose && owners[l.Name].shut {
			continue
		}
		for _, written := range l.Listen {
			host, port, _ := net.SplitHostPort(written) // config has checked it
			if p, named := places[host]; named {
				for _, a := range p.addrs {
					b := binding{addr: netip.AddrPortFrom(a, parsePort(port)).String(), written: written,
						owner: owners[l.Name], place: p.isInterface}
					// Two names of one listener may have the same address.
					if !slices.ContainsFunc(out, func(o binding) bool { return o.addr == b.addr && o.owner == b.owner }) {
						out = append(out, b)
					}
				}
				continue
			}
			if host != config.Tailnet {
				out = append(out, binding{addr: written, written: written, owner: owners[l.Name]})
				continue
			}
			for _, a := range tailnetAddrs {
				out = append(out, binding{addr: net.JoinHostPort(a.String(), port), written: written, owner: owners[l.Name], tailnet: true})
			}
		}
	}
	return out
}

// warnOfTailscaled logs what tailscaled's own settings keep from those addresses of listeners.
func (f *Front) warnOfTailscaled(listens []string) {
	if len(listens) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, 10*time.Second)
	defer cancel()
	in, err := f.tailnet.Inbound(ctx)
	if err != nil {
		return // whatever else needs tailscaled says so
	}
	for _, a := range listens {
		if problem := in.Problem(parsePort(portOf(a))); problem != "" {
			f.log.Warn("a tailnet listener gets no connections", "listen", a, "problem", problem)
		}
	}
}

// listen binds addr. MPTCP is off because a real MPTCP socket can not be
// spliced in the kernel. The error says what to do about it.
//
// leaving are sockets on the same port that are about to be closed. Where one
// of them is in the way (":443" becomes "192.0.2.1:443"), both are bound for a
// moment, so that the old one need not be closed before it is known that the
// new one works. SO_REUSEPORT allows that, and is asked for then only: it would
// let a second daemon take the port unnoticed.
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

// bindMissing opens what want lists and is not bound yet, and accepts nothing
// there yet. failed says why the rest could not be opened, by address.
//
// f.mu is held.
func (f *Front) bindMissing(want []binding) (opened map[string]*listenerSocket, failed map[string]error) {
	opened, failed = map[string]*listenerSocket{}, map[string]error{}
	wanted := map[string]bool{}
	for _, b := range want {
		wanted[b.addr] = true
	}
	leaving := map[string][]*listenerSocket{} // by port
	for addr, s := range f.sockets {
		if !wanted[addr] {
			leaving[portOf(addr)] = append(leaving[portOf(addr)], s)
		}
	}
	for _, b := range want {
		if f.sockets[b.addr] != nil {
			continue
		}
		if s, err := f.open(b.addr, leaving[portOf(b.addr)]); err != nil {
			failed[b.addr] = err
		} else {
			opened[b.addr] = s
		}
	}
	return opened, failed
}

// open binds addr, and accepts nothing yet.
func (f *Front) open(addr string, leaving []*listenerSocket) (*listenerSocket, error) {
	s, err := listen(addr, leaving...)
	if err != nil {
		return nil, err
	}
	if err := s.prepare(f); err != nil {
		s.Close()
		return nil, &bindError{addr, err}
	}
	return s, nil
}

// rebind makes the sockets those that want lists: hands over what stays,
// starts what bindMissing has opened, closes the rest.
//
// f.mu is held.
func (f *Front) rebind(want []binding, opened map[string]*listenerSocket) {
	wanted := map[string]bool{}
	for _, b := range want {
		wanted[b.addr] = true
		if s := f.sockets[b.addr]; s != nil {
			s.owner.Store(b.owner)
			s.tailnet.Store(b.tailnet)
		} else if s := opened[b.addr]; s != nil {
			s.owner.Store(b.owner)
			s.tailnet.Store(b.tailnet)
			f.sockets[b.addr] = s
			ports := maps.Clone(*f.ports.Load())
			ports[addrPort(s.addr).Port()] = true
			f.ports.Store(&ports)
			f.log.Info("listening", "address", s.bound(), "listener", b.owner.name, "mode", b.owner.mode)
			s.accept()
		}
	}
	for addr, s := range f.sockets {
		if !wanted[addr] {
			s.Close()
			delete(f.sockets, addr)
			f.log.Info("stopped listening", "address", addr)
		}
	}
}

// noteUnbound remembers what the listeners do without: what of want could not be bound, and clashes of
// addresses, and interfaces without one. So it does why this node's tailnet addresses are not known, if they
// are not. It logs what is new of that.
//
// f.mu is held.
func (f *Front) noteUnbound(want []binding, failed map[string]error, clashes map[lack]error, tailnet error) {
	unbound := lacking(f.plan.Config, f.listeners, f.places)
	maps.Copy(unbound, clashes)
	for _, b := range want {
		if err := failed[b.addr]; err != nil {
			unbound[lack{b.addr, b.owner.name}] = err
		}
	}
	for c, err := range unbound {
		if before := f.unbound[c]; before == nil || before.Error() != err.Error() {
			f.log.Warn("an address of a listener can't be bound yet: it is tried again each second",
				"listener", c.listener, "address", c.addr, "err", err)
		}
	}
	if tailnet != nil && (f.tailnetErr == nil || f.tailnetErr.Error() != tailnet.Error()) {
		f.log.Warn("tailnet listeners wait until the tailnet is up", "err", tailnet)
	}
	f.unbound, f.tailnetErr = unbound, tailnet
}

// lacksAddresses says whether a later try may bind more.
//
// f.mu is held.
func (f *Front) lacksAddresses() bool { return f.tailnetErr != nil || len(f.unbound) > 0 }

// lookAtAddresses makes followAddresses look again, soon.
func (f *Front) lookAtAddresses() {
	select {
	case f.addressesMoved <- struct{}{}:
	default:
	}
}

// followAddresses keeps the listeners bound to the addresses that they should
// have, this node's present ones among them, until ctx ends.
func (f *Front) followAddresses(ctx context.Context) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.addressesMoved:
		case <-retry.C:
		}
		f.mu.Lock()
		listens, lacked, named := f.plan.Needs.Listens, f.lacksAddresses(), f.namesInterface()
		f.mu.Unlock()
		if len(listens) == 0 && !lacked && !named {
			continue
		}
		var addrs []netip.Addr
		var err error
		if len(listens) > 0 {
			addrs, err = selfAddrs(ctx, f.tailnet) // which may take a while
		}
		f.mu.Lock()
		f.useTailnetAddrs(addrs)
		f.rebindNow(err)
		lacks := f.lacksAddresses()
		listens = f.plan.Needs.Listens
		f.mu.Unlock()
		if lacks {
			retry.Reset(rebindEvery)
		} else if lacked {
			f.warnOfTailscaled(listens)
		}
	}
}

// rebindNow brings the sockets in line with what should be bound now. tailnet is
// why this node's addresses are not known, or nil.
//
// f.mu is held.
func (f *Front) rebindNow(tailnet error) {
	if f.closed {
		return
	}
	f.refreshInterfaces()
	want := bindings(f.plan.Config, f.listeners, f.tailnetAddrs, f.places)
	want, clashes := f.apart(want)
	opened, failed := f.bindMissing(want)
	f.rebind(want, opened)
	f.noteUnbound(want, failed, clashes, tailnet)
}

// selfAddrs asks tailscaled for this node's addresses.
func selfAddrs(ctx context.Context, c *tailnet.Client) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return c.SelfAddrs(ctx)
}

// useTailnetAddrs takes what selfAddrs returned. Without an answer the last
// known ones stay, and so what is bound stays bound: tailscaled may only be
// restarting.
//
// f.mu is held.
func (f *Front) useTailnetAddrs(addrs []netip.Addr) {
	if len(addrs) > 0 {
		f.tailnetAddrs = addrs
	}
}
