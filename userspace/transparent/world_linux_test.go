package transparent

import (
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
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

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

// open opens a ReturnPath on the host.
func (w *world) open(log *slog.Logger) (path *ReturnPath) {
	w.t.Helper()
	var err error
	w.in(w.host, func() { path, err = Open(log) })
	must(w.t, err)
	w.t.Cleanup(func() { must(w.t, path.Close()) })
	return path
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
