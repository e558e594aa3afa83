package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// place is an interface or a host that listeners name, and its addresses.
type place struct {
	isInterface bool
	addrs       []netip.Addr
}

// placeOf returns the name in a listen address, "" where it has none: an address, all of them, or the
// tailnet's.
func placeOf(listen string) string {
	host, _, _ := net.SplitHostPort(listen) // config has checked it
	if _, err := netip.ParseAddr(host); err == nil || host == config.Tailnet {
		return ""
	}
	return host
}

// findPlaces finds what the listeners of cfg name: interfaces first, then hosts. Errors carry the file and
// line.
func findPlaces(ctx context.Context, cfg *config.Config) (map[string]place, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found := map[string]place{}
	var errs []error
	for _, l := range cfg.Listeners {
		for j, listen := range l.Listen {
			name := placeOf(listen)
			if name == "" || found[name].addrs != nil {
				continue
			}
			p, err := findPlace(ctx, name)
			if err != nil {
				errs = append(errs, cfg.Errorf(l.At("listen", j), "listen %q: %v", listen, err))
				continue
			}
			found[name] = p
		}
	}
	return found, errors.Join(errs...)
}

func findPlace(ctx context.Context, name string) (place, error) {
	if addrs, err := interfaceAddrs(name); err == nil {
		return place{true, addrs}, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err == nil {
		for i := range addrs {
			addrs[i] = addrs[i].Unmap()
		}
		return place{false, sortedAddrs(addrs)}, nil
	}
	names := []string{config.Tailnet}
	all, _ := net.Interfaces()
	for _, i := range all {
		names = append(names, i.Name)
	}
	guess := ""
	if near := spelling.Nearest(name, names); near != "" {
		guess = fmt.Sprintf(", did you mean %q?", near)
	}
	return place{}, fmt.Errorf("%q is neither an interface here (%s) nor a host that can be looked up (%v)%s",
		name, strings.Join(names[1:], ", "), err, guess)
}

// interfaceAddrs are an interface's addresses, without the link-local ones of IPv6, which are good for
// neighbours only. The error is that there is no such interface.
func interfaceAddrs(name string) ([]netip.Addr, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	nets, err := i.Addrs()
	if err != nil {
		return nil, err
	}
	addrs := []netip.Addr{}
	for _, n := range nets {
		p, err := netip.ParsePrefix(n.String())
		if a := p.Addr().Unmap(); err == nil && !(a.Is6() && a.IsLinkLocalUnicast()) {
			addrs = append(addrs, a)
		}
	}
	return sortedAddrs(addrs), nil
}

// sortedAddrs puts each address there once.
func sortedAddrs(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// refreshInterfaces looks at the interfaces among the places again. What is gone has no address; it may come
// back.
//
// +checklocks:srv.mu
func (srv *Server) refreshInterfaces() {
	for name, p := range srv.places {
		if p.isInterface {
			addrs, _ := interfaceAddrs(name)
			srv.places[name] = place{true, addrs}
		}
	}
}

// namesInterface says whether a listener is on an interface.
//
// +checklocks:srv.mu
func (srv *Server) namesInterface() bool {
	for _, p := range srv.places {
		if p.isInterface {
			return true
		}
	}
	return false
}

// A lack is what a listener does without: an address, or a name in listen that has none.
type lack struct{ addr, listener string }

// apart leaves each address of want to one listener: the one that is bound there, else the first. Only here
// is known which addresses a name has, and an interface may get one at any time. clashes says what the others
// do without.
//
// +checklocks:srv.mu
func (srv *Server) apart(want []binding) (kept []binding, clashes map[lack]error) {
	holders := map[string]binding{}
	for _, b := range want {
		s := srv.sockets[b.addr]
		if _, held := holders[b.addr]; !held || s != nil && s.owner.Load() == b.owner {
			holders[b.addr] = b
		}
	}
	clashes = map[lack]error{}
	for _, b := range want {
		switch o := holders[b.addr]; {
		case o == b && !slices.Contains(kept, b):
			kept = append(kept, b)
		case o.owner != b.owner:
			clashes[lack{b.addr, b.owner.name}] = fmt.Errorf(
				"%q and %q of listener %q are both %s here: leave one of them out",
				b.written, o.written, o.owner.name, b.addr)
		}
	}
	return kept, clashes
}

// newClash is an error if two listeners are to have an address, and do not go without it already.
//
// +checklocks:srv.mu
func (srv *Server) newClash(clashes map[lack]error) error {
	var errs []error
	for c, err := range clashes {
		if srv.unbound[c] == nil {
			errs = append(errs, fmt.Errorf("listener %q: %w", c.listener, err))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}
