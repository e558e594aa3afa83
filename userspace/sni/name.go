package sni

import (
	"bytes"
	"net/netip"
	"strings"
)

const (
	// bytes of a host name without its trailing dot: RFC 1035 section 2.3.4 less the root's two bytes
	maxName  = 253
	maxLabel = 63
)

// hostName returns the canonical form of a host name from the wire, or what is wrong with it. See
// Hello.ServerName for what is accepted. It is "" without a problem where b is an address, for which no name
// stands.
func hostName(b []byte) (name, problem string) {
	if i := bytes.IndexByte(b, ':'); i >= 0 {
		host, port := b[:i], b[i+1:]
		if isIPv6(b) {
			return "", ""
		}
		if !isPort(port) {
			return "", "the host name has a colon, and is no IPv6 address and no name with a port"
		}
		b = host
	}
	b = bytes.TrimSuffix(b, []byte("."))
	if len(b) > maxName {
		return "", "the host name is longer than 253 bytes"
	}
	var lower [maxName]byte
	label := 0 // where the current label begins
	for i, ch := range b {
		switch {
		case 'a' <= ch && ch <= 'z', '0' <= ch && ch <= '9', ch == '_', ch == '-':
		case 'A' <= ch && ch <= 'Z':
			ch += 'a' - 'A'
		case ch == '.':
			if problem := badLabel(lower[label:i]); problem != "" {
				return "", problem
			}
			label = i + 1
		case ch >= 0x80:
			return "", "the host name is not in ASCII; an internationalized name is sent as xn--..."
		default:
			return "", "the host name has a character that no host name has"
		}
		lower[i] = ch
	}
	last := lower[label:len(b)]
	if problem := badLabel(last); problem != "" {
		return "", problem
	}
	// "127.0.0.1", "127.1" and "2130706433" all mean an address to a resolver; no top-level domain is a
	// number.
	if number(last) {
		return "", ""
	}
	return string(lower[:len(b)]), ""
}

// isIPv6 says whether b is an IPv6 address, in brackets or not, or one in brackets with a port.
func isIPv6(b []byte) bool {
	s := string(b)
	if host, port, ok := strings.Cut(s, "]"); ok && strings.HasPrefix(host, "[") {
		if port != "" && (port[0] != ':' || !isPort([]byte(port[1:]))) {
			return false
		}
		s = host[1:]
	}
	a, err := netip.ParseAddr(s)
	return err == nil && a.Is6()
}

// isPort says whether b could be a port: 1 to 5 digits.
func isPort(b []byte) bool {
	for _, ch := range b {
		if ch < '0' || ch > '9' {
			return false
		}
	}
	return 1 <= len(b) && len(b) <= 5
}

func badLabel(l []byte) (problem string) {
	switch {
	case len(l) == 0:
		return "the host name has an empty label"
	case len(l) > maxLabel:
		return "the host name has a label of more than 63 bytes"
	}
	return ""
}

// number reports whether a label is a number in the sense of inet_aton(3): decimal, octal, or hexadecimal
// after 0x.
func number(l []byte) bool {
	hex := len(l) >= 2 && l[0] == '0' && l[1] == 'x'
	if hex {
		l = l[2:]
	}
	for _, ch := range l {
		if !('0' <= ch && ch <= '9' || hex && 'a' <= ch && ch <= 'f') {
			return false
		}
	}
	return true
}
