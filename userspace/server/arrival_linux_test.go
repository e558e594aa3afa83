package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cable"
)

// TestTailnetNeighbour: a machine in the LAN that routes to this node's tailnet addresses through this host
// gets no answer there. Nodes of the tailnet do, and processes of this host, also when tailscaled has made
// its interface anew.
func TestTailnetNeighbour(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	lan := cable.New(t, 1<<20)
	own, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	const name = "tailscale0"
	self := []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd7a:115c:a1e0::1")}
	phone := []string{"100.64.0.5/10", "fd7a:115c:a1e0::5/48"}
	up := func(name string, addrs ...string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = 0x02 // IFA_F_NODAD: it can be used at once
			err = netlink.AddrAdd(l, addr)
			if err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	// tailscaled's interface, and the phone at its other end. Whoever is at the far end of the LAN is the
	// phone, too: by which way it comes is said by its address.
	plug := func() {
		t.Helper()
		must("the interface", lan.AtFar(func() error {
			err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "phone0"}, PeerName: name, PeerNamespace: netlink.NsFd(own)})
			return errors.Join(err, up("phone0", phone...))
		}))
		must("its addresses", up(name, self[0].String()+"/10", self[1].String()+"/48"))
	}
	plug()
	var near, far [2]string
	for i, network := range []string{"tcp4", "tcp6"} {
		near[i] = netip.MustParseAddrPort(lan.Addr(network, false)).Addr().String()
		far[i] = netip.MustParseAddrPort(lan.Addr(network, true)).Addr().String()
	}
	must("the neighbour's routes", lan.AtFar(func() error {
		for _, r := range []struct{ from, via string }{{far[0] + "/32", near[0]}, {far[1] + "/128", near[1]}} {
			_, src, _ := net.ParseCIDR(r.from)
			rule := netlink.NewRule()
			rule.Src, rule.Table, rule.Priority = src, 100, 100
			if src.IP.To4() == nil {
				rule.Family = netlink.FAMILY_V6
			}
			if err := netlink.RuleAdd(rule); err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{Table: 100, Gw: net.ParseIP(r.via)}); err != nil {
				return err
			}
		}
		return nil
	}))

	ts := startTailscaled(t)
	ts.self = self
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: tcp, listen: ["tailnet:4443"], mode: tcp, default: { forward: %[1]q } }
  - { name: web, listen: ["tailnet:4444", "0.0.0.0:4445"], mode: http, accept_proxy: { from: [%[2]q, %[3]q] }, default: { forward: %[1]q } }`, backend(t, echo), far[0], far[1]))
	eventually(t, "it listens", func() bool { return len(d.Status().Listeners[0].Listen) > 0 && d.bound() == 5 })
	ask := func(from, to string) error {
		dialer := net.Dialer{Timeout: patience}
		if from != "" {
			dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		c, err := dialer.Dial("tcp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, "GET / HTTP/1.0\r\nHost: a.test\r\n\r\n"); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 4))
		return err
	}
	health := http.Server{Handler: http.NotFoundHandler()}
	go d.ServeTailnet(t.Context(), "4446", func(ln net.Listener) { health.Serve(ln) })
	t.Cleanup(func() { health.Close() })
	for _, a := range self {
		to := net.JoinHostPort(a.String(), "4446")
		eventually(t, "health is served", func() bool { return ask("", to) == nil })
	}
	for _, when := range []string{"at first", "with another interface"} {
		for i, a := range self {
			neighbour, node := far[i], []string{"100.64.0.5", "fd7a:115c:a1e0::5"}[i]
			for _, port := range []string{"4443", "4444"} {
				to := net.JoinHostPort(a.String(), port)
				if err := lan.AtFar(func() error { return ask(node, to) }); err != nil {
					t.Errorf("%s, a node at %s: %v", when, to, err)
				}
				if err := ask("", to); err != nil {
					t.Errorf("%s, this host at %s: %v", when, to, err)
				}
				before := d.refused(notByTailnet)
				if err := lan.AtFar(func() error { return ask(neighbour, to) }); err == nil {
					t.Errorf("%s, a neighbour at %s: answered", when, to)
				}
				eventually(t, "counted", func() bool { return d.refused(notByTailnet) == before+1 })
			}
			to := net.JoinHostPort(a.String(), "4446")
			if err := lan.AtFar(func() error { return ask(node, to) }); err != nil {
				t.Errorf("%s, a node at %s: %v", when, to, err)
			}
			if err := lan.AtFar(func() error { return ask(neighbour, to) }); err == nil {
				t.Errorf("%s, a neighbour at %s: answered", when, to)
			}
		}
		if err := lan.AtFar(func() error { return ask(far[0], near[0]+":4445") }); err != nil {
			t.Errorf("a neighbour where all may: %v", err)
		}
		l, err := netlink.LinkByName(name)
		must("find it", err)
		must("remove it", netlink.LinkDel(l))
		plug()
	}
	if d.log.Count("interface=near") == 0 {
		t.Error("the log does not say by which interface it came")
	}
}

// TestPauseWaitsForAdmission: when Pause returns, what was accepted at an address of the tailnet is admitted,
// though that is found out off the loops.
func TestPauseWaitsForAdmission(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	lan := cable.New(t, 1<<20)
	self := netip.MustParseAddrPort(lan.Addr("tcp4", false)).Addr()
	ts := startTailscaled(t)
	ts.self = []netip.Addr{self}
	d := start(t, fmt.Sprintf(`
listeners: [ { name: tcp, listen: ["tailnet:4443"], mode: tcp, default: { forward: %q } } ]`, backend(t, echo)))
	eventually(t, "it listens", func() bool { return d.bound() == 1 })
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4000 { // so that finding an address takes longer than looking at a queue
		addr, _ := netlink.ParseAddr(fmt.Sprintf("10.80.%d.%d/32", i/250, i%250+1))
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatal(err)
		}
	}
	var c net.Conn
	err = lan.AtFar(func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(self, 4443).String(), patience)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fd := d.listening(t)
	for end := time.Now().Add(patience); ; {
		var i unix.TCPInfo
		if err := tcpsock.Info(fd, &i); err != nil || time.Now().After(end) {
			t.Fatalf("it is not accepted: %v", err)
		}
		if i.Unacked == 0 { // that wait in the queue of a socket that listens
			break
		}
	}
	d.Pause()
	if n := d.limiter.Total(); n != 1 {
		t.Errorf("%d connections are admitted, want 1", n)
	}
}

// listening is the descriptor of the one socket that listens.
func (d *daemon) listening(t *testing.T) int {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sockets {
		return s.fd
	}
	t.Fatal("nothing listens")
	return -1
}

// bound is how many sockets listen.
func (d *daemon) bound() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.sockets)
}
