package transparent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

// world is a host with a container behind it, and the way to everybody else on
// its other side. Both are network namespaces of this process.
type world struct {
	t               *testing.T
	host, container netns.NsHandle
	server          map[bool]*net.TCPListener // in the container, by whether it is IPv6
}

const (
	containers4, containers6 = "172.31.0.", "fd31::"
	outside4, outside6       = "192.0.2.", "2001:db8::"
)

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	w := &world{t: t, server: map[bool]*net.TCPListener{}}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := netns.Get()
	must(t, err)
	defer before.Close()
	w.host, err = netns.New()
	must(t, err)
	w.container, err = netns.New()
	must(t, err)
	must(t, netns.Set(before))
	t.Cleanup(func() { w.host.Close(); w.container.Close() })
	w.in(w.host, func() {
		sysctls(t, "ipv6/conf/all/accept_dad=0", "ipv6/conf/default/accept_dad=0", // addresses are there at once
			"ipv4/conf/all/rp_filter=1", "ipv4/conf/default/rp_filter=1", // the strictest of what hosts have
			"ipv4/conf/all/src_valid_mark=1", "ipv4/conf/default/src_valid_mark=1")
		up(t, "lo")
		link(t, "containers", w.container)
		up(t, "containers", containers4+"1/24", containers6+"1/64")
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "outside"}, PeerName: "internet"}))
		up(t, "internet")
		up(t, "outside", outside4+"1/24", outside6+"1/64")
		defaultRoute(t, "outside", outside4+"254", outside6+"fe")
	})
	w.in(w.container, func() {
		sysctls(t, "ipv6/conf/all/accept_dad=0", "ipv6/conf/default/accept_dad=0")
		up(t, "lo")
		up(t, "eth0", containers4+"2/24", containers6+"2/64")
		defaultRoute(t, "eth0", containers4+"1", containers6+"1")
		awaitAddrs(t, containers4+"2", containers6+"2")
		for _, addr := range []string{containers4 + "2", containers6 + "2"} {
			ln, err := net.Listen("tcp", net.JoinHostPort(addr, "8080"))
			must(t, err)
			t.Cleanup(func() { ln.Close() })
			w.server[strings.Contains(addr, ":")] = ln.(*net.TCPListener)
			go serve(ln)
		}
	})
	w.in(w.host, func() { awaitAddrs(t, containers4+"1", containers6+"1", outside4+"1", outside6+"1") })
	return w
}

// awaitAddrs waits until addresses work: IPv6's do once the kernel has noticed
// that their link is up.
func awaitAddrs(t *testing.T, addrs ...string) {
	for _, a := range addrs {
		for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			routes, err := netlink.RouteGet(net.ParseIP(a))
			if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(end) {
				t.Errorf("%s does not work: %v, %v", a, routes, err)
				break
			}
		}
	}
}

// serve answers each line with who is at the other end.
func serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if err != nil {
					// By then the other end has no socket any more, only a TIME_WAIT.
					time.Sleep(50 * time.Millisecond)
					return
				}
				fmt.Fprintf(c, "%s %d\n", c.RemoteAddr(), n)
			}
		}()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// in runs f on a thread in a namespace. f makes sockets, and starts nothing.
func (w *world) in(ns netns.NsHandle, f func()) {
	w.t.Helper()
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := netns.Set(ns); err != nil {
			w.t.Error(err)
			return
		}
		f()
	})
	done.Wait()
}

func sysctls(t *testing.T, settings ...string) {
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		must(t, os.WriteFile("/proc/sys/net/"+name, []byte(value), 0))
	}
}

func link(t *testing.T, name string, peerIn netns.NsHandle) {
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(peerIn)}))
}

func up(t *testing.T, name string, addrs ...string) {
	l, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(l))
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		must(t, err)
		if strings.Contains(s, ":") {
			a.Flags = unix.IFA_F_NODAD
		}
		must(t, netlink.AddrAdd(l, a))
	}
}

func defaultRoute(t *testing.T, dev string, gateways ...string) {
	l, err := netlink.LinkByName(dev)
	must(t, err)
	for _, gw := range gateways {
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw)}))
	}
}

// open opens a Way on the host.
func (w *world) open(log *slog.Logger) (way *Way) {
	w.t.Helper()
	var err error
	w.in(w.host, func() { way, err = Open(log) })
	must(w.t, err)
	w.t.Cleanup(func() { must(w.t, way.Close()) })
	return way
}

// dial connects to the container as the client does that it is from.
func (w *world) dial(client netip.Addr, change ...func(*net.Dialer)) (c net.Conn, err error) {
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	From(&d, client)
	for _, f := range change {
		f(&d)
	}
	w.in(w.host, func() { c, err = d.Dial("tcp", w.server[client.Is6()].Addr().String()) })
	return c, err
}

