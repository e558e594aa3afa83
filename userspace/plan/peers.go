package plan

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// Peers are those that accept_proxy.from or allow names.
type Peers struct {
	prefixes []netip.Prefix
	parts    []netip.Prefix // of the tailnet's ranges: nodes that have these addresses
	patterns []string       // tailnet node names, users, tags
	written  []string
}

// NewPeers reads what the configuration says.
func NewPeers(from []string) *Peers {
	t := &Peers{written: from}
	for _, s := range from {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); aerr == nil {
			p, err = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
		}
		switch {
		case err != nil:
			t.patterns = append(t.patterns, s)
		case tailnet.ContainsPrefix(p):
			t.parts = append(t.parts, p.Masked())
		default:
			t.prefixes = append(t.prefixes, p.Masked())
		}
	}
	return t
}

// Strings are what the configuration says, for status.
func (t *Peers) Strings() []string {
	if t == nil {
		return nil
	}
	return t.written
}

// Contains reports whether t names an address. Only tailscaled can tell whose a tailnet address is, also
// where t names a part of the tailnet's ranges: providers give addresses of 100.64.0.0/10 to unknown
// customers. The error is ask's, where the answer depends on it.
func (t *Peers) Contains(a netip.Addr, ask func(netip.Addr) (tailnet.Identity, error)) (bool, error) {
	a = a.Unmap().WithZone("") // a prefix holds no address with a zone
	contains := func(p netip.Prefix) bool { return p.Contains(a) }
	if slices.ContainsFunc(t.prefixes, contains) {
		return true, nil
	}
	part := slices.ContainsFunc(t.parts, contains)
	if !tailnet.Contains(a) || !part && len(t.patterns) == 0 {
		return false, nil
	}
	id, err := ask(a)
	if errors.Is(err, tailnet.ErrNotPeer) {
		return false, nil
	}
	return err == nil && (part || slices.ContainsFunc(t.patterns, id.Matches)), err
}
