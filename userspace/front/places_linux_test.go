package front

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tailsplice/tailsplice/test/cable"
)

// listens is what d is bound to now.
func (d *daemon) listens() (all []string) {
	for _, l := range d.Status().Listeners {
		all = append(all, l.Bound...)
	}
	slices.Sort(all)
	return all
}

// TestListenOnPlaces: a listener on an interface has its addresses of both families, also when they change or
// the interface is made anew; a host's are looked up.
func TestListenOnPlaces(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	must("lo", err)
	must("lo", netlink.LinkSetUp(lo))
	plug := func(addrs ...string) netlink.Link {
		t.Helper()
		must("the interface", netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pub0.7"},
			PeerName: "far0"}))
		far, err := netlink.LinkByName("far0")
		must("its far end", errors.Join(err, netlink.LinkSetUp(far)))
		l, err := netlink.LinkByName("pub0.7")
		must("the interface", errors.Join(err, netlink.LinkSetUp(l)))
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			must(a, err)
			must(a, netlink.AddrAdd(l, addr))
		}
		return l
	}
	pub := plug("192.0.2.1/24", "2001:db8::1/64") // and a link-local one
	yaml := fmt.Sprintf(`
listeners:
  - { name: pub, listen: ["pub0.7:4443", "192.0.2.1:4444"], mode: tcp, default: { forward: %[1]q } }
  - { name: here, listen: ["localhost:4445", "lo:4446"], mode: tcp, default: { forward: %[1]q } }
`, backend(t, echo))
	d := start(t, yaml)
	here := []string{"127.0.0.1:4446", "[::1]:4446"}
	localhost, err := net.DefaultResolver.LookupNetIP(t.Context(), "ip", "localhost")
	must("localhost", err)
	for _, a := range localhost { // often without ::1
		if here = append(here, netip.AddrPortFrom(a.Unmap(), 4445).String()); !a.IsLoopback() {
			t.Fatalf("localhost is %v", a)
		}
	}
	listens := func(want ...string) {
		t.Helper()
		want = slices.Sorted(slices.Values(append(want, here...)))
		eventually(t, fmt.Sprintf("it listens on %v", want), func() bool { return slices.Equal(d.listens(), want) })
		if t.Failed() {
			t.Fatalf("it listens on %v", d.listens())
		}
		for _, addr := range want {
			if c := dialTCP(t, addr); c != nil {
				c.Close()
			}
		}
	}
	listens("192.0.2.1:4443", "192.0.2.1:4444", "[2001:db8::1]:4443")

	more, err := netlink.ParseAddr("198.51.100.1/24")
	must("another address", errors.Join(err, netlink.AddrAdd(pub, more)))
	listens("192.0.2.1:4443", "192.0.2.1:4444", "198.51.100.1:4443", "[2001:db8::1]:4443")
	must("one address less", netlink.AddrDel(pub, more))
	listens("192.0.2.1:4443", "192.0.2.1:4444", "[2001:db8::1]:4443")

	must("no interface", netlink.LinkDel(pub))
	eventually(t, "it stops listening there", func() bool { return len(d.listens()) == len(here)+1 })
	plug("192.0.2.1/24", "203.0.113.1/24")
	listens("192.0.2.1:4443", "192.0.2.1:4444", "203.0.113.1:4443")

	// What can't be had is said at its place, and changes nothing.
	for what, want := range map[string]string{
		"pub0.8:4443":       `test.yaml:3:27: listen "pub0.8:4443": "pub0.8" is no interface here (they are `,
		"tailnett:4443":     `did you mean "tailnet"?`,
		"lo:4445":           `listener "here": "localhost:4445" and "lo:4445" of listener "pub" are both 127.0.0.1:4445`,
		"host.invalid:4443": `test.yaml:3:27: listen "host.invalid:4443": "host.invalid" is no interface here`,
	} {
		err := d.Reload(parse(t, strings.Replace(yaml, "pub0.7:4443", what, 1)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", what, err, want)
		}
	}
	listens("192.0.2.1:4443", "192.0.2.1:4444", "203.0.113.1:4443")
}
