package proxyheader

import "bytes"

// The functions below return the text of a TLV in the form that a Header has it, or "" when it is no good.
//
// Bad text is ignored rather than refused: haproxy, for one, copies what the client put into its TLS hello
// without a look, so that a strange name is the client's doing and not its proxy's. What passes can be
// logged, compared with configured names, and put into an HTTP header without harm.

const (
	maxName     = 253
	maxLabel    = 63
	maxALPN     = 255 // RFC 7301 section 3.1
	maxUniqueID = 128 // section 2.2.5 of the specification
)

// authority takes a host name with the rules of package sni: labels of 1 to 63 letters, digits, hyphens (not
// at either end) and underscores, the last of which is no number, since that makes an IP address.
func authority(b []byte) string {
	if n := len(b); n > 0 && b[n-1] == '.' {
		b = b[:n-1]
	}
	if len(b) > maxName {
		return ""
	}
	// bytes.ToLower knows Unicode, and makes a k of the Kelvin sign.
	lower := bytes.Clone(b)
	for i, ch := range lower {
		if 'A' <= ch && ch <= 'Z' {
			lower[i] = ch + 'a' - 'A'
		}
	}
	var label []byte
	for rest, more := lower, true; more; {
		if label, rest, more = bytes.Cut(rest, []byte{'.'}); !isLabel(label) {
			return ""
		}
	}
	if number(label) {
		return ""
	}
	return string(lower)
}

// isLabel reports whether a label, in lower case, has the length and the letters of one.
func isLabel(label []byte) bool {
	if n := len(label); n == 0 || n > maxLabel || label[0] == '-' || label[n-1] == '-' {
		return false
	}
	for _, ch := range label {
		if !('a' <= ch && ch <= 'z' || '0' <= ch && ch <= '9' || ch == '-' || ch == '_') {
			return false
		}
	}
	return true
}

// number reports whether a label is one in the sense of inet_aton(3): decimal, octal, or hexadecimal after
// 0x.
func number(label []byte) bool {
	hex, is := bytes.CutPrefix(label, []byte("0x"))
	for _, ch := range hex {
		if !('0' <= ch && ch <= '9' || is && 'a' <= ch && ch <= 'f') {
			return false
		}
	}
	return true
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
