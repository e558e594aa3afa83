package front

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/config"
)

// tailnetHost is the word that stands for this node's tailnet addresses in a
// listen address.
const tailnetHost = "tailnet"

// rebindEvery is how often a tailnet address that could not be bound is tried
// again: tailscaled announces an address shortly before the interface has it.
const rebindEvery = time.Second

// socket is one bound address. Its owner may change at a reload, the socket
// itself stays, so that no connection is refused meanwhile.
type socket struct {
	addr  string // as bound: "host:port"
	door  *door
	owner atomic.Pointer[listener]

	tailnet atomic.Bool  // for those who come by the tailnet: see admitTailnet
	via     atomic.Int64 // the interface by which they came last
}

// binding is one address that should be bound, and for whom.
type binding struct {
	addr    string // "host:port" for net.Listen
	written string // how the config has it
	owner   *listener
	tailnet bool // may come and go
}

// bindings lists what cfg wants bound, given this node's tailnet addresses.
func bindings(cfg *config.Config, owners map[string]*listener, tailnetAddrs []netip.Addr) []binding {
	var out []binding
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		for _, written := range l.Listen {
			host, port, _ := net.SplitHostPort(written) // config has checked it
			if host != tailnetHost {
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

// wantsTailnet says whether a listener binds tailnet addresses.
func wantsTailnet(cfg *config.Config) bool {
	return len(tailnetListens(cfg)) > 0
}

// tailnetListens returns the addresses to listen on that are on the tailnet, such as "tailnet:443".
func tailnetListens(cfg *config.Config) (out []string) {
	for i := range cfg.Listeners {
		for _, a := range cfg.Listeners[i].Listen {
			if strings.HasPrefix(a, tailnetHost+":") {
				out = append(out, a)
			}
		}
	}
	return out
}

// warnOfTailscaled logs what tailscaled's own settings keep from the tailnet listeners.
func (f *Front) warnOfTailscaled(cfg *config.Config) {
	listens := tailnetListens(cfg)
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
		port, _ := strconv.ParseUint(portOf(a), 10, 16)
		if problem := in.Problem(uint16(port)); problem != "" {
			f.log.Warn("no connection comes to a tailnet listener", "listen", a, "problem", problem)
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
func listen(addr string, leaving ...*door) (*door, error) {
	d, err := listenOnce(addr, nil)
	if len(leaving) == 0 || !errors.Is(err, syscall.EADDRINUSE) {
		return d, err
	}
	for _, l := range leaving {
		if shareErr := l.sharePort(true); shareErr != nil {
			return nil, err
		}
		defer l.sharePort(false)
	}
	d, err = listenOnce(addr, shareNewPort)
	if err != nil {
		return nil, err
	}
	if err := d.sharePort(false); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
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

func listenOnce(addr string, control func(network, address string, c syscall.RawConn) error) (*door, error) {
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
	return newDoor(ln.(*net.TCPListener))
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
// there yet. Errors of tailnet addresses are returned in pending, since they
// mend themselves; with any other error nothing stays open.
//
// f.mu is held.
func (f *Front) bindMissing(want []binding) (opened map[string]*socket, pending []error, err error) {
	opened = map[string]*socket{}
	var fatal []error
	wanted := map[string]bool{}
	for _, b := range want {
		wanted[b.addr] = true
	}
	leaving := map[string][]*door{} // by port
	for addr, s := range f.sockets {
		if !wanted[addr] {
			leaving[portOf(addr)] = append(leaving[portOf(addr)], s.door)
		}
	}
	for _, b := range want {
		if f.sockets[b.addr] != nil {
			continue
		}
		s, err := f.open(b.addr, leaving[portOf(b.addr)])
		switch {
		case err == nil:
			opened[b.addr] = s
		case b.tailnet:
			pending = append(pending, err)
		default:
			fatal = append(fatal, fmt.Errorf("listener %q: %w", b.owner.name, err))
		}
	}
	if len(fatal) > 0 {
		for _, s := range opened {
			s.door.Close()
		}
		return nil, nil, errors.Join(fatal...)
	}
	return opened, pending, nil
}

// open binds addr, and accepts nothing yet.
func (f *Front) open(addr string, leaving []*door) (*socket, error) {
	d, err := listen(addr, leaving...)
	if err != nil {
		return nil, err
	}
	s := &socket{addr: addr, door: d}
	if err := d.prepare(f, s); err != nil {
		d.Close()
		return nil, &bindError{addr, err}
	}
	return s, nil
}

// rebind makes the sockets those that want lists: hands over what stays,
// starts what bindMissing has opened, closes the rest.
//
// f.mu is held.
func (f *Front) rebind(want []binding, opened map[string]*socket) {
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
			f.log.Info("listening", "address", boundAddress(b.addr, s.door), "listener", b.owner.name, "mode", b.owner.mode)
			s.door.accept()
		}
	}
	for addr, s := range f.sockets {
		if !wanted[addr] {
			s.door.Close()
			delete(f.sockets, addr)
			f.log.Info("stopped listening", "address", addr)
		}
	}
}

// lookAtTailnet makes followTailnet look again, soon.
func (f *Front) lookAtTailnet() {
	select {
	case f.tailnetMoved <- struct{}{}:
	default:
	}
}

// followTailnet keeps the tailnet listeners bound to this node's present
// addresses until ctx ends.
func (f *Front) followTailnet(ctx context.Context) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	var lastErr string
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.tailnetMoved:
		case <-retry.C:
		}
		again, err := f.bindTailnet(ctx)
		if err != nil && err.Error() != lastErr {
			f.log.Warn("tailnet listeners wait", "err", err)
		}
		if err == nil && lastErr != "" {
			f.mu.Lock()
			cfg := f.cfg
			f.mu.Unlock()
			f.warnOfTailscaled(cfg)
		}
		lastErr = ""
		if err != nil {
			lastErr = err.Error()
		}
		if again {
			retry.Reset(rebindEvery)
		}
	}
}

// bindTailnet brings the sockets in line with the config and the tailnet
// addresses once. again says that a later try may do better.
func (f *Front) bindTailnet(ctx context.Context) (again bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || !wantsTailnet(f.cfg) {
		return false, nil
	}
	if err := f.refreshTailnetAddrs(ctx); err != nil {
		f.bindErr = err
		return true, err
	}
	want := bindings(f.cfg, f.listeners, f.tailnetAddrs)
	opened, pending, err := f.bindMissing(want)
	if err == nil {
		f.rebind(want, opened)
	}
	f.bindErr = errors.Join(append(pending, err)...)
	return f.bindErr != nil, f.bindErr
}

// refreshTailnetAddrs asks tailscaled for this node's addresses. With an error
// the last known ones stay, and so what is bound stays bound: tailscaled may
// only be restarting.
//
// f.mu is held.
func (f *Front) refreshTailnetAddrs(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	addrs, err := f.tailnet.SelfAddrs(ctx)
	if err == nil {
		f.tailnetAddrs = addrs
	}
	return err
}
