package server

import (
	"net/netip"
	"slices"
	"strings"
)

// What a chain of hops ought to know of a client, written from what docs/access.md promises and not from the
// code: the tests beside compare real daemons with it.

// hop is what one hop is configured to do.
type hop struct {
	mode     string
	trusts   []string // accept_proxy.from; nil: there is none
	required bool
	sends    bool // send_proxy: v2
	tlsUp    bool // http(s): speaks TLS with the next
	addr     netip.Addr
	daemon   *tailscaled // whom it asks
	view     *tailscaled // what it may know by that
}

// words are what comes over a connection.
type words struct {
	by      netip.Addr // its other end
	proxy   []said     // PROXY headers at its start, the outermost first
	tls     bool       // what follows is a TLS handshake
	forward []string   // X-Forwarded-For of the request
}

// said is what a PROXY header says: an invalid address is somebody unknown.
type said struct {
	addr  netip.Addr
	local bool
}

// sure is an answer to a question that tailscaled may not answer.
type sure int

const (
	no sure = iota
	yes
	unsure
)

// names says whether a list of the configuration names an address, as h can know it.
func (h *hop) names(list []string, a netip.Addr) sure {
	a = a.Unmap()
	answer := no
	for _, entry := range list {
		switch who, prefix := h.who(a), parsePrefix(entry); {
		case prefix.IsValid():
			if !prefix.Contains(a) {
				continue
			}
			if !inTailnet(prefix.Addr()) || who != nil && who.name != "" {
				return yes
			}
			if who == nil {
				answer = unsure
			}
		case !inTailnet(a):
		case who == nil:
			answer = unsure
		case entry == who.name || slices.Contains(who.tags, entry) || entry == who.user && len(who.tags) == 0 && entry != "":
			return yes
		}
	}
	return answer
}

func parsePrefix(s string) netip.Prefix {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen())
	}
	p, _ := netip.ParsePrefix(s)
	return p
}

func inTailnet(a netip.Addr) bool {
	return strings.HasPrefix(a.String(), "fd7a:115c:a1e0:") || a.Is4() && a.As4()[0] == 100 && a.As4()[1]>>6 == 1
}

// pass is what h makes of what it is told: who the client is (invalid: nobody), and what it tells the next
// hop; not ok is that it goes no further.
func (h *hop) pass(in words) (client netip.Addr, out words, ok bool) {
	var nobody netip.Addr
	client = in.by // of a connection
	proxy := in.proxy
	trusted, header := no, false
	if h.trusts != nil {
		trusted = h.names(h.trusts, in.by)
		header = len(proxy) > 0
		must := h.required || h.mode == "tcp"
		if must && !header || trusted != yes && (must || header) {
			return nobody, out, false
		}
	}
	var head said
	if header {
		head, proxy = proxy[0], proxy[1:]
	}
	if h.mode != "tcp" && len(proxy) > 0 || h.mode == "http" && in.tls || (h.mode == "sni" || h.mode == "https") && !in.tls {
		return nobody, out, false // not what this mode reads
	}
	believed := trusted == yes && h.mode == "http" && (!header || head.local) // what the request says
	switch {
	case header && !head.local:
		client = head.addr
		if client.IsValid() && h.names(h.trusts, client) != no {
			client = nobody
		}
	case trusted != no:
		client = nobody
	}
	known := client // who is passed on as such in X-Forwarded-For
	if believed {
		at := len(in.forward) - 1
		for ; at >= 0; at-- {
			a, err := netip.ParseAddr(in.forward[at])
			if err != nil {
				break
			}
			if named := h.names(h.trusts, a); named == no {
				client, known = a, in.by
			} else if named == yes {
				continue
			}
			break
		}
	}
	out = words{by: h.addr, proxy: proxy, tls: in.tls, forward: in.forward}
	if h.sends {
		out.proxy = append([]said{{addr: client}}, proxy...)
	}
	if h.mode == "http" || h.mode == "https" {
		var forward []string
		if believed {
			forward = slices.Clone(in.forward)
		}
		me := "unknown"
		if known.IsValid() {
			me = known.String()
		}
		out.tls, out.forward = h.tlsUp, append(forward, me)
	}
	return client, out, true
}
