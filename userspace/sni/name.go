package sni

const (
	maxName  = 253 // bytes of a host name without its trailing dot: RFC 1035 section 2.3.4 less the root's two bytes
	maxLabel = 63
)

// hostName returns the canonical form of a host name from the wire, or what is wrong with it. See Hello.ServerName for
// what is accepted.
func hostName(b []byte) (name, problem string) {
	if b[len(b)-1] == '.' {
		b = b[:len(b)-1]
	}
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
		case ch == ':':
			return "", "the host name is an IPv6 address or has a port"
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
	// "127.0.0.1", "127.1" and "2130706433" all mean an address to a resolver; no top-level domain is a number.
	if number(last) {
		return "", "the host name is an IP address"
	}
	return string(lower[:len(b)]), ""
}

func badLabel(l []byte) (problem string) {
	switch {
	case len(l) == 0:
		return "the host name has an empty label"
	case len(l) > maxLabel:
		return "the host name has a label of more than 63 bytes"
	case l[0] == '-' || l[len(l)-1] == '-':
		return "the host name has a label that begins or ends with a hyphen"
	}
	return ""
}

// number reports whether a label is a number in the sense of inet_aton(3): decimal, octal, or hexadecimal after 0x.
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
