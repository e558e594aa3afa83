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

	"github.com/pires/go-proxyproto"
)

const (
	maxV1    = 107 // bytes with CRLF, section 2.1 of the specification
	prefixV2 = 16  // signature, command, family, length
	crcBytes = 4
)

// MaxBytes is the longest header that [Read] takes, whatever its caller's limit: go-proxyproto refuses more. Real ones
// stay below 200 bytes, or 2 KiB with a client certificate.
const MaxBytes = prefixV2 + 4096

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// length returns how long the header at the start of b is, 0 when b is too short to tell, or what is wrong. b begins
// with a signature.
func length(b []byte, limit int) (int, error) {
	if b[0] == signatureV1[0] {
		end := bytes.IndexByte(b[:min(len(b), maxV1)], '\n')
		switch {
		case end >= 0:
			return end + 1, nil
		case len(b) >= maxV1:
			return 0, errors.New("version 1 line of more than 107 bytes")
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
		// PROXY without addresses: the specification leaves it to the receiver, go-proxyproto refuses it. It says the
		// same as LOCAL, except that there is a client.
		wire = bytes.Clone(b)
		wire[12] = byte(proxyproto.LOCAL)
	}
	ph, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(wire), len(wire)))
	if err != nil {
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

// parseTLVs takes what we use from the TLVs of b, a whole header of version 2 whose address block is right. The first
// of a type counts; one that is no good is as if it weren't there (see Read).
func (h *Header) parseTLVs(b []byte) error {
	addresses := [...]int{0, 12, 36, 216}[b[13]>>4] // bytes: none, IPv4, IPv6, unix
	for i := prefixV2 + addresses; i < len(b); {
		if len(b)-i < 3 {
			return errors.New("a TLV ends in its length")
		}
		typ, n := proxyproto.PP2Type(b[i]), int(binary.BigEndian.Uint16(b[i+1:]))
		i += 3
		if len(b)-i < n {
			return errors.New("a TLV ends in its value")
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
