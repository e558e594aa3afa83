package tailnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/client/tailscale/apitype"
)

const (
	whoisFor = 30 * time.Second // bounds how long an identity is believed, beside the watch
	// strangerFor is how long an unknown address is remembered, so that a busy stranger costs few requests.
	strangerFor = 2 * time.Second
	whoisMost   = 16384 // bounds how many addresses are remembered
)

// Identity is who uses a tailnet address.
type Identity struct {
	Node        string       // first label of FQDN
	FQDN        string       // lower case, no trailing dot
	Shared      bool         // the node belongs to another tailnet, which shares it with this one
	User        string       // login of the owner, "" for a tagged node
	DisplayName string       // of the owner, "" for a tagged node
	ProfilePic  string       // URL, or ""
	Tags        []string     // with their "tag:"; nil for a node of a user
	Addrs       []netip.Addr // all of the node's, IPv4 first
}

// String names the node and its owner, for logs.
func (i Identity) String() string {
	owner := i.User
	if len(i.Tags) > 0 {
		owner = strings.Join(i.Tags, ",")
	}
	name := i.Node
	if i.Shared {
		name = i.FQDN
	}
	return fmt.Sprintf("%s (%s)", name, owner)
}

// Matches reports whether pattern names this identity. It is one of:
//
//   - a tag, "tag:edge";
//   - a user's login, "me@example.com": any node of that user which has no tags
//     ("me@" stands for a login that has no domain, as Headscale's may);
//   - a node's fully qualified name, "home.tail1234.ts.net";
//   - a node's name in this tailnet, "home".
//
// Case doesn't matter. A node that another tailnet shares with this one is matched only by its user and its
// full name: its names and tags mean something else. Owners may rename machines: where it matters use tags.
func (i Identity) Matches(pattern string) bool {
	p := strings.ToLower(strings.TrimSpace(pattern))
	switch {
	case p == "":
		return false
	case strings.HasPrefix(p, "tag:"):
		return !i.Shared && slices.ContainsFunc(i.Tags, func(t string) bool { return strings.EqualFold(t, p) })
	case strings.Contains(p, "@"):
		if i.User == "" || len(i.Tags) > 0 {
			return false
		}
		return strings.EqualFold(i.User, p) || strings.EqualFold(i.User+"@", p)
	case strings.Contains(p, "."):
		p = strings.TrimSuffix(p, ".")
		return p != "" && i.FQDN == p
	}
	return !i.Shared && i.Node != "" && i.Node == p
}

// identity turns a node of the table into what WhoIs would say of it.
func (t *table) identity(n *node) Identity {
	return Identity{
		Node: n.short, FQDN: n.fqdn, Shared: n.shared,
		User: n.user.LoginName, DisplayName: n.user.DisplayName, ProfilePic: n.user.ProfilePicURL,
		Tags: slices.Clone(n.tags), Addrs: slices.Clone(n.addrs),
	}
}

// identityOf translates tailscaled's answer. suffix is this tailnet's.
func identityOf(w *apitype.WhoIsResponse, suffix string) Identity {
	id := Identity{FQDN: normalName(w.Node.Name), Tags: slices.Clone(w.Node.Tags)}
	id.Node, id.Shared = splitName(id.FQDN, suffix)
	if len(id.Tags) == 0 {
		id.Tags = nil
		id.User, id.DisplayName, id.ProfilePic = w.UserProfile.LoginName, w.UserProfile.DisplayName, w.UserProfile.ProfilePicURL
	}
	addrs := make([]netip.Addr, 0, len(w.Node.Addresses))
	for _, p := range w.Node.Addresses {
		if p.IsSingleIP() {
			addrs = append(addrs, p.Addr())
		}
	}
	id.Addrs = familyOrder(addrs)
	return id
}

type whoisEntry struct {
	id  Identity
	err error
	at  time.Time
}

// WhoIs returns who uses the tailnet address a. An address outside of the tailnet's ranges, or of no node, is
// an error that wraps [ErrNotPeer]; everything else is an [*Error]. It takes a LocalAPI request (about 1 ms)
// at first; while [Client.Run] watches, the answer is kept, for half a minute or until the netmap changes.
func (c *Client) WhoIs(ctx context.Context, a netip.Addr) (Identity, error) {
	a = a.Unmap().WithZone("")
	if id, err := c.Known(a); err != ErrMustAsk {
		return id, err
	}
	// The table is needed for the suffix, which tells own names from others'.
	t, err := c.running(ctx, false)
	if err != nil {
		return Identity{}, err
	}
	c.mu.Lock()
	gen, suffix := c.gen, cmp.Or(c.suffix, t.suffix)
	c.mu.Unlock()
	// One request for all who ask about a now; not with those before a change.
	got := c.flight.DoChan(fmt.Sprintf("whois %d %s", gen, a), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
		defer cancel()
		// Without a port, with which tailscaled also waits for connections that it forwards itself (365 ms).
		at := time.Now()
		w, err := c.lc.WhoIs(ctx, a.String())
		e := whoisEntry{at: at}
		switch {
		case errors.Is(err, local.ErrPeerNotFound):
			e.err = fmt.Errorf("%s is %w", a, ErrNotPeer)
		case err != nil:
			return Identity{}, localError(c.socket, err)
		default:
			e.id = identityOf(w, suffix)
		}
		c.rememberIdentity(a, e, gen)
		return e.id, e.err
	})
	select {
	case <-ctx.Done():
		return Identity{}, &Error{Kind: KindAbsent, Socket: c.socket, Err: ctx.Err(), hangs: true,
			msg: "tailscaled at " + c.socket + " did not say in time who " + a.String() + " is"}
	case r := <-got:
		if r.Err != nil {
			return Identity{}, r.Err
		}
		return r.Val.(Identity).clone(), nil
	}
}

// Known is [Client.WhoIs] for callers that must not wait: the answer that needs no request, or [ErrMustAsk].
func (c *Client) Known(a netip.Addr) (Identity, error) {
	a = a.Unmap().WithZone("")
	if !Contains(a) {
		return Identity{}, fmt.Errorf("%s is %w", a, ErrNotPeer)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.whois[a]
	if !ok || !c.live || c.table.usable(c.socket) != nil || time.Since(e.at) >= e.keep() {
		return Identity{}, ErrMustAsk
	}
	return e.id.clone(), e.err
}

func (e whoisEntry) keep() time.Duration {
	if e.err != nil {
		return strangerFor
	}
	return whoisFor
}

// clone lets callers keep and change what they got.
func (i Identity) clone() Identity {
	i.Tags, i.Addrs = slices.Clone(i.Tags), slices.Clone(i.Addrs)
	return i
}

// rememberIdentity keeps e, unless the netmap changed since generation gen or nobody would tell when it does.
func (c *Client) rememberIdentity(a netip.Addr, e whoisEntry, gen uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.live || gen != c.gen {
		return
	}
	if len(c.whois) >= whoisMost {
		clear(c.whois)
	}
	c.whois[a] = e
}

// forgetIdentitiesLocked drops every identity, and those still being asked for.
//
// +checklocks:c.mu
func (c *Client) forgetIdentitiesLocked() {
	c.gen++
	clear(c.whois)
}
