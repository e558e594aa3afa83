// Package dial opens the upstream connection of a flow.
//
// A [Target] is a TCP host, a tailnet node, a container or a unix socket. Names of nodes and containers are
// resolved by what the [Dialer] is given, host names by DNS. The connections are plain kernel sockets,
// *net.TCPConn or *net.UnixConn, so that a datapath may splice them: never Multipath TCP, whose sockets can't
// be spliced, and always TCP_NODELAY.
//
// Its files:
//
//	dial.go         a target becomes a connection
//	targets.go      for who has several targets
//	addresses.go    which of its addresses are tried, and in which order
//	begin_linux.go  a connection that is begun and not waited for, for an event loop
//	outcomes.go     how the last try to connect to each target went
//	disabled.go     targets that an operator has disabled
//	errors.go       why a target could not be reached, in words
package dial

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/balance"
)

const (
	DefaultTimeout = 10 * time.Second // [Dialer].Timeout if zero
	// offlineTimeout is all that a node gets which control says is offline; it may just be coming back.
	offlineTimeout = 4 * time.Second
	// offlineGrace is how long a node that was seen gets the whole timeout: it may be changing networks.
	offlineGrace = time.Minute
	// fallbackDelay is an address's time before the next one is tried beside it (RFC 8305 section 8).
	fallbackDelay = 250 * time.Millisecond
	// tailnetDelay is fallbackDelay for nodes, whose addresses all take one tunnel, which may have to be set
	// up.
	tailnetDelay = time.Second
	retryDelay   = 250 * time.Millisecond // the pause before a quick failure is tried again
	quick        = time.Second            // what counts as a quick failure
)

// The schemes of a [Target].
const (
	TCP     = "tcp"
	Tailnet = "tailnet"
	Docker  = "docker"
	Unix    = "unix"
)

// Target is where to connect. Its fields are those of the configuration's targets, so one converts to it.
type Target struct {
	Scheme string // "tcp", "tailnet", "docker" or "unix"
	Host   string // host name or address, node, container or service; "" for unix
	Port   uint16 // 0 for unix
	Path   string // of the unix socket, else ""
}

// String returns the form that the configuration uses.
func (t Target) String() string {
	switch t.Scheme {
	case Unix:
		return "unix://" + t.Path
	case TCP:
		return net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port)))
	}
	return t.Scheme + "://" + net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port)))
}

// Resolver turns the name of a node or a container into addresses, at least one if err is nil, in order of
// preference. Its errors may have the methods Reason() string, one of the [Reason] constants, and Temporary()
// bool, which says that another try within a second may do.
//
// A Resolver may also have the methods of [Refresher], [Presence], [Namesake] and [PathChecker].
type Resolver interface {
	Resolve(ctx context.Context, name string) ([]netip.Addr, error)
}

// Refresher is a [Resolver] that remembers, and can be made to ask anew.
type Refresher interface {
	Refresh(ctx context.Context, name string) ([]netip.Addr, error)
}

// Presence is a [Resolver] that knows whether a machine is connected, and when it was last seen (or zero).
type Presence interface {
	Presence(name string) (online bool, seen time.Time, ok bool)
}

// Namesake is a [Resolver] that may know a connected machine in place of the one of that name; else "".
type Namesake interface {
	Namesake(name string) string
}

// PathChecker is a [Resolver] that tells from a connection's addresses that it took the wrong way.
type PathChecker interface {
	CheckPath(local, remote netip.Addr) error
}

// Dialer opens connections. Its fields must not change in use; its zero value dials TCP and unix targets.
type Dialer struct {
	Tailnet   Resolver      // for tailnet targets; nil refuses them
	Container Resolver      // for docker targets; nil refuses them
	Timeout   time.Duration // for all of it, names and retries included; 0 is DefaultTimeout
	// From gives the client's own address, where that fits: not every address of a target is as good
	AsClient bool
	DNS      *net.Resolver // for host names; nil is the system's
	Past     *Past         // what is learnt about addresses; nil remembers nothing
	Disabled *Disabled     // targets that are not dialled; nil: none

	// From, if not nil, readies a dialer for an address: it may give the connection an address of its own.
	From func(d *net.Dialer, to netip.Addr)

	Once bool // a quick failure is final: the caller has another target to try
}

