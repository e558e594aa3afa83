// Package proxyheader reads and writes PROXY protocol headers, by which each hop learns who the client is.
//
// It accepts versions 1 and 2 and sends version 2 only. go-proxyproto parses and formats; this package finds
// where a header ends without losing what follows, bounds it in bytes and time, checks what it says, and
// keeps to the three TLVs that the hops of a path need: authority (the server name), ALPN and unique id (the
// id of the path).
//
// It does not decide whom to believe. A header must come from a peer that the configuration names, or be
// treated as an attack: whoever may send one says where a connection comes from.
//
// Source: https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt ("the specification" below).
//
// Its files:
//
//	proxyheader.go  a header, and how one is written
//	read.go         a header is read from a connection, or found in bytes
//	parse.go        the header's bytes
//	text.go         its texts: authority, ALPN, unique id
package proxyheader

import (
	"bytes"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"
)

// Header is what a PROXY header says. The zero value says nothing.
type Header struct {
	// Source is the client, Destination what it connected to. They are invalid when the header does not say
	// (LOCAL, UNKNOWN, unix sockets, 0.0.0.0:0): then the connection's own addresses count. IPv4 is never in
	// its IPv6-mapped form.
	Source, Destination netip.AddrPort

	// Local says that the sender made the connection for itself, a health check, say.
	Local bool

	ServerName string // of the TLS hello, lower case, no trailing dot; a host name or ""
	ALPN       string // printable ASCII, or ""
	ID         string // unique id, 1 to 128 printable ASCII bytes without space " , ; and \, or ""
}

// Append appends the header in version 2 to b.
//
// The command is LOCAL when Local is set, without addresses. An invalid Source, of somebody who is not known,
// is sent as the unspecified address: HAProxy refuses a header that leaves it out. An invalid Destination
// with a valid Source is sent as the unspecified address. Source and Destination of different families are
// both sent as IPv6, IPv4 in its mapped form. A text field that a reader would ignore (see [Read]) is left
// out.
func (h Header) Append(b []byte) []byte {
	ph := proxyproto.Header{Version: 2, Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
	src, dst := plain(h.Source), plain(h.Destination)
	if !h.Local && unknown(src) {
		src, dst = netip.AddrPortFrom(netip.IPv4Unspecified(), 0), netip.AddrPort{}
	}
	if !h.Local {
		ph.Command = proxyproto.PROXY
		ph.TransportProtocol = proxyproto.TCPv4
		if unknown(dst) && src.Addr().Is4() {
			dst = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		} else if unknown(dst) {
			dst = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
		if src.Addr().Is6() || dst.Addr().Is6() {
			ph.TransportProtocol = proxyproto.TCPv6
		}
		ph.SourceAddr, ph.DestinationAddr = net.TCPAddrFromAddrPort(src), net.TCPAddrFromAddrPort(dst)
	}
	tlvs := make([]proxyproto.TLV, 0, 3)
	add := func(t proxyproto.PP2Type, v string) {
		if v != "" {
			tlvs = append(tlvs, proxyproto.TLV{Type: t, Value: []byte(v)})
		}
	}
	add(proxyproto.PP2_TYPE_ALPN, alpn([]byte(h.ALPN)))
	add(proxyproto.PP2_TYPE_AUTHORITY, authority([]byte(h.ServerName)))
	add(proxyproto.PP2_TYPE_UNIQUE_ID, uniqueID([]byte(h.ID)))
	// Neither call can fail: the values are short, the addresses of the family that was chosen for them.
	if err := ph.SetTLVs(tlvs); err != nil {
		panic("proxyheader: " + err.Error())
	}
	wire, err := ph.Format()
	if err != nil {
		panic("proxyheader: " + err.Error())
	}
	return append(b, wire...)
}

// plain is a with IPv4 out of its mapped form. (A zone does not travel: no header has a place for it.)
func plain(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// unknown reports whether an address says nothing: invalid, or as Append writes that.
func unknown(a netip.AddrPort) bool {
	return !a.IsValid() || a.Addr().IsUnspecified() && a.Port() == 0
}

// verdict is what the first bytes of a stream say about a PROXY header.
type verdict uint8

const (
	isUnclear verdict = iota // too few bytes to tell
	isHeader                 // a header begins here
	isOther                  // this is something else
)

var (
	signatureV1 = []byte("PROXY ")
	signatureV2 = proxyproto.SIGV2
)

// sniff says whether b, the first bytes of a stream, begins a PROXY header of version 1 or 2. Neither can
// begin an HTTP request or a TLS hello. It never reads beyond the signature, 12 bytes at most.
func sniff(b []byte) verdict {
	v := isOther
	for _, sig := range [...][]byte{signatureV1, signatureV2} {
		if bytes.HasPrefix(b, sig) {
			return isHeader
		}
		if bytes.HasPrefix(sig, b) {
			v = isUnclear
		}
	}
	return v
}
