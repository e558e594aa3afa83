// Package wakelan wakes machines of a local network, by the magic packet of Wake-on-LAN: six times 0xff and
// sixteen times the address of the machine's network card, which the card looks for while the machine sleeps.
// The packet goes as a broadcast, for a machine that sleeps answers no ARP. Nothing says whether it has woken
// anybody.
package wakelan

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// port is that of the discard protocol, to which nobody listens: the card reads no headers.
const port = 9

// magicPacket is the magic packet for an address of 6 bytes.
func magicPacket(mac net.HardwareAddr) []byte {
	return append(bytes.Repeat([]byte{0xff}, 6), bytes.Repeat(mac, 16)...)
}

// network is an IPv4 network that this host is in.
type network struct {
	netip.Prefix
	device string
}

// broadcast is the last address of the network (RFC 919).
func (n network) broadcast() netip.Addr {
	b := n.Addr().As4()
	for i := n.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// networks are the IPv4 networks of this host that have broadcasts.
func networks() (all []network, err error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	const wanted, unwanted = net.FlagUp | net.FlagBroadcast, net.FlagLoopback | net.FlagPointToPoint
	for _, i := range interfaces {
		if i.Flags&(wanted|unwanted) != wanted {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // it is gone
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Bits() < 31 {
				// RFC 3021
				all = append(all, network{p, i.Name})
			}
		}
	}
	return all, nil
}

// towards returns those of all networks that one of the addresses at is in, or all of them if it is none.
func towards(all []network, at []netip.Addr) []network {
	near := slices.DeleteFunc(slices.Clone(all), func(n network) bool { return !slices.ContainsFunc(at, n.Contains) })
	if len(near) > 0 {
		return near
	}
	return all
}

// Send sends the magic packet for mac into the network of this host that one of the addresses at is in, or,
// where none is, or none is known, into all of them. It needs no privileges. The error says why it went into
// none.
func Send(mac net.HardwareAddr, at []netip.Addr) error {
	all, err := networks()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return errors.New("this host is in no IPv4 network that has broadcasts")
	}
	var errs []error
	sent := false
	for _, n := range towards(all, at) {
		if err := send(magicPacket(mac), n); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", n.device, err))
			continue
		}
		sent = true
	}
	if sent {
		return nil
	}
	return errors.Join(errs...)
}

func send(packet []byte, n network) error {
	from := net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.Addr(), 0))
	c, err := net.DialUDP("udp4", from, net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.broadcast(), port)))
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(packet)
	return err
}