// Dial connects to t, which the caller then owns: a *net.TCPConn or, for a unix target, a *net.UnixConn.
//
// All addresses of the target are tried: the next as soon as one fails, or beside those that are slow to
// answer. First come those on networks of this host, and of equals those of prefer's family (that of the
// downstream; an invalid prefer has none); last come those that failed lately. If that was quick and none
// answered, the name is resolved anew and tried once more, a container twice, for the upstream may just be
// restarting. Every error is an [*Error]; one whose Reason is [Canceled] says that ctx ended and nothing
// about the target.
func (d *Dialer) Dial(ctx context.Context, t Target, prefer netip.Addr) (net.Conn, error) {
	if err := d.Disabled.Check(t, t.String()); err != nil {
		return nil, err
	}
	began := time.Now()
	call, cancel := context.WithTimeout(ctx, cmp.Or(d.Timeout, DefaultTimeout))
	defer cancel()

	conn, failure := d.once(call, t, prefer, false)
	pauses := []time.Duration{retryDelay}
	if t.Scheme == Docker && failure != nil && errors.Is(failure, syscall.ECONNREFUSED) {
		// Most likely it was started just now, and listens in a moment.
		pauses = []time.Duration{retryDelay / 5, retryDelay - retryDelay/5}
	}
	for _, pause := range pauses {
		if failure == nil || !failure.again || d.Once || time.Since(began) >= quick {
			break
		}
		select {
		case <-call.Done():
		case <-time.After(pause):
			conn, failure = d.once(call, t, prefer, true)
		}
	}
	if failure == nil {
		return conn, nil
	}
	return nil, d.explain(ctx, t, failure, time.Since(began))
}

// resolver returns what resolves t's host, or nil.
func (d *Dialer) resolver(t Target) Resolver {
	switch t.Scheme {
	case Tailnet:
		return d.Tailnet
	case Docker:
		return d.Container
	}
	return nil
}

// once resolves t and tries its addresses.
func (d *Dialer) once(ctx context.Context, t Target, prefer netip.Addr, fresh bool) (net.Conn, *failure) {
	if t.Scheme == Unix {
		nd := dialer()
		c, err := nd.DialContext(ctx, "unix", t.Path)
		if err != nil {
			return nil, &failure{err: err, addr: t.Path, again: quickKind(err)}
		}
		return c, nil
	}
	addrs, err := d.lookup(ctx, t, fresh)
	if err != nil {
		var temporary interface{ Temporary() bool }
		return nil, &failure{err: err, again: errors.As(err, &temporary) && temporary.Temporary()}
	}
	if d.longOffline(t) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, offlineTimeout)
		defer cancel()
	}
	return d.race(ctx, t, d.past().order(addrs, t.Port, prefer))
}

// past is what d goes by: nothing from a client's address, since what fails there may well answer this host.
func (d *Dialer) past() *Past {
	if d.AsClient {
		return nil
	}
	return d.Past
}

// IsOffline reports whether t's machine is known not to be connected. It may answer all the same.
func (d *Dialer) IsOffline(t Target) bool {
	_, isOffline := d.offlineSince(t)
	return isOffline
}

// offlineSince says when t's machine was seen last, if it is known not to be connected.
func (d *Dialer) offlineSince(t Target) (seen time.Time, isOffline bool) {
	presence, ok := d.resolver(t).(Presence)
	if !ok {
		return seen, false
	}
	online, seen, known := presence.Presence(t.Host)
	return seen, known && !online && !seen.IsZero()
}

// longOffline reports whether t's machine went offline more than a moment ago.
func (d *Dialer) longOffline(t Target) bool {
	seen, isOffline := d.offlineSince(t)
	return isOffline && time.Since(seen) > offlineGrace
}

