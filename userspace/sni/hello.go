package sni

// Extension numbers, from the IANA registry "TLS ExtensionType Values".
const (
	extServerName        = 0
	extALPN              = 16
	extSupportedVersions = 43
)

const versionTLS10 = 0x0301

// cursor is what is left of a buffer. Its methods take a value off the front; ok is false when too little is
// left.
type cursor []byte

func (c *cursor) bytes(n int) (v []byte, ok bool) {
	if len(*c) < n {
		return nil, false
	}
	v = (*c)[:n]
	*c = (*c)[n:]
	return v, true
}

func (c *cursor) uint8() (v int, ok bool) {
	b, ok := c.bytes(1)
	if !ok {
		return 0, false
	}
	return int(b[0]), true
}

func (c *cursor) uint16() (v int, ok bool) {
	b, ok := c.bytes(2)
	if !ok {
		return 0, false
	}
	return int(b[0])<<8 | int(b[1]), true
}

// vector8 takes a vector whose length comes first in one byte, vector16 in two.
func (c *cursor) vector8() (v cursor, ok bool) {
	n, ok := c.uint8()
	if !ok {
		return nil, false
	}
	return c.bytes(n)
}

func (c *cursor) vector16() (v cursor, ok bool) {
	n, ok := c.uint16()
	if !ok {
		return nil, false
	}
	return c.bytes(n)
}

// parseMessage parses a whole ClientHello message (RFC 8446 section 4.1.2, RFC 5246 section 7.4.1.2).
func parseMessage(msg []byte) (h Hello, err error) {
	c := cursor(msg[messageHeaderLen:])
	version, ok := c.uint16()
	if !ok {
		return Hello{}, reject(AlertDecodeError, "it ends in its version")
	}
	// RFC 8446 appendix D.5. No server that is still in use would go on.
	if version < versionTLS10 {
		return Hello{}, reject(AlertProtocolVersion, "it offers nothing newer than SSL 3.0")
	}
	if _, ok = c.bytes(32); !ok {
		return Hello{}, reject(AlertDecodeError, "it ends in its random")
	}
	if _, ok = c.vector8(); !ok {
		return Hello{}, reject(AlertDecodeError, "it ends in its session id")
	}
	suites, ok := c.vector16()
	if !ok || len(suites)%2 != 0 {
		return Hello{}, reject(AlertDecodeError, "malformed cipher suites")
	}
	if _, ok = c.vector8(); !ok {
		return Hello{}, reject(AlertDecodeError, "it ends in its compression methods")
	}
	if len(c) > 0 { // no extensions at all: TLS 1.2 and below
		extensions, ok := c.vector16()
		if !ok || len(c) > 0 {
			return Hello{}, reject(AlertDecodeError, "the extensions' length does not fit the hello's")
		}
		if err := h.parseExtensions(extensions); err != nil {
			return Hello{}, err
		}
	}
	return h, nil
}

func (h *Hello) parseExtensions(c cursor) error {
	var seen typeSet
	for len(c) > 0 {
		typ, ok := c.uint16()
		if !ok {
			return reject(AlertDecodeError, "an extension ends in its type")
		}
		data, ok := c.vector16()
		if !ok {
			return reject(AlertDecodeError, "an extension ends in its data")
		}
		// Two readers may differ on which one of a pair counts: nothing must depend on it (RFC 8446 section
		// 4.2).
		if !seen.add(uint16(typ)) {
			return reject(AlertIllegalParameter, "an extension appears twice")
		}
		var err error
		switch typ {
		case extServerName:
			err = h.parseServerName(data)
		case extALPN:
			err = h.parseALPN(data)
		case extSupportedVersions:
			err = checkVersions(data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkVersions checks the client's supported_versions, RFC 8446 section 4.2.1.
func checkVersions(c cursor) error {
	list, ok := c.vector8()
	if !ok || len(c) > 0 || len(list) == 0 || len(list)%2 != 0 {
		return reject(AlertDecodeError, "malformed or empty supported_versions")
	}
	return nil
}

// parseServerName parses a ServerNameList, RFC 6066 section 3.
func (h *Hello) parseServerName(c cursor) error {
	list, ok := c.vector16()
	if !ok || len(c) > 0 || len(list) == 0 {
		return reject(AlertDecodeError, "malformed or empty server_name list")
	}
	found := false
	for len(list) > 0 {
		typ, ok := list.uint8()
		if !ok {
			return reject(AlertDecodeError, "malformed server_name")
		}
		// RFC 6066 defines host_name only; any other type is read in the same shape, as all implementations
		// do.
		name, ok := list.vector16()
		if !ok || len(name) == 0 {
			return reject(AlertDecodeError, "malformed or empty server_name")
		}
		if typ != 0 {
			continue
		}
		if found {
			return reject(AlertIllegalParameter, "more than one host name in server_name")
		}
		found = true
		host, problem := hostName(name)
		if problem != "" {
			return reject(AlertIllegalParameter, problem)
		}
		h.ServerName, h.FinalDot = host, name[len(name)-1] == '.'
	}
	return nil
}

// parseALPN parses a ProtocolNameList, RFC 7301 section 3.1.
func (h *Hello) parseALPN(c cursor) error {
	list, ok := c.vector16()
	if !ok || len(c) > 0 || len(list) == 0 {
		return reject(AlertDecodeError, "malformed or empty ALPN list")
	}
	n := 0
	for rest := list; len(rest) > 0; n++ {
		if p, ok := rest.vector8(); !ok || len(p) == 0 {
			return reject(AlertDecodeError, "malformed or empty ALPN protocol")
		}
	}
	h.ALPN = make([]string, 0, n)
	for len(list) > 0 {
		p, _ := list.vector8()
		h.ALPN = append(h.ALPN, protocolName(p))
	}
	return nil
}

// protocolName is string(p), without an allocation for what nearly everyone sends.
func protocolName(p []byte) string {
	switch string(p) {
	case "h2":
		return "h2"
	case "http/1.1":
		return "http/1.1"
	case "http/1.0":
		return "http/1.0"
	case "acme-tls/1":
		return "acme-tls/1"
	}
	return string(p)
}

// typeSet is a set of extension numbers. Hellos have about 20 extensions, all but a few of them below 64; a
// hello made to hurt can have 16,000, so that comparing each with each is out of the question.
type typeSet struct {
	low  uint64              // numbers below 64, one bit each
	few  [24]uint16          // the others
	n    int                 // how many of few are in use
	many map[uint16]struct{} // the others, once few is full
}

// add reports whether t is new.
func (s *typeSet) add(t uint16) bool {
	if t < 64 {
		old := s.low
		s.low |= 1 << t
		return s.low != old
	}
	for _, x := range s.few[:s.n] {
		if x == t {
			return false
		}
	}
	if s.n < len(s.few) {
		s.few[s.n] = t
		s.n++
		return true
	}
	if _, ok := s.many[t]; ok {
		return false
	}
	if s.many == nil {
		s.many = make(map[uint16]struct{})
	}
	s.many[t] = struct{}{}
	return true
}
