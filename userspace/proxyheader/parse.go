package proxyheader

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"

	"github.com/pires/go-proxyproto"
)

const (
	maxV1    = 107 // bytes with CRLF, section 2.1 of the specification
	prefixV2 = 16  // signature, command, family, length
	crcBytes = 4
)

// MaxBytes is the longest header that [Read] takes, whatever its caller's limit: go-proxyproto refuses more.
// Real ones stay below 200 bytes, or 2 KiB with a client certificate.
const MaxBytes = prefixV2 + 4096

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// length returns how long the header at the start of b is, 0 when b is too short to tell, or what is wrong. b
// begins with a signature.
func length(b []byte, limit int) (int, error) {
	if b[0] == signatureV1[0] {
		end := bytes.IndexByte(b[:min(len(b), maxV1)], '\n')
		switch {
		case end >= 0:
			return end + 1, nil
		case len(b) >= maxV1:
			return 0, fmt.Errorf("version 1 line of more than 107 bytes, which begins with %q", b[:maxV1])
		}
		return 0, nil
	}
	if len(b) < prefixV2 {
		return 0, nil
	}
	n := prefixV2 + int(binary.BigEndian.Uint16(b[14:]))
	if n > limit {
		return 0, fmt.Errorf("%d bytes long, more than the limit of %d", n, limit)
	}
	return n, nil
}

// parse parses b, one whole header.
func parse(b []byte) (*Header, error) {
	v2 := b[0] == signatureV2[0]
	wire := b
	if v2 && b[12] == byte(proxyproto.PROXY) && b[13] == byte(proxyproto.UNSPEC) {
		// PROXY without addresses: the specification leaves it to the receiver, go-proxyproto refuses it. It
		// says the same as LOCAL, except that there is a client.
		wire = bytes.Clone(b)
		wire[12] = byte(proxyproto.LOCAL)
	} else if !v2 {
		wire = oneFamily(b)
	}
	ph, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(wire), len(wire)))
	switch {
	case err != nil && !v2:
		return nil, fmt.Errorf("%w: %q", err, b)
	case err != nil:
		return nil, err
	}
	h := new(Header)
	if ph.Command.IsProxy() {
		h.Source, h.Destination = addrPort(ph.SourceAddr), addrPort(ph.DestinationAddr)
		if unknown(h.Source) {
			h.Source, h.Destination = netip.AddrPort{}, netip.AddrPort{}
		}
		if unknown(h.Destination) {
			h.Destination = netip.AddrPort{}
		}
	}
	if !v2 {
		return h, nil
	}
	h.Local = b[12] == byte(proxyproto.LOCAL)
	if err := h.parseTLVs(b); err != nil && !h.Local {
		// What follows a LOCAL command need not make sense to anyone, section 2.2.
		return nil, err
	}
	return h, nil
}

// oneFamily rewrites a line of version 1 whose addresses are of two families, so that both are IPv6. nginx
// writes such lines where it learnt the client's address itself and its own is of the other family. It names
// the client's family; the specification has no word for two. Its own address may be that of a unix socket,
// too, which is no destination.
func oneFamily(line []byte) []byte {
	words := strings.Split(string(line), " ")
	if len(words) != 6 || words[1] != "TCP4" && words[1] != "TCP6" {
		return line
	}
	src, err := netip.ParseAddr(words[2])
	if err != nil {
		return line
	}
	if strings.HasPrefix(words[3], "unix:") {
		words[3] = "::"
		if src.Is4() {
			words[3] = "0.0.0.0"
		}
	}
	dst, err := netip.ParseAddr(words[3])
	if err != nil || src.Is4() == dst.Is4() {
		return []byte(strings.Join(words, " "))
	}
	words[1] = "TCP6"
	for i, a := range []netip.Addr{src, dst} {
		if a.Is4() {
			words[2+i] = "::ffff:" + words[2+i]
		}
	}
	return []byte(strings.Join(words, " "))
}

// parseTLVs takes what we use from the TLVs of b, a whole header of version 2 whose address block is right.
// The first of a type counts; one that is no good is as if it weren't there (see Read).
func (h *Header) parseTLVs(b []byte) error {
	addresses := [...]int{0, 12, 36, 216}[b[13]>>4] // bytes: none, IPv4, IPv6, unix
	for i := prefixV2 + addresses; i < len(b); {
		if len(b)-i < 3 {
			return errors.New("a TLV is cut off in its length")
		}
		typ, n := proxyproto.PP2Type(b[i]), int(binary.BigEndian.Uint16(b[i+1:]))
		i += 3
		if len(b)-i < n {
			return errors.New("a TLV is cut off in its value")
		}
		v := b[i : i+n]
		switch typ {
		case proxyproto.PP2_TYPE_AUTHORITY:
			first(&h.ServerName, authority(v))
		case proxyproto.PP2_TYPE_ALPN:
			first(&h.ALPN, alpn(v))
		case proxyproto.PP2_TYPE_UNIQUE_ID:
			first(&h.ID, uniqueID(v))
		case proxyproto.PP2_TYPE_CRC32C:
			if n != crcBytes || !checksum(b, i) {
				return errors.New("the checksum is wrong")
			}
		}
		i += n
	}
	return nil
}

// checksum verifies the CRC32C of b, whose value is at i, section 2.2.3. It is computed with a value of zero.
func checksum(b []byte, i int) bool {
	sum := crc32.Update(0, castagnoli, b[:i])
	sum = crc32.Update(sum, castagnoli, make([]byte, crcBytes))
	sum = crc32.Update(sum, castagnoli, b[i+crcBytes:])
	return sum == binary.BigEndian.Uint32(b[i:])
}

func first(field *string, v string) {
	if *field == "" {
		*field = v
	}
}

// addrPort takes the address of any IP transport. Headers for UDP are what haproxy sends for QUIC.
func addrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return plain(a.AddrPort())
	case *net.UDPAddr:
		return plain(a.AddrPort())
	}
	return netip.AddrPort{}
}
