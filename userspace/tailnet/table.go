package tailnet

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"

	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// table is one Status answer, immutable but for the nodes' presence, which the client's mutex guards.
type table struct {
	asked  time.Time // when it was asked for
	state  string    // ipn.State
	tun    bool      // tailscaled has a kernel interface
	suffix string    // MagicDNS suffix, lower case, no dots around it
	certs  []string  // names that tailscaled can get certificates for
	self   *node
	byName map[string]*node // short names of this tailnet, and all FQDNs
	byAddr map[netip.Addr]*node
	byID   map[tailcfg.NodeID]*node
}

// node is this node or a peer.
type node struct {
	id     tailcfg.NodeID
	short  string // first label of fqdn
	fqdn   string // lower case, no trailing dot
	shared bool   // of another tailnet
	addrs  []netip.Addr
	tags   []string
	user   tailcfg.UserProfile // zero if tagged
	online bool
	seen   time.Time // zero if unknown
}

func newTable(st *ipnstate.Status, asked time.Time) *table {
	t := &table{asked: asked, state: st.BackendState, tun: st.TUN, byName: map[string]*node{},
		byAddr: map[netip.Addr]*node{}, byID: map[tailcfg.NodeID]*node{}}
	for _, d := range st.CertDomains {
		t.certs = append(t.certs, normalName(d))
	}
	if st.CurrentTailnet != nil {
		t.suffix = normalName(st.CurrentTailnet.MagicDNSSuffix)
	}
	if st.Self != nil {
		t.self = t.add(st.Self, st.User)
	}
	for _, p := range st.Peer {
		t.add(p, st.User)
	}
	return t
}

func (t *table) add(p *ipnstate.PeerStatus, users map[tailcfg.UserID]tailcfg.UserProfile) *node {
	n := &node{id: p.NodeID, fqdn: normalName(p.DNSName), addrs: familyOrder(p.TailscaleIPs), online: p.Online, seen: p.LastSeen}
	n.short, n.shared = splitName(n.fqdn, t.suffix)
	if p.Tags != nil && p.Tags.Len() > 0 {
		n.tags = p.Tags.AsSlice()
	} else {
		n.user = users[p.UserID]
	}
	if n.fqdn != "" {
		t.byName[n.fqdn] = n
		if !n.shared {
			t.byName[n.short] = n
		}
	}
	for _, a := range n.addrs {
		t.byAddr[a] = n
	}
	t.byID[n.id] = n
	return n
}

// usable says why a table of this state can't answer, or nil.
func (t *table) usable(socket string) error {
	down := func(msg string) error { return &Error{Kind: KindDown, Socket: socket, State: t.state, msg: msg} }
	switch t.state {
	case ipn.Running.String():
	case ipn.NeedsLogin.String():
		return down("this machine is not logged in to a tailnet: run `tailscale up`")
	case ipn.NeedsMachineAuth.String():
		return down("this machine waits for an admin of the tailnet to approve it")
	case ipn.Stopped.String():
		return down("Tailscale is switched off on this machine: run `tailscale up`")
	case ipn.InUseOtherUser.String():
		return down("tailscaled is in use by another user of this machine")
	default:
		return &Error{Kind: KindDown, Socket: socket, State: t.state, temporary: true, msg: "tailscaled is still starting"}
	}
	if !t.tun {
		return down("tailscaled runs with --tun=userspace-networking, so the kernel has no way to the tailnet: run it with a TUN device")
	}
	if t.self == nil || len(t.self.addrs) == 0 {
		return down("this machine has no tailnet address yet")
	}
	return nil
}

// resolve returns the addresses that name stands for.
func (t *table) resolve(name string) ([]netip.Addr, error) {
	n, err := t.lookup(name)
	if err != nil {
		return nil, err
	}
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	if len(n.addrs) == 0 {
		return nil, &Error{Kind: KindUnknownNode, Node: name, msg: fmt.Sprintf("node %q has no address in this tailnet", name)}
	}
	return slices.Clone(n.addrs), nil
}

// lookup finds a node by name or address.
func (t *table) lookup(name string) (*node, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		if n := t.byAddr[a.Unmap()]; n != nil {
			return n, nil
		}
		return nil, &Error{Kind: KindUnknownNode, Node: name, msg: fmt.Sprintf("no node of this tailnet has the address %s", a)}
	}
	if n := t.byName[normalName(name)]; n != nil {
		return n, nil
	}
	return nil, &Error{Kind: KindUnknownNode, Node: name, msg: fmt.Sprintf("no node %q in this tailnet%s", name, t.suggest(normalName(name)))}
}

// suggest ends the message about an unknown name with what could be meant.
func (t *table) suggest(name string) string {
	short, _, _ := strings.Cut(name, ".")
	for _, n := range t.nodes() { // a shared-in node has no short name
		if n.shared && n.short == short {
			return fmt.Sprintf("; did you mean %q, which another tailnet shares with this one?", n.fqdn)
		}
	}
	if near := spelling.Nearest(name, slices.Sorted(maps.Keys(t.byName))); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	var own []string
	for _, n := range t.nodes() {
		if !n.shared && n != t.self {
			own = append(own, n.short)
		}
	}
	const few = 8 // more than fit in a line help nobody
	switch {
	case len(own) == 0:
		return ", which has no other node that this one may see"
	case len(own) <= few:
		return "; it has " + strings.Join(own, ", ")
	}
	return ""
}

// nodes returns all nodes that have a name, by name.
func (t *table) nodes() []*node {
	ns := slices.SortedFunc(maps.Values(t.byID), func(a, b *node) int { return strings.Compare(a.fqdn, b.fqdn) })
	return slices.DeleteFunc(ns, func(n *node) bool { return n.fqdn == "" })
}

// sameAs reports whether o has the same state, nodes, addresses, tags and owners, whoever is present.
func (t *table) sameAs(o *table) bool {
	if t.state != o.state || t.tun != o.tun || t.suffix != o.suffix || len(t.byID) != len(o.byID) ||
		(t.self == nil) != (o.self == nil) || t.self != nil && t.self.id != o.self.id {
		return false
	}
	for id, n := range t.byID {
		p := o.byID[id]
		if p == nil || n.fqdn != p.fqdn || !slices.Equal(n.addrs, p.addrs) || !slices.Equal(n.tags, p.tags) || n.user.ID != p.user.ID {
			return false
		}
	}
	return true
}

// normalName returns a DNS name in lower case without its trailing dot.
func normalName(s string) string { return strings.ToLower(strings.Trim(s, ".")) }

// splitName returns the first label of fqdn, and whether the rest is another tailnet's suffix.
func splitName(fqdn, suffix string) (short string, shared bool) {
	short, rest, _ := strings.Cut(fqdn, ".")
	return short, rest != suffix
}

// withoutNumber returns fqdn without the number that a name gets which is taken already.
func withoutNumber(fqdn string) string {
	short, rest, _ := strings.Cut(fqdn, ".")
	if i := strings.LastIndexByte(short, '-'); i > 0 && i < len(short)-1 && strings.Trim(short[i+1:], "0123456789") == "" {
		short = short[:i]
	}
	return short + "." + rest
}

// familyOrder returns addrs with IPv4 first.
func familyOrder(addrs []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, a.Unmap())
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return out
}
