package proxyheader

// The functions below return the text of a TLV in the form that a Header has it, or "" when it is no good.
//
// Bad text is ignored rather than refused: haproxy, for one, copies what the client put into its TLS hello without a
// look, so that a strange name is the client's doing and not its proxy's. What passes can be logged, compared with
// configured names, and put into an HTTP header without harm.

const (
	maxName     = 253
	maxLabel    = 63
	maxALPN     = 255 // RFC 7301 section 3.1
	maxUniqueID = 128 // section 2.2.5 of the specification
)

// authority takes a host name with the rules of package sni: labels of letters, digits, hyphens and underscores.
func authority(b []byte) string {
	if n := len(b); n > 0 && b[n-1] == '.' {
		b = b[:n-1]
	}
	if len(b) == 0 || len(b) > maxName {
		return ""
	}
	lower := make([]byte, len(b))
	label, digits := 0, true // where the current label begins; whether it has only digits
	ends := func(i int) bool {
		return i > label && i-label <= maxLabel && lower[label] != '-' && lower[i-1] != '-'
	}
	for i, ch := range b {
		switch {
		case '0' <= ch && ch <= '9':
		case 'a' <= ch && ch <= 'z', ch == '_', ch == '-':
			digits = false
		case 'A' <= ch && ch <= 'Z':
			digits = false
			ch += 'a' - 'A'
		case ch == '.':
			if !ends(i) {
				return ""
			}
			label, digits = i+1, true
		default:
			return ""
		}
		lower[i] = ch
	}
	if !ends(len(b)) || digits { // a last label of digits: an IP address
		return ""
	}
	return string(lower)
}

func alpn(b []byte) string { return token(b, maxALPN, "") }

func uniqueID(b []byte) string { return token(b, maxUniqueID, `",;\`) }

// token takes printable ASCII without space and without the bytes in but.
func token(b []byte, limit int, but string) string {
	if len(b) > limit {
		return ""
	}
	for _, ch := range b {
		if ch <= ' ' || ch >= 0x7f {
			return ""
		}
		for i := range len(but) {
			if ch == but[i] {
				return ""
			}
		}
	}
	return string(b)
}
