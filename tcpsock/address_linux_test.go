package tcpsock

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Addresses survive the way through the kernel's form. IPv4 is IPv4, in whichever family's.
func TestAddresses(t *testing.T) {
	lo, err := net.InterfaceByIndex(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"192.0.2.1:80", "[2001:db8::1]:443", "[fe80::1%" + lo.Name + "]:1", "[fe80::1%9999]:1"} {
		a := netip.MustParseAddrPort(s)
		if got := AddrPort(Sockaddr(a)); got != a {
			t.Errorf("%v has become %v", a, got)
		}
	}
	mapped := netip.MustParseAddrPort("[::ffff:192.0.2.1]:80")
	if got := AddrPort(Sockaddr(mapped)); got != netip.MustParseAddrPort("192.0.2.1:80") {
		t.Errorf("%v has become %v", mapped, got)
	}
	if _, ok := Sockaddr(mapped).(*unix.SockaddrInet6); !ok {
		t.Errorf("%v is not for a socket of IPv6", mapped)
	}
	for _, a := range []unix.Sockaddr{nil, &unix.SockaddrUnix{Name: "/run/x"}} {
		if got := AddrPort(a); got.IsValid() {
			t.Errorf("%v has become %v", a, got)
		}
	}
}

func TestEnds(t *testing.T) {
	a, b := pair(t)
	want := [2]netip.AddrPort{a.LocalAddr().(*net.TCPAddr).AddrPort(), b.LocalAddr().(*net.TCPAddr).AddrPort()}
	if got := [2]netip.AddrPort{ask(t, a, Local), ask(t, a, Remote)}; got != want {
		t.Errorf("the ends are %v, want %v", got, want)
	}
	if Local(-1).IsValid() || Remote(-1).IsValid() {
		t.Error("what is no socket has an address")
	}
}
