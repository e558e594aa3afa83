package tlsterm

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// entry is one certificate of a set: read from files (cert and chain are there, or else err), or asked for.
type entry struct {
	spec  Spec
	stamp stamp // the files when they were read

	err      error // why there is no certificate: the files can't be used
	cert     *tls.Certificate
	leaf     *x509.Certificate
	chain    []*x509.Certificate // the leaf first
	issuer   int                 // the leaf's, in chain; 0: it is not there
	names    []string            // as listed for status: DNS names, then IP addresses
	warnings []string
}

// problem is why the entry is of no use to clients now, or nil.
func (e *entry) problem(now time.Time) error {
	if e.leaf == nil {
		return e.err
	}
	if err := validChain(e.chain, e.issuer, now); err != nil {
		return &FileError{e.spec.Cert, err}
	}
	return nil
}

func (e *entry) source() string {
	if e.spec.GetCertificate != nil {
		return e.spec.Name
	}
	return e.spec.Cert
}

func (e *entry) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if e.spec.GetCertificate != nil {
		return e.spec.GetCertificate(hello)
	}
	return e.cert, nil
}

func (e *entry) sameLeaf(o *entry) bool { return o.leaf != nil && bytes.Equal(e.leaf.Raw, o.leaf.Raw) }

// set is what a store serves at one moment. It is immutable.
type set struct {
	entries  []*entry            // in the config's order; the first is the default
	exact    map[string][]*entry // "example.org", "192.0.2.1"
	wildcard map[string][]*entry // "example.org" for *.example.org
	sources  []*entry            // those with a function
}

func newSet(entries []*entry) *set {
	s := &set{entries: entries, exact: map[string][]*entry{}, wildcard: map[string][]*entry{}}
	for _, e := range entries {
		if e.spec.GetCertificate != nil {
			s.sources = append(s.sources, e)
			continue
		}
		for _, n := range e.names { // of a broken one none are known
			m, n := s.exact, canonical(n)
			if rest, ok := strings.CutPrefix(n, "*."); ok {
				m, n = s.wildcard, rest
			}
			if !slices.Contains(m[n], e) {
				m[n] = append(m[n], e)
			}
		}
	}
	return s
}

// candidates are the entries for a canonical name, best first.
func (s *set) candidates(name string) []*entry {
	out := slices.Clip(s.exact[name]) // appending copies
	for _, e := range s.sources {
		if e.spec.Covers(name) {
			out = append(out, e)
		}
	}
	return append(out, s.wildcard[parent(name)]...)
}

func (s *set) covers(name string) bool { return name != "" && len(s.candidates(name)) > 0 }

// asked is the canonical name that a hello asks for, "" for none. An address is no
// server name (RFC 6066 3), unless a certificate has it.
func (s *set) asked(serverName string) string {
	name := canonical(serverName)
	if _, err := netip.ParseAddr(name); err == nil && !s.covers(name) {
		return ""
	}
	return name
}

// find returns the entry that serves spec's files, or nil.
func (s *set) find(spec Spec) *entry {
	if s == nil || spec.GetCertificate != nil {
		return nil
	}
	i := slices.IndexFunc(s.entries, func(e *entry) bool { return e.spec.GetCertificate == nil && e.spec.files() == spec.files() })
	if i < 0 {
		return nil
	}
	return s.entries[i]
}

// parent is name without its first label, "" if nothing is left. An IP address has no labels.
func parent(name string) string {
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	first, rest, _ := strings.Cut(name, ".")
	if first == "" {
		return ""
	}
	return rest
}

// canonical is the form that names are compared in: lower case, no port and no
// trailing dot, IP addresses as netip writes them.
func canonical(name string) string {
	if strings.Contains(name, ":") {
		if host, _, err := net.SplitHostPort(name); err == nil {
			name = host
		}
	}
	name = strings.TrimSuffix(name, ".")
	bare := strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if addr, err := netip.ParseAddr(bare); err == nil {
		return addr.Unmap().WithZone("").String()
	}
	return strings.ToLower(name)
}
