package front

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
	if _, err := netip.ParseAddr(host); err == nil || host == tailnetHost {
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
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
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
	names := []string{tailnetHost}
	all, _ := net.Interfaces()
	for _, i := range all {
		names = append(names, i.Name)
	}
	guess := ""
	if near := spelling.Nearest(name, names); near != "" {
		guess = fmt.Sprintf(", did you mean %q?", near)
	}
	return place{}, fmt.Errorf("%q is no interface here (they are %s), and no host that can be looked up (%v)%s",
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
// f.mu is held.
func (f *Front) refreshInterfaces() {
	for name, p := range f.places {
		if p.isInterface {
			addrs, _ := interfaceAddrs(name)
			f.places[name] = place{true, addrs}
		}
	}
}

// namesInterface says whether a listener is on an interface. f.mu is held.
func (f *Front) namesInterface() bool {
	for _, p := range f.places {
		if p.isInterface {
			return true
		}
	}
	return false
}

// sameTwice refuses an address that two listeners are to have: only here is known which ones a name has.
func sameTwice(want []binding) error {
	first := map[string]binding{}
	for _, b := range want {
		if o, taken := first[b.addr]; taken && o.owner != b.owner {
			return fmt.Errorf("listener %q: %q and %q of listener %q are both %s here: leave one of them out",
				b.owner.name, b.written, o.written, o.owner.name, b.addr)
		}
		first[b.addr] = b
	}
	return nil
}
