package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/florianl/go-tc"
	"github.com/florianl/go-tc/core"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// uplink is a host's link to the router.
type uplink struct {
	host       *Host
	router     *Host
	dev        string // on the host
	routerDev  string // on the router
	ip4, ip6   netip.Prefix
	cable      *cable // nil: a veth pair
	impairment Impairment
	blackhole  bool
}

// Impairment is what a link does to packets, in both directions alike. The zero value is a perfect link.
type Impairment struct {
	Rate   float64       // bits a second; 0 is unlimited
	Loss   float64       // probability of losing a packet, 0 to 1, in each direction
	Delay  time.Duration // one way; only on the links of Options.Cables
	Jitter time.Duration // added to or taken from Delay at most, packets stay in order
}

// newUplink makes a link between the host and the router, which is up on the router's side and down on the
// host's.
func (w *World) newUplink(h *Host, n network) (*uplink, error) {
	u := &uplink{host: h, router: w.Inet, dev: n.dev, routerDev: n.host, ip4: netip.MustParsePrefix(n.net4)}
	if n.net6 != "" {
		u.ip6 = netip.MustParsePrefix(n.net6)
	}
	if len(h.uplinks) > 0 {
		u.routerDev = n.host + "." + n.dev
	}
	if slices.Contains(w.options.Cables, n.host) {
		var err error
		if u.cable, err = newCable(h, u.dev, w.Inet, u.routerDev); err != nil {
			return nil, err
		}
		w.onClose(u.cable.close)
	} else if err := vethPair(h, u.dev, w.Inet, u.routerDev); err != nil {
		return nil, err
	}
	if err := w.Inet.addAddr(u.routerDev, gateway(u.ip4)); err != nil {
		return nil, err
	}
	if u.ip6.IsValid() {
		if err := w.Inet.addAddr(u.routerDev, gateway(u.ip6)); err != nil {
			return nil, err
		}
	}
	h.uplinks = append(h.uplinks, u)
	return u, h.setLink(u.dev, false)
}

// vethPair makes a veth pair between two hosts, up on both sides. It never appears in any other namespace.
func vethPair(a *Host, aDev string, b *Host, bDev string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bDev
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = aDev, netlink.NsFd(a.ns)
	if err := b.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth %s-%s: %w", aDev, bDev, err)
	}
	return errors.Join(a.setLink(aDev, true), b.setLink(bDev, true))
}

func (h *Host) setLink(dev string, up bool) error {
	l, err := h.nl.LinkByName(dev)
	if err == nil && up {
		err = h.nl.LinkSetUp(l)
	} else if err == nil {
		err = h.nl.LinkSetDown(l)
	}
	if err != nil {
		return fmt.Errorf("%s: set %s up=%v: %w", h.Name, dev, up, err)
	}
	return nil
}

func (h *Host) addAddr(dev string, p netip.Prefix) error {
	l, err := h.nl.LinkByName(dev)
	if err == nil {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		err = h.nl.AddrReplace(l, a)
	}
	if err != nil {
		return fmt.Errorf("%s: add address %v to %s: %w", h.Name, p, dev, err)
	}
	return nil
}

// AddAddress gives the host one more address on its uplink, e.g. 203.0.113.8/28 on the client, to be many
// sources.
func (h *Host) AddAddress(p netip.Prefix) error { return h.addAddr(h.Uplink(), p) }

func (h *Host) defaultRoute(dev string, via netip.Addr) error {
	return h.route(netip.PrefixFrom(anyAddr(via), 0), dev, via)
}

