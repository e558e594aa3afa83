// Package tailnet asks the local tailscaled who is on the tailnet.
//
// It turns node names into addresses ([Client.Resolve]), addresses into identities ([Client.WhoIs]) and tells
// which addresses are this node's own ([Client.SelfAddrs]). All of it comes from tailscaled's LocalAPI, a
// unix socket; nothing here opens a connection to a peer.
//
// # What is remembered, and for how long
//
// One Status answer is kept as an immutable table. While [Client.Run] watches tailscaled's notification bus
// the table has no age: every change of the netmap replaces it. Without the watch an answer is used for a
// second, then asked for again. A daemon that is gone is an error at once, for its routes went with it and
// the kernel would send packets for tailnet addresses to the default gateway. A daemon that is there and
// doesn't answer in time leaves what it said last in use for [staleFor].
//
// Identities are kept only while the watch is on, and every netmap change forgets all of them: an answer
// outlives the assignment of an address by no more than tailscaled takes to write the notification.
//
// # The socket
//
// [New] takes its path; empty means the environment's TAILSPLICE_TAILSCALED_SOCKET, for labs and unusual
// installations, and else the platform's default. Reading needs no privilege on Linux.
//
// Its files:
//
//	tailnet.go      the client of the LocalAPI, and what of tailscaled keeps connections from coming in
//	table.go        one Status answer: nodes by name and by address
//	watch.go        the notification bus
//	identity.go     who has an address
//	certificate.go  certificates of *.ts.net
//	errors.go       why an answer could not be had
package tailnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/paths"
)

// SocketEnv is the environment variable that names tailscaled's socket when [New] is given none.
const SocketEnv = "TAILSPLICE_TAILSCALED_SOCKET"

const (
	freshFor   = time.Second      // how long a Status answer is good without a watch
	staleFor   = 30 * time.Second // how long the last answer of a daemon that hangs is good
	askTimeout = 3 * time.Second  // bounds one LocalAPI request
	startWait  = 5 * time.Second  // how long Resolve waits for a tailscaled that is starting
)

// Client is the tailnet as tailscaled sees it. Its methods, with or without Run, are for any goroutine.
type Client struct {
	lc     *local.Client
	socket string
	log    *slog.Logger
	flight singleflight.Group
	certs  certCache

	mu sync.Mutex
	// +checklocks:mu
	known
}

// known is what tailscaled has said.
type known struct {
	table     *table    // the last Status, nil before the first
	noted     time.Time // when a table older than that became doubtful: a change, or the end of the watch
	good      time.Time // when the table was last known to be right
	live      bool      // the watch is on
	lost      bool      // the watch failed, and that was logged
	suffix    string    // MagicDNS suffix, from the table or a later notification
	gen       uint64    // counts what invalidates identities
	whois     map[netip.Addr]whoisEntry
	changed   chan struct{} // closed and replaced with each new table
	callbacks []func()
	announced *table // what the callbacks were last called for; Run's alone
}

// New returns a client of the tailscaled at socket. An empty socket means $TAILSPLICE_TAILSCALED_SOCKET, and
// if that is empty too the platform's default. It connects to nothing yet, and there is nothing to close.
func New(socket string, log *slog.Logger) *Client {
	given := cmp.Or(socket, os.Getenv(SocketEnv))
	c := &Client{socket: cmp.Or(given, paths.DefaultTailscaledSocket()), log: log,
		known: known{whois: map[netip.Addr]whoisEntry{}, changed: make(chan struct{})}}
	c.lc = &local.Client{
		Socket: c.socket,
		// The graphical macOS client has no socket: unless one was asked for, the library finds its port.
		UseSocketOnly: given != "" || runtime.GOOS != "darwin",
	}
	if c.lc.UseSocketOnly {
		c.lc.Dial = c.dialSocket
	}
	return c
}

// dialSocket reports our own error. The library would run systemctl for a hint where the socket is missing.
func (c *Client) dialSocket(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, socketError(c.socket, err)
	}
	return conn, nil
}

// Contains reports whether a is in the ranges that Tailscale assigns from: 100.64.0.0/10 and
// fd7a:115c:a1e0::/48. An IPv4-mapped a counts as IPv4. It doesn't say that a node has this address.
func Contains(a netip.Addr) bool {
	a = a.Unmap()
	return tailnet4.Contains(a) || tailnet6.Contains(a)
}

// ContainsPrefix reports whether all of p is in one of these ranges.
func ContainsPrefix(p netip.Prefix) bool {
	return slices.ContainsFunc([]netip.Prefix{tailnet4, tailnet6}, func(r netip.Prefix) bool {
		return p.Bits() >= r.Bits() && r.Contains(p.Addr())
	})
}