// sees says whom the container sees of a client, and closes the connection.
func (w *world) sees(client netip.Addr) (string, error) {
	c, err := w.dial(client)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return "", err
	}
	buf := make([]byte, 200)
	n, err := c.Read(buf)
	host, _, _ := net.SplitHostPort(strings.Fields(string(buf[:n]) + " ?")[0])
	return host, err
}

// state is what the host has of rules and routes that were not there before.
func (w *world) state() string {
	var out []byte
	w.in(w.host, func() {
		var err error
		out, err = exec.Command("/bin/sh", "-c", `export PATH=$PATH:/usr/sbin:/sbin; ip rule | sed -n /116/p; ip -6 rule | sed -n /116/p; ip -4 route show table all proto 116; ip -6 route show table all proto 116; nft list tables`).CombinedOutput()
		if err != nil {
			w.t.Errorf("%v: %s", err, out)
		}
	})
	return string(out)
}

var clients = []string{"203.0.113.7", "2001:db8:c::7", "100.101.102.103", "fd7a:115c:a1e0::7", "192.0.2.1", "2001:db8::1"}

// TestWay: the container sees the client's address, whatever kind it is, behind
// a firewall that lets nothing in but answers, and nothing of the connection
// stays behind.
func TestWay(t *testing.T) {
	w := newWorld(t)
	w.in(w.host, func() {
		nft := exec.Command("/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; nft -f -")
		nft.Stdin = strings.NewReader(`table inet firewall {
			chain input { type filter hook input priority filter; policy drop; ct state established,related accept; meta l4proto ipv6-icmp accept; }
			chain forward { type filter hook forward priority filter; policy drop; }
		}`)
		if out, err := nft.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	way := w.open(slog.New(slog.DiscardHandler))
	for _, s := range clients {
		client := netip.MustParseAddr(s)
		if err := way.Fits(client, netip.MustParseAddrPort(w.server[client.Is6()].Addr().String()).Addr()); err != nil {
			t.Errorf("%s does not fit: %v", s, err)
		}
		if got, err := w.sees(client); err != nil || got != s {
			t.Errorf("the container sees %q, %v: want %s", got, err, s)
		}
	}
	// The container's FIN finds its way too.
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		open := w.connections()
		if open == "" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the container still has\n%s", open)
		}
	}
}

// connections are those of the container, but for the listeners.
func (w *world) connections() (open string) {
	w.in(w.container, func() {
		for _, name := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				w.t.Error(err)
			}
			for i, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
				if state := strings.Fields(line)[3]; i > 0 && state != "0A" { // TCP_LISTEN
					open += line + "\n"
				}
			}
		}
	})
	return open
}