// lookup returns the addresses of t's host, at least one.
func (d *Dialer) lookup(ctx context.Context, t Target, fresh bool) ([]netip.Addr, error) {
	switch t.Scheme {
	case TCP:
		if a, err := netip.ParseAddr(strings.Trim(t.Host, "[]")); err == nil {
			return []netip.Addr{a.Unmap()}, nil
		}
		if isLocalhost(t.Host) {
			return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, nil
		}
		addrs, err := cmp.Or(d.DNS, net.DefaultResolver).LookupNetIP(ctx, "ip", t.Host)
		if err != nil {
			return nil, err
		}
		for i := range addrs {
			addrs[i] = addrs[i].Unmap()
		}
		return addrs, nil
	case Tailnet, Docker:
		r := d.resolver(t)
		if r == nil {
			return nil, errNoResolver
		}
		if again, ok := r.(Refresher); ok && fresh {
			return again.Refresh(ctx, t.Host)
		}
		return r.Resolve(ctx, t.Host)
	}
	return nil, errScheme
}

// isLocalhost reports whether a name is this host, whatever a name server says (RFC 6761 section 6.3).
func isLocalhost(name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// race connects to addrs, one after the other and beside the slow ones. It takes the first connection made.
func (d *Dialer) race(ctx context.Context, t Target, addrs []netip.Addr) (net.Conn, *failure) {
	check, _ := d.resolver(t).(PathChecker)
	if len(addrs) == 1 {
		return d.connect(ctx, netip.AddrPortFrom(addrs[0], t.Port), check)
	}
	delay := t.HeadStart()
	if d.AsClient { // the next one may be of another family, and see another address than the client's
		delay = tailnetDelay
	}
	past, again := d.past(), false
	var telling *failure
	race := balance.Race[netip.Addr, net.Conn]{
		Next: func() (a netip.Addr, ok bool) {
			if len(addrs) > 0 {
				a, addrs, ok = addrs[0], addrs[1:], true
			}
			return a, ok
		},
		Delay: func(netip.Addr) time.Duration { return delay },
		Try: func(ctx context.Context, a netip.Addr) (net.Conn, error) {
			c, f := d.connect(ctx, netip.AddrPortFrom(a, t.Port), check)
			if f != nil {
				return nil, f
			}
			return c, nil
		},
		Close: func(c net.Conn) { c.Close() },
		Lost: func(a netip.Addr, err error) {
			to := netip.AddrPortFrom(a, t.Port)
			f, ok := errors.AsType[*failure](err)
			if !ok {
				f = &failure{err: err, addr: to.String()}
			}
			if context.Cause(ctx) != balance.ErrSlow { // then another target was faster, which says nothing
				past.noteFailed(to, reasonOf(f.err))
			}
			again = again || f.again
			if telling == nil || telling.lesser(f) {
				telling = f
			}
		},
	}
	if a, c, ok := race.Run(ctx); ok {
		past.noteWorked(netip.AddrPortFrom(a, t.Port))
		return c, nil
	}
	telling.again = again
	return nil, telling
}

// connect makes one attempt.
func (d *Dialer) connect(ctx context.Context, to netip.AddrPort, check PathChecker) (net.Conn, *failure) {
	nd := dialer()
	if d.From != nil {
		d.From(&nd, to.Addr())
	}
	c, err := nd.DialContext(ctx, "tcp", to.String()) // DialTCP would bind a port for it first
	if err != nil {
		return nil, &failure{err: err, addr: to.String(), again: quickKind(err)}
	}
	if c.LocalAddr().String() == c.RemoteAddr().String() {
		// [net.Dialer] looks only thrice, and not at all where its own port was given
		tcpsock.ResetConn(c)
		return nil, &failure{err: ErrSelf, addr: to.String(), again: true}
	}
	if check != nil {
		if err := check.CheckPath(addrOf(c.LocalAddr()), to.Addr()); err != nil {
			c.Close()
			return nil, &failure{err: err, addr: to.String()}
		}
	}
	return c, nil
}

func dialer() net.Dialer {
	nd := net.Dialer{KeepAliveConfig: tcpsock.KeepAlive}
	nd.SetMultipathTCP(false)
	return nd
}

func addrOf(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// Literal is the address that t names without any lookup, if it is such a target.
func (t Target) Literal() (to netip.AddrPort, ok bool) {
	if t.Scheme != TCP {
		return netip.AddrPort{}, false
	}
	a, err := netip.ParseAddr(strings.Trim(t.Host, "[]"))
	if err != nil || a.Zone() != "" {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(a.Unmap(), t.Port), true
}
