package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The router's links. Each is a small network of its own whose first address is the router's.
type network struct {
	host, dev string
	net4      string // the host's address
	net6      string // likewise, or "" for a host without IPv6
}

var (
	cloud4 = netip.MustParseAddr("198.51.100.82")
	cloud6 = netip.MustParseAddr("2001:db8:cc::2")
)

var networks = []network{
	{"client", "eth0", "203.0.113.7/28", "2001:db8:c::7/64"},
	{"edge-a", "eth0", "198.51.100.2/28", "2001:db8:a::2/64"},
	{"edge-b", "eth0", "198.51.100.18/28", "2001:db8:b::2/64"},
	{"nat", "wan", "198.51.100.34/28", ""},
	{"laptop", "wifi", "198.51.100.50/28", ""},
	{"laptop", "hotspot", "198.51.100.66/28", ""},
	{"cloud", "eth0", "198.51.100.82/28", "2001:db8:cc::2/64"},
	{"friend", "eth0", "198.51.100.98/28", ""},
}

// gateway is the first address of the prefix.
func gateway(p netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits())
}

// topology makes all hosts and links.
func (w *World) topology() error {
	for _, h := range []struct {
		name string
		at   **Host
		want bool
	}{
		{"inet", &w.Inet, true}, {"client", &w.Client, true}, {"edge-a", &w.EdgeA, true},
		{"edge-b", &w.EdgeB, true}, {"nat", &w.NAT, true}, {"home", &w.Home, true}, {"laptop", &w.Laptop, true},
		{"cloud", &w.Cloud, true}, {"friend", &w.Friend, w.options.Friend},
	} {
		if !h.want {
			continue
		}
		host, err := w.newHost(h.name)
		if err != nil {
			return err
		}
		*h.at = host
		w.hosts = append(w.hosts, host)
	}
	for _, c := range w.options.Cables {
		if !slices.ContainsFunc(networks, func(n network) bool { return n.host == c }) {
			return fmt.Errorf("Options.Cables: no host %q has an uplink of its own (home's is that of nat)",
				c)
		}
	}
	if err := w.Inet.forward(); err != nil {
		return err
	}
	if err := w.Inet.addAddr("lo", netip.PrefixFrom(Control4, 32)); err != nil {
		return err
	}
	for _, n := range networks {
		h := w.Host(n.host)
		if h == nil {
			continue
		}
		u, err := w.newUplink(h, n)
		if err != nil {
			return fmt.Errorf("link %s to the router: %w", n.host, err)
		}
		if h.current == nil {
			if err := h.use(u); err != nil {
				return fmt.Errorf("link %s to the router: %w", n.host, err)
			}
		}
	}
	for _, e := range w.Edges() {
		for _, a := range []netip.Addr{Anycast4, Anycast6} {
			if err := e.addAddr("lo", netip.PrefixFrom(a, a.BitLen())); err != nil {
				return err
			}
		}
	}
	if err := w.homeNetwork(); err != nil {
		return err
	}
	return w.clientTrust()
}

// forward makes a router of the host.
func (h *Host) forward() error {
	if err := h.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return h.Sysctl("ipv6/conf/all/forwarding", "1")
}

// natRules is what a router that people have at home does: one address outside, and nothing comes in unasked.
const natRules = `
table ip nat {
	chain post {
		type nat hook postrouting priority srcnat
		oifname "wan" masquerade
	}
}
table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop
		iifname "lan" accept
		ct state established,related accept
	}
	chain input {
		type filter hook input priority filter; policy drop
		iifname { "lo", "lan" } accept
		ct state established,related accept
		icmp type echo-request accept
	}
}
`

// homeNetwork puts home behind its NAT router.
func (w *World) homeNetwork() error {
	lan := netip.PrefixFrom(Home4, 24)
	if err := w.NAT.forward(); err != nil {
		return err
	}
	if err := vethPair(w.Home, "eth0", w.NAT, "lan"); err != nil {
		return fmt.Errorf("link home to its router: %w", err)
	}
	if err := w.NAT.addAddr("lan", gateway(lan)); err != nil {
		return err
	}
	if err := w.Home.addAddr("eth0", lan); err != nil {
		return err
	}
	if err := w.Home.defaultRoute("eth0", gateway(lan).Addr()); err != nil {
		return err
	}
	w.Home.IP4 = Home4
	// What is done to home's uplink is done outside the NAT.
	w.Home.uplinks, w.Home.current = w.NAT.uplinks, w.NAT.current
	if err := w.nft(w.NAT, natRules); err != nil {
		return fmt.Errorf("home's NAT: %w", err)
	}
	return nil
}

// nft loads rules in a host.
func (w *World) nft(h *Host, rules string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := h.Command(ctx, "nft", "-f", "-")
	c.Stdin = strings.NewReader(rules)
	_, err := c.Output()
	return err
}

// clientTrust gives the client its hosts file and the lab's CA, as a machine of its owner would have them.
func (w *World) clientTrust() error {
	hosts := "127.0.0.1 localhost client\n::1 localhost\n"
	for name, addrs := range w.Names {
		for _, a := range addrs {
			hosts += a.String() + " " + name + "\n"
		}
	}
	if err := w.Client.WriteFile("/etc/hosts", []byte(hosts), 0o644); err != nil {
		return err
	}
	const bundle = "/etc/ssl/certs/ca-certificates.crt" // where Debian's curl and openssl look
	known, err := os.ReadFile(bundle)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := w.Client.WriteFile(bundle, append(known, w.CA.PEM...), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.Client.Dir, "ca.pem"), w.CA.PEM, 0o644)
}