// TestMany: 300 connections of one client at once, each of which moves bytes.
func TestMany(t *testing.T) {
	w := newWorld(t)
	w.open(slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	for i := range 300 {
		client := netip.MustParseAddr(clients[i%2])
		c, err := w.dial(client)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		wg.Go(func() {
			c.SetDeadline(time.Now().Add(patience))
			msg := bytes.Repeat([]byte("x"), 100_000)
			if _, err := c.Write(msg); err != nil {
				t.Error(err)
				return
			}
			for left, buf := len(msg), make([]byte, 4096); left > 0; {
				n, err := c.Read(buf)
				if err != nil {
					t.Errorf("%d bytes were not seen: %v", left, err)
					return
				}
				for line := range strings.Lines(string(buf[:n])) {
					var from string
					var got int
					fmt.Sscan(line, &from, &got)
					left -= got
				}
			}
		})
	}
	wg.Wait()
}

// TestFits: where answers would not come back, the reason is known before.
func TestFits(t *testing.T) {
	w := newWorld(t)
	way := w.open(slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		client, to string
		want       Reason
	}{
		{"203.0.113.7", containers4 + "2", ""},
		{"::ffff:203.0.113.7", containers4 + "2", ""},
		{"2001:db8:c::7", containers6 + "2", ""},
		{"203.0.113.7", containers6 + "2", Family},
		{"2001:db8:c::7", containers4 + "2", Family},
		{"127.0.0.1", containers4 + "2", ClientAddress},
		{"::1", containers6 + "2", ClientAddress},
		{"fe80::1%eth0", containers6 + "2", ClientAddress},
		{"203.0.113.7", "127.0.0.1", TargetHere},
		{"203.0.113.7", containers4 + "1", TargetHere},
		{"2001:db8:c::7", outside6 + "1", TargetHere},
		{containers4 + "3", containers4 + "2", SameNetwork},
		{containers6 + "3", containers6 + "2", SameNetwork},
		{"203.0.113.7", outside4 + "99", SameNetwork}, // whose gateway is another
		{containers4 + "3", outside4 + "99", ""},
	} {
		var got *Error
		if errors.As(way.Fits(netip.MustParseAddr(c.client), netip.MustParseAddr(c.to)), &got); got == nil {
			got = &Error{}
		}
		if got.Reason != c.want {
			t.Errorf("%s to %s: %q (%v), want %q", c.client, c.to, got.Reason, got, c.want)
		}
	}
	var none *Error
	if !errors.As((*Way)(nil).Fits(netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr(containers4+"2")), &none) || none.Reason != Unavailable {
		t.Errorf("without a Way: %v", none)
	}
}

// TestRemoved: what a Way adds is gone when it is closed. What a daemon leaves
// that is killed is replaced by the next one, and not doubled; what another one
// has that lives is left alone.
func TestRemoved(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	a := w.open(slog.New(slog.DiscardHandler))
	one := w.state()
	if n := strings.Count(one, "\n"); n != 7 || strings.Count(one, "fwmark 0x40/0x40") != 4 {
		t.Errorf("a Way adds\n%s\nwant two rules and a route for each family, and an nftables table", one)
	}
	b := w.open(slog.New(slog.DiscardHandler))
	two := w.state()
	if strings.Count(two, "\n") != 14 {
		t.Errorf("two Ways have\n%s", two)
	}
	kill(a) // and its rules stay
	if got := w.state(); got != two {
		t.Errorf("after the kill\n%s\nwant\n%s", got, two)
	}
	c := w.open(slog.New(slog.DiscardHandler))
	if got := w.state(); len(got) != len(two) || c.slot != a.slot {
		t.Errorf("after the kill and a start:\n%s\nwant\n%s", got, two)
	}
	must(t, c.Close())
	for _, s := range clients { // by b
		if got, err := w.sees(netip.MustParseAddr(s)); err != nil || got != s {
			t.Errorf("the container sees %q, %v: want %s", got, err, s)
		}
	}
	kill(b) // whose slot the next one does not take
	d := w.open(slog.New(slog.DiscardHandler))
	if got := w.state(); got != one || d.slot != 0 {
		t.Errorf("after all were killed and one was started:\n%s\nwant\n%s", got, one)
	}
	must(t, d.Close())
	if got := w.state(); got != before {
		t.Errorf("after the end:\n%s\nwant\n%s", got, before)
	}
}

// kill does with a Way what SIGKILL does.
func kill(w *Way) {
	w.once.Do(func() {
		close(w.stop)
		<-w.stopped
		w.free()
	})
}

// TestRepair: what others take away is put back.
func TestRepair(t *testing.T) {
	w := newWorld(t)
	var log strings.Builder
	way := w.open(slog.New(slog.NewTextHandler(&log, nil)))
	whole := w.state()
	for _, destroy := range []string{"nft flush ruleset", "nft flush table inet tailsplice-0", "ip rule del pref 1740; ip rule del pref 1741", "ip -6 route flush table 17440"} {
		way.repair()
		if log.Len() > 0 {
			t.Errorf("nothing was amiss: %s", log.String())
		}
		w.in(w.host, func() {
			if out, err := exec.Command("/bin/sh", "-c", "PATH=$PATH:/usr/sbin:/sbin; "+destroy).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", destroy, err, out)
			}
		})
		if w.state() == whole && !strings.Contains(destroy, "flush table inet") {
			t.Errorf("%s destroyed nothing", destroy)
		}
		w.in(w.host, way.repair)
		if got := w.state(); got != whole || !strings.Contains(log.String(), "in force again") {
			t.Errorf("after %s:\n%s\nwant\n%s\nlog: %s", destroy, got, whole, log.String())
		}
		log.Reset()
		for _, s := range clients[:2] {
			if got, err := w.sees(netip.MustParseAddr(s)); err != nil || got != s {
				t.Errorf("after %s the container sees %q, %v: want %s", destroy, got, err, s)
			}
		}
	}
}

// TestOthers: transparent sockets that are not ours are none of our business.
func TestOthers(t *testing.T) {
	w := newWorld(t)
	w.open(slog.New(slog.DiscardHandler))
	c, err := w.dial(netip.MustParseAddr(clients[0]), func(d *net.Dialer) {
		prepared := d.Control
		d.Timeout = time.Second
		d.Control = func(n, a string, rc syscall.RawConn) error {
			var err error
			return errors.Join(prepared(n, a, rc), rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0) }), err)
		}
	})
	if err == nil {
		c.Close()
		t.Error("the answers to a stranger's socket are brought here")
	}
}

// TestNoRights: without CAP_NET_ADMIN the error says what to do, and nothing is left.
func TestNoRights(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	w.in(w.host, func() {
		var caps [2]unix.CapUserData // none, for this thread
		must(t, unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]))
		way, err := Open(slog.New(slog.DiscardHandler))
		if err == nil {
			way.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%v: want what is missing", err)
		}
	})
	if got := w.state(); got != before {
		t.Errorf("left is %s", got)
	}
}

// TestProbe: what the other tests use is there.
func TestProbe(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	w.in(w.host, func() { must(t, Probe()) })
	if got := w.state(); got != before {
		t.Errorf("the machine has changed: %s", got)
	}
}
