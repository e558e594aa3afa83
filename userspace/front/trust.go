package front

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// peers are those that accept_proxy.from or allow names.
type peers struct {
	prefixes []netip.Prefix
	patterns []string // tailnet node names, users, tags
	written  []string
}

func newPeers(from []string) *peers {
	t := &peers{written: from}
	for _, s := range from {
		if p, err := netip.ParsePrefix(s); err == nil {
			t.prefixes = append(t.prefixes, p.Masked())
		} else if a, err := netip.ParseAddr(s); err == nil {
			t.prefixes = append(t.prefixes, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()))
		} else {
			t.patterns = append(t.patterns, s)
		}
	}
	return t
}

// strings are what the config says, for status.
func (t *peers) strings() []string {
	if t == nil {
		return nil
	}
	return t.written
}

type whoIs func(context.Context, netip.Addr) (tailnet.Identity, error)

// check says whether peer is one of those that t names, and who it is, for the
// log. A tailnet address is an identity only by what tailscaled says of it: an
// error there means no.
func (t *peers) check(ctx context.Context, peer netip.Addr, ask whoIs) (trusted bool, who string) {
	for _, p := range t.prefixes {
		if p.Contains(peer.WithZone("")) { // no prefix has a zone, and so none contains an address with one
			return true, peer.String()
		}
	}
	if !tailnet.Contains(peer) {
		return false, peer.String() + " (not a tailnet address)"
	}
	id, err := ask(ctx, peer)
	if err != nil {
		return false, fmt.Sprintf("%s (tailscaled can't say who it is: %v)", peer, err)
	}
	who = describe(id)
	for _, p := range t.patterns {
		if id.Matches(p) {
			return true, who
		}
	}
	return false, who
}

func describe(id tailnet.Identity) string {
	if len(id.Tags) > 0 {
		return id.Node + " (" + strings.Join(id.Tags, ", ") + ")"
	}
	return id.Node + " (" + id.User + ")"
}

var errStranger = errors.New("PROXY header from a peer that accept_proxy.from does not name")
