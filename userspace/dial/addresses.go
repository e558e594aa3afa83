package dial

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// refusedFor is how long an address that refused a connection is tried after the others: its service may
	// just be starting, and a refusal costs one round trip.
	refusedFor = 10 * time.Second
	// silentFor is how long an address that did not answer is tried after the others: it costs
	// [fallbackDelay] each time.
	silentFor = 5 * time.Minute
	// networksFor is how long the list of this host's networks is good: the order of addresses depends on it.
	networksFor = 5 * time.Second
)

// Past is what dialers have learnt about addresses. Several dialers, in any goroutine, may share one.
type Past struct {
	mu sync.Mutex
	// +checklocks:mu
	bad map[netip.AddrPort]time.Time // until when others are tried before it
	// +checklocks:mu
	networks []netip.Prefix
	// +checklocks:mu
	listed time.Time // when networks was
}

// noteFailed remembers that a connection to an address failed for that reason.
func (p *Past) noteFailed(to netip.AddrPort, why Reason) {
	if p == nil {
		return
	}
	lasts := silentFor
	switch why {
	case Refused:
		lasts = refusedFor
	case Timeout, Unreachable:
	default:
		return // it says nothing about the address
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bad == nil {
		p.bad = map[netip.AddrPort]time.Time{}
	}
	now := time.Now()
	maps.DeleteFunc(p.bad, func(_ netip.AddrPort, until time.Time) bool { return now.After(until) })
	p.bad[to] = now.Add(lasts)
}

// noteWorked forgets that an address failed.
func (p *Past) noteWorked(to netip.AddrPort) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.bad, to)
}

// order returns addrs in the order in which to try them. Those that failed lately come last, and of the
// others those on a network of this host first: a container may also be on networks that lead nowhere from
// here. Among equals the families take turns, prefer's first (the first address's, if prefer is invalid).
func (p *Past) order(addrs []netip.Addr, port uint16, prefer netip.Addr) []netip.Addr {
	if len(addrs) == 1 {
		return addrs
	}
	if p == nil {
		p = new(Past)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Sub(p.listed) > networksFor {
		p.networks, p.listed = localNetworks(), now
	}
	if prefer = prefer.Unmap(); !prefer.IsValid() {
		prefer = addrs[0]
	}
	const near, far, bad = 0, 1, 2
	const preferred, other = 0, 1
	var classes [3][2][]netip.Addr
	for _, a := range addrs {
		class, family := far, preferred
		switch {
		case now.Before(p.bad[netip.AddrPortFrom(a, port)]):
			class = bad
		case slices.ContainsFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(a) }):
			class = near
		}
		if a.Is4() != prefer.Is4() {
			family = other
		}
		classes[class][family] = append(classes[class][family], a)
	}
	var out []netip.Addr
	for _, class := range classes {
		for i := range addrs {
			for _, family := range class {
				if i < len(family) {
					out = append(out, family[i])
				}
			}
		}
	}
	return out
}

// localNetworks lists the networks that this host has an address in, none where they can't be seen.
func localNetworks() []netip.Prefix {
	addrs, _ := net.InterfaceAddrs()
	var out []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}
