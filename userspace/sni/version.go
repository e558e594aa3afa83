package sni

const (
	versionTLS10 = 0x0301
	versionTLS12 = 0x0303
	versionTLS13 = 0x0304
)

// known holds the versions that clients offer in the order in which they do, so that nearly every
// Hello.Versions is a part of it and needs no memory of its own. It is never written to.
var known = [...]uint16{versionTLS13, versionTLS12, 0x0302, versionTLS10}

// upTo returns TLS 1.0 to version, newest first. Without the supported_versions extension nobody speaks TLS
// 1.3 (RFC 8446 section 4.2.1), whatever version says.
func upTo(version int) []uint16 {
	for i := 1; i < len(known); i++ {
		if version >= int(known[i]) {
			return known[i:len(known):len(known)]
		}
	}
	return nil
}

// parseVersions parses the client's supported_versions, RFC 8446 section 4.2.1.
func (h *Hello) parseVersions(c cursor) error {
	list, ok := c.vector8()
	if !ok || len(c) > 0 || len(list) == 0 || len(list)%2 != 0 {
		return reject(AlertDecodeError, "malformed or empty supported_versions")
	}
	start, n, regular := 0, 0, true // known[start:start+n] is what was seen while regular
	for rest := list; len(rest) > 0; {
		v, _ := rest.uint16()
		switch {
		case grease(v):
		case n == 0:
			for start < len(known) && int(known[start]) != v {
				start++
			}
			n, regular = 1, start < len(known)
		default:
			regular = regular && start+n < len(known) && int(known[start+n]) == v
			n++
		}
	}
	if regular {
		h.Versions = known[start : start+n : start+n]
		return nil
	}
	h.Versions = make([]uint16, 0, n)
	for len(list) > 0 {
		if v, _ := list.uint16(); !grease(v) {
			h.Versions = append(h.Versions, uint16(v))
		}
	}
	return nil
}

// grease reports whether v is one of the values 0x0a0a, 0x1a1a ... 0xfafa that RFC 8701 reserves.
func grease(v int) bool { return v&0x0f0f == 0x0a0a && v>>8 == v&0xff }