func anyAddr(family netip.Addr) netip.Addr {
	if family.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func (h *Host) route(dst netip.Prefix, dev string, via netip.Addr) error {
	l, err := h.nl.LinkByName(dev)
	if err == nil {
		err = h.nl.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst), Gw: via.AsSlice()})
	}
	if err != nil {
		return fmt.Errorf("%s: route %v via %v dev %s: %w", h.Name, dst, via, dev, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// use makes u the host's uplink: its link comes up, and the default routes lead there.
func (h *Host) use(u *uplink) error {
	if err := h.setLink(u.dev, true); err != nil {
		return err
	}
	for _, p := range []netip.Prefix{u.ip4, u.ip6} {
		if !p.IsValid() {
			continue
		}
		if err := h.addAddr(u.dev, p); err != nil {
			return err
		}
		if err := h.defaultRoute(u.dev, gateway(p).Addr()); err != nil {
			return err
		}
	}
	h.current, h.IP4, h.IP6 = u, u.ip4.Addr(), u.ip6.Addr()
	return nil
}

// Uplink is the name of the device that the host's default route uses.
func (h *Host) Uplink() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current.dev
}

// Roam moves the host to another of its uplinks (the laptop's are "wifi" and "hotspot"), which are in
// different networks: the new one comes up, then the old one goes away with its address, as when one leaves a
// building. tailscaled finds its way in 0.1 to 8 s; what TCP then still waits for is its retransmission timer
// (3.2, 6.6, 13 s after the move on an idle connection).
func (h *Host) Roam(dev string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.IndexFunc(h.uplinks, func(u *uplink) bool { return u.dev == dev })
	if i < 0 {
		return fmt.Errorf("%s has no uplink %q", h.Name, dev)
	}
	old := h.current
	if old.dev == dev {
		return nil
	}
	if err := h.use(h.uplinks[i]); err != nil {
		return err
	}
	return h.setLink(old.dev, false)
}

// Cut takes the host's uplink away. Silent packets just vanish, both ways, as behind a broken switch;
// otherwise the carrier goes too, as when a cable is pulled.
func (h *Host) Cut(silent bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := h.current
	if silent {
		u.blackhole = true
		return u.applyLoss()
	}
	return u.router.setLink(u.routerDev, false)
}

// Restore undoes Cut.
func (h *Host) Restore() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := h.current
	u.blackhole = false
	if err := u.applyLoss(); err != nil {
		return err
	}
	return u.router.setLink(u.routerDev, true)
}

// Impair makes the host's current uplink bad in the given way, instead of any way before. Home's is outside
// its NAT.
func (h *Host) Impair(i Impairment) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := h.current
	if u.cable == nil && (i.Delay != 0 || i.Jitter != 0) {
		return fmt.Errorf("the uplink of %s can't delay packets: name it in Options.Cables", u.host.Name)
	}
	if u.cable != nil {
		u.cable.set(i.Delay, i.Jitter)
	}
	u.impairment = i
	return errors.Join(u.applyLoss(), u.router.setRate(u.routerDev, i.Rate), u.host.setRate(u.dev, i.Rate))
}

// setRate limits what leaves by dev: a token bucket of 20 ms, but never less than a super-packet, and 100 ms
// of queue.
func (h *Host) setRate(dev string, bits float64) error {
	l, err := h.nl.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", h.Name, dev, err)
	}
	qdisc := tc.Object{
		Msg: tc.Msg{Ifindex: uint32(l.Attrs().Index), Handle: core.BuildHandle(1, 0), Parent: tc.HandleRoot},
		// go-tc wants one also to delete
		Attribute: tc.Attribute{Kind: "tbf", Tbf: &tc.Tbf{Parms: &tc.TbfQopt{}}},
	}
	if bits == 0 {
		if err := h.tc(func(t *tc.Tc) error { return t.Qdisc().Delete(&qdisc) }); err != nil && !isNone(err) {
			return fmt.Errorf("%s: unlimit %s: %w", h.Name, dev, err)
		}
		return nil
	}
	const ethernet, mtu = 1, 64<<10 + 1514 // TC_LINKLAYER_ETHERNET; super-packets pass whole
	rate := uint32(bits / 8)
	burst := max(rate/50, mtu)
	qdisc.Tbf = &tc.Tbf{Burst: &burst, Parms: &tc.TbfQopt{Mtu: mtu, Limit: burst + rate/10, Rate: tc.RateSpec{Rate: rate, Linklayer: ethernet}}}
	if err := h.tc(func(t *tc.Tc) error { return t.Qdisc().Replace(&qdisc) }); err != nil {
		return fmt.Errorf("%s: limit %s to %.0f bit/s: %w", h.Name, dev, bits, err)
	}
	return nil
}

// tc gives f a traffic control socket in the host.
func (h *Host) tc(f func(*tc.Tc) error) error {
	t, err := tc.Open(&tc.Config{NetNS: int(h.ns)})
	if err != nil {
		return fmt.Errorf("open traffic control: %w", err)
	}
	return errors.Join(f(t), t.Close())
}

// isNone says that what was to be removed wasn't there.
func isNone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) }
