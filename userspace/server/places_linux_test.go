package server

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
	eventually(t, "that is a problem", func() bool { return d.has(PartAddress, "pub0.7:4443", "has no address") })
	if d.Ready().Ready {
		t.Errorf("it is ready without an address: %v", d.Problems())
	}
	plug("192.0.2.1/24", "203.0.113.1/24")
	listens("192.0.2.1:4443", "192.0.2.1:4444", "203.0.113.1:4443")
	eventually(t, "it is none any more", func() bool { return d.Ready().Ready })

	// What can't be had is said at its place, and changes nothing.
	for what, want := range map[string]string{
		"pub0.8:4443":       `test.yaml:3:27: listen "pub0.8:4443": "pub0.8" is neither an interface here (`,
		"tailnett:4443":     `did you mean "tailnet"?`,
		"lo:4445":           `listener "pub": "lo:4445" and "localhost:4445" of listener "here" are both 127.0.0.1:4445`,
		"host.invalid:4443": `test.yaml:3:27: listen "host.invalid:4443": "host.invalid" is neither an interface here`,
	} {
		err := d.Reload(parse(t, strings.Replace(yaml, "pub0.7:4443", what, 1)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", what, err, want)
		}
	}
	listens("192.0.2.1:4443", "192.0.2.1:4444", "203.0.113.1:4443")
}

// TestClashingPlaces: two listeners that get the same address, since an interface has a new one, go on with
// all others. The one that had it keeps it, and the other one does when that has gone.
func TestClashingPlaces(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	link := func(name string) netlink.Link {
		l, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(l))
		return l
	}
	addr := func(a string) *netlink.Addr {
		parsed, err := netlink.ParseAddr(a)
		must(err)
		return parsed
	}
	lo := link("lo")
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "one0"}, PeerName: "two0"}))
	one, two := link("one0"), link("two0")
	must(netlink.AddrAdd(one, addr("192.0.2.1/32")))
	must(netlink.AddrAdd(two, addr("192.0.2.2/32")))
	yaml := fmt.Sprintf(`
listeners:
  - { name: first, listen: "one0:4443", mode: tcp, default: { forward: %[1]q } }
  - { name: second, listen: ["two0:4443", "127.0.0.1:4443"], mode: tcp, default: { forward: %[1]q } }
`, backend(t, echo))
	d := start(t, yaml)
	bound := func(listener string) (all []string) {
		for _, l := range d.Status().Listeners {
			if l.Name == listener {
				all = append(all, l.Bound...)
			}
		}
		slices.Sort(all)
		return all
	}
	check := func(clash bool, first, second []string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the listeners have %v and %v", first, second), func() bool {
			return slices.Equal(bound("first"), first) && slices.Equal(bound("second"), second)
		})
		eventually(t, "the clash is a problem while there is one", func() bool {
			return d.has(PartAddress, "192.0.2.9:4443", "leave one of them out") == clash && d.Ready().Ready == !clash
		})
		if t.Failed() {
			t.Fatalf("%v, %v, %v", bound("first"), bound("second"), d.Problems())
		}
	}
	own, shared := "192.0.2.2:4443", "192.0.2.9:4443"
	check(false, []string{"192.0.2.1:4443"}, []string{"127.0.0.1:4443", own})
	must(netlink.AddrAdd(two, addr("192.0.2.9/32")))
	check(false, []string{"192.0.2.1:4443"}, []string{"127.0.0.1:4443", own, shared})
	must(netlink.AddrAdd(one, addr("192.0.2.9/32")))
	must(netlink.AddrAdd(one, addr("192.0.2.10/32")))
	check(true, []string{"192.0.2.10:4443", "192.0.2.1:4443"}, []string{"127.0.0.1:4443", own, shared})

	// What it does without is no reason against a reload, and something new is.
	must(d.Reload(parse(t, yaml)))
	check(true, []string{"192.0.2.10:4443", "192.0.2.1:4443"}, []string{"127.0.0.1:4443", own, shared})
	worse := strings.Replace(yaml, "one0:4443", "lo:4443", 1)
	if err := d.Reload(parse(t, worse)); err == nil || !strings.Contains(err.Error(), "are both 127.0.0.1:4443") {
		t.Errorf("another clash: %v", err)
	}
	must(netlink.AddrDel(two, addr("192.0.2.9/32")))
	check(false, []string{"192.0.2.10:4443", "192.0.2.1:4443", shared}, []string{"127.0.0.1:4443", own})

	// A daemon that starts serves what it can.
	d.Close()
	must(netlink.AddrAdd(lo, addr("192.0.2.1/32")))
	d = start(t, strings.Replace(yaml, "two0:4443", "lo:4443", 1))
	eventually(t, "it starts", func() bool {
		return slices.Contains(bound("first"), "192.0.2.1:4443") &&
			slices.Contains(bound("second"), "127.0.0.1:4443") &&
			d.has(PartAddress, "192.0.2.1:4443", `"lo:4443" and "one0:4443"`)
	})
}