// Source: https://tailscale.com/kb/1015/100.x-addresses and kb/1033.
var (
	tailnet4 = netip.MustParsePrefix("100.64.0.0/10")
	tailnet6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
)

// Resolve returns the tailnet addresses of node, at least one: IPv4 first if the node has both. node is a
// name in this node's own tailnet ("home"), a fully qualified name ("home.tail1234.ts.net", trailing dot or
// not; the only way to name a node that another tailnet shares with this one), or a tailnet address that some
// node has, which is returned alone. Case doesn't matter.
//
// A node that is offline is resolved all the same, see [Client.Presence]. All errors but those of ctx are an
// [*Error]. A tailscaled that is starting is waited for, 5 s at most.
func (c *Client) Resolve(ctx context.Context, node string) ([]netip.Addr, error) {
	return c.resolve(ctx, node, false)
}

// Refresh is Resolve with an answer that tailscaled gave after the call began.
func (c *Client) Refresh(ctx context.Context, node string) ([]netip.Addr, error) {
	return c.resolve(ctx, node, true)
}

func (c *Client) resolve(ctx context.Context, node string, fresh bool) ([]netip.Addr, error) {
	t, err := c.running(ctx, fresh)
	if err != nil {
		return nil, err
	}
	addrs, err := t.resolve(node)
	if err == nil || fresh {
		return addrs, err
	}
	// Unknown as of that table: it may have come since.
	c.mu.Lock()
	behind := t.asked.Before(c.noted) || !c.live && time.Since(t.asked) > freshFor
	c.mu.Unlock()
	if !behind {
		return nil, err
	}
	if t, err = c.running(ctx, true); err != nil {
		return nil, err
	}
	return t.resolve(node)
}

// SelfAddrs returns this node's tailnet addresses, at least one, IPv4 first. Errors are [Client.Resolve]'s.
func (c *Client) SelfAddrs(ctx context.Context) ([]netip.Addr, error) {
	t, err := c.running(ctx, false)
	if err != nil {
		return nil, err
	}
	return slices.Clone(t.self.addrs), nil
}

// Self returns this node's identity. Errors are those of [Client.Resolve].
func (c *Client) Self(ctx context.Context) (Identity, error) {
	t, err := c.running(ctx, false)
	if err != nil {
		return Identity{}, err
	}
	return t.identity(t.self), nil
}

// Presence tells, for messages and waits, whether control has a connection to node, and when it was last seen
// if not (zero if unknown). It asks nobody; ok is false for a node that isn't in the table.
func (c *Client) Presence(node string) (online bool, seen time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.find(node); n != nil {
		return n.online, n.seen, true
	}
	return false, time.Time{}, false
}

// find is the node of that name in the last table, or nil.
//
// +checklocks:c.mu
func (c *Client) find(name string) *node {
	if c.table == nil {
		return nil
	}
	n, _ := c.table.lookup(name)
	return n
}

// Namesake returns a node that is online and may be the machine that node, which is not, once was: home-1 for
// home. A machine set up anew gets such a name while the old one is listed. "" is none; it asks nobody.
func (c *Client) Namesake(node string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.find(node)
	if n == nil || n.online {
		return ""
	}
	for _, o := range c.table.nodes() {
		if o != n && o.online && o.shared == n.shared && withoutNumber(o.fqdn) == withoutNumber(n.fqdn) {
			if o.shared {
				return o.fqdn
			}
			return o.short
		}
	}
	return ""
}

// CheckPath says whether a connection to remote that the kernel gave the address local goes through the
// tailnet. It doesn't when tailscaled's routes are missing, and then remote may be anybody's, for
// 100.64.0.0/10 is also what providers use for their own networks.
func (c *Client) CheckPath(local, remote netip.Addr) error {
	if Contains(local) {
		return nil
	}
	return &Error{Kind: KindDown, Socket: c.socket, msg: "the kernel sent " + remote.String() + " out from " + local.String() +
		", not through the tailnet: tailscaled's interface or routes are missing; see `tailscale status` and `ip route show table 52`"}
}

// OnChange calls f whenever the netmap changed: addresses of this node or of others, nodes added, removed or
// renamed, and when tailscaled comes or goes, but not for a node's presence. f runs on a goroutine of
// [Client.Run], one at a time, so it should be quick; it may call the client.
func (c *Client) OnChange(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.callbacks = append(c.callbacks, f)
}

func (c *Client) notifyChange() {
	c.mu.Lock()
	callbacks := slices.Clone(c.callbacks)
	c.mu.Unlock()
	for _, f := range callbacks {
		f()
	}
}

