package dial

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cable"
)

// TestSelf: where nobody listens on a port that connections are also made from, a connection can be one of a socket with itself. It is
// none, and the port is free again at once, also for a service that doesn't set SO_REUSEADDR.
func TestSelf(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	const port = 40000
	cable.Sysctl(t, "ipv4/ip_local_port_range", fmt.Sprintf("%d %d", port, port+1)) // of an even and an odd one, connect(2) takes the first
	for _, addr := range []string{"127.0.0.1", "::1"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		isFree := func(after string) {
			t.Helper()
			family := unix.AF_INET
			if to.Addr().Is6() {
				family = unix.AF_INET6
			}
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := errors.Join(unix.Bind(fd, tcpsock.Sockaddr(to)), unix.Listen(fd, 1)); err != nil {
				t.Errorf("%s: after %s nobody can listen on the port: %v", addr, after, err)
			}
		}
		if a, err := Begin(to, addr, new(Outcomes)); !errors.Is(err, ErrSelf) {
			t.Errorf("%s: Begin gives %+v, %v", addr, a, err)
			unix.Close(a.FD)
		}
		isFree("Begin")

		// As for an address of this host that is not known to be one: the connection is asked for later.
		fd, err := unix.Socket(map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[to.Addr().Is4()], unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, tcpsock.Sockaddr(to)); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
		if connected, err := (&Attempt{FD: fd, to: to}).Check(); !errors.Is(err, ErrSelf) || connected {
			t.Errorf("%s: Check gives %v, %v", addr, connected, err)
		}
		unix.Close(fd)
		isFree("Check")

		// With an address and port of its own, [net.Dialer] does not look.
		other := netip.AddrPortFrom(to.Addr(), port-1)
		d := Dialer{From: func(nd *net.Dialer, _ netip.Addr) { nd.LocalAddr = net.TCPAddrFromAddrPort(other) }}
		c, err := d.Dial(t.Context(), Target{Scheme: TCP, Host: addr, Port: other.Port()}, netip.Addr{})
		var de *Error
		if !errors.As(err, &de) || de.Reason != Refused || !errors.Is(err, ErrSelf) {
			t.Errorf("%s: Dial gives %v", addr, err)
		}
		if c != nil {
			c.Close()
		}
	}

	// The same where a target has several addresses.
	const other = port - 2
	d := Dialer{From: func(nd *net.Dialer, to netip.Addr) {
		nd.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, other))
	}}
	c, err := d.Dial(t.Context(), Target{Scheme: TCP, Host: "localhost", Port: other}, netip.Addr{})
	var de *Error
	if !errors.As(err, &de) || de.Reason != Refused || !errors.Is(err, ErrSelf) {
		t.Errorf("localhost: Dial gives %v", err)
	}
	if c != nil {
		c.Close()
	}
}