// running returns the table of a tailscaled that is up, waiting for one that is just starting.
func (c *Client) running(ctx context.Context, fresh bool) (*table, error) {
	deadline := time.Now().Add(startWait)
	for {
		t, changed, err := c.current(ctx, fresh)
		if err != nil {
			return nil, err
		}
		if err = t.usable(c.socket); err == nil {
			return t, nil
		}
		if !t.starting() || !time.Now().Before(deadline) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err // "is starting" tells more than a deadline
		case <-changed:
		case <-time.After(200 * time.Millisecond): // without a watch nothing is signalled
		}
	}
}

// current returns the table that answers now, and a channel that is closed when another takes its place.
// While the watch is on, a table that a change has overtaken is good enough: its successor is on its way.
func (c *Client) current(ctx context.Context, fresh bool) (*table, <-chan struct{}, error) {
	now := time.Now()
	c.mu.Lock()
	t, changed, good, need := c.table, c.changed, c.good, c.noted
	live := c.live
	c.mu.Unlock()
	if t != nil && !fresh && (live || !t.asked.Before(need) && now.Sub(t.asked) < freshFor) {
		return t, changed, nil
	}
	if fresh {
		need = now
	}
	for {
		// Not this caller's ctx: all who ask now share the answer.
		got := c.flight.DoChan("status", func() (any, error) { return c.ask(context.WithoutCancel(ctx)) })
		select {
		case <-ctx.Done():
			return nil, nil, &Error{Kind: KindAbsent, Socket: c.socket, Err: ctx.Err(), hangs: true,
				msg: "tailscaled at " + c.socket + " did not answer in time"}
		case r := <-got:
			if r.Err != nil {
				// Hanging is not being gone: what it said a moment ago still holds.
				if e, ok := errors.AsType[*Error](r.Err); ok && e.hangs && t != nil && !fresh && now.Sub(good) < staleFor {
					return t, changed, nil
				}
				return nil, nil, r.Err
			}
			if t := r.Val.(*table); !t.asked.Before(need) {
				return t, changed, nil
			} // else it was on its way already, the next one is not
		}
	}
}

// ask requests the Status and publishes it. Every error is an *Error.
func (c *Client) ask(ctx context.Context) (*table, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	asked := time.Now()
	st, err := c.lc.Status(ctx)
	if err != nil {
		return nil, localError(c.socket, err)
	}
	t := newTable(st, asked)

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.table != nil && asked.Before(c.table.asked) {
		return t, nil // a later request was quicker; its answer stays
	}
	if c.table == nil || !t.sameAs(c.table) {
		c.forgetIdentitiesLocked()
	}
	if !asked.Before(c.noted) {
		c.suffix = t.suffix // else a notification told a newer one
	}
	c.table, c.good = t, asked
	close(c.changed)
	c.changed = make(chan struct{})
	return t, nil
}

// states that pass by themselves.
func (t *table) starting() bool {
	return t.state == ipn.Starting.String() || t.state == ipn.NoState.String()
}

// Inbound is what tailscaled's own settings do to connections to this node's tailnet addresses.
type Inbound struct {
	ShieldsUp bool // it refuses all of them
	// it answers on these ports itself, for "tailscale serve" or "tailscale funnel"
	Served map[uint16]string
}

// Inbound asks tailscaled for these settings. All errors but those of ctx are an [*Error].
func (c *Client) Inbound(ctx context.Context) (Inbound, error) {
	prefs, err := c.lc.GetPrefs(ctx)
	if err != nil {
		return Inbound{}, localError(c.socket, err)
	}
	serve, err := c.lc.GetServeConfig(ctx)
	if err != nil {
		return Inbound{}, localError(c.socket, err)
	}
	in := Inbound{ShieldsUp: prefs.ShieldsUp, Served: map[uint16]string{}}
	in.add(serve)
	for _, f := range serve.Foreground { // of commands that run in a terminal
		in.add(f)
	}
	return in, nil
}

func (in *Inbound) add(s *ipn.ServeConfig) {
	if s == nil {
		return
	}
	for port := range s.TCP {
		in.Served[port] = "tailscale serve"
	}
	for at, on := range s.AllowFunnel {
		if port, err := at.Port(); err == nil && on && in.Served[port] != "" {
			in.Served[port] = "tailscale funnel"
		}
	}
}

// Problem says why no connection comes in on that port of this node's tailnet addresses, what to do, or "".
func (in Inbound) Problem(port uint16) string {
	switch who := in.Served[port]; {
	case who != "":
		return fmt.Sprintf("`%s` has port %d of this node, so tailscaled answers there itself: `%s status` shows it, `tailscale serve reset` ends all of it; or listen on another port", who, port, who)
	case in.ShieldsUp:
		return "shields are up on this node, so tailscaled refuses all connections from the tailnet: `tailscale set --shields-up=false`"
	}
	return ""
}
