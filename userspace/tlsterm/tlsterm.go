// Package tlsterm holds the certificates that a listener terminates TLS with:
// it reads them from PEM files, says in words what is wrong with them, chooses
// among them by server name, and follows the files when they change.
//
// Choice: a certificate that has the exact name, then one whose wildcard covers it (one label, as browsers
// read it, RFC 6125 6.4.3), each in the order of the config. A hello without a name gets the first
// certificate, and so does one with an address in its place (RFC 6066 section 3) that no certificate has. A
// hello with a name that no certificate covers is refused with the alert unrecognized_name: a wrong
// certificate would only show its owner's names to a stranger, and people a warning that tells them nothing.
//
// A Store is safe for concurrent use. What it serves is one immutable set,
// swapped as a whole: a handshake never sees a certificate with another's key.
//
// Its files:
//
//	tlsterm.go      the store, and the choice of a certificate
//	read.go         PEM files
//	examine.go      what is wrong with a certificate
//	set.go          certificates by name
//	watch.go        files that change, and certificates that expire
//	authorities.go  the authorities of clients' certificates
package tlsterm

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

// Spec says where one certificate comes from: from files, or from a function.
type Spec struct {
	// Cert is a PEM file with the certificate first and its intermediates after
	// it, Key a PEM file with the unencrypted private key (PKCS #8, PKCS #1 or
	// SEC 1). Both may name the same file; an empty Key means Cert.
	Cert, Key string

	// GetCertificate, if not nil, is asked for each handshake whose name it covers, and Cert and Key are not
	// used. It must be quick or cached. Its error ends the handshake with internal_error; no certificate and
	// no error means that it does not have one after all.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Covers says whether GetCertificate answers for a name (lower case, no trailing dot, never empty). It is
	// needed with GetCertificate: without it the function would be the judge of every name on the internet.
	Covers func(name string) bool
	Name   string // how status and messages name what is behind GetCertificate
}

func (s Spec) key() string {
	if s.Key == "" {
		return s.Cert
	}
	return s.Key
}

func (s Spec) files() [2]string { return [2]string{s.Cert, s.key()} }

// Store serves the certificates of one listener.
type Store struct {
	log *slog.Logger

	reload sync.Mutex // one change at a time
	set    atomic.Pointer[set]
}

// Load reads all the certificates of specs. It fails as a whole with everything
// that is wrong with any of them, each by its file's name; *FileError is among
// what errors.As finds. What is merely doubtful is logged as a warning.
func Load(specs []Spec, log *slog.Logger) (*Store, error) { return load(specs, log, false) }

// Open is Load that does without what can't be used now. A certificate that has expired, or is not valid yet,
// is served all the same: clients judge. Files that are broken or missing are served from when Run finds them
// mended. Each is logged, and [Store.Certificates] shows it. It fails where specs are wrong, never for a
// file.
func Open(specs []Spec, log *slog.Logger) (*Store, error) { return load(specs, log, true) }

func load(specs []Spec, log *slog.Logger, lenient bool) (*Store, error) {
	s := &Store{log: log}
	apply, err := s.prepare(specs, lenient)
	if err != nil {
		return nil, err
	}
	apply()
	return s, nil
}

// Prepare reads the certificates of a new config without serving them yet; apply swaps them in and can't
// fail. It is as strict as Load but for files whose certificate has expired while this store served it, or
// that the store could not use before: a change of something else can still be made.
func (s *Store) Prepare(specs []Spec) (apply func(), err error) { return s.prepare(specs, false) }

func (s *Store) prepare(specs []Spec, lenient bool) (apply func(), err error) {
	if len(specs) == 0 {
		return nil, errors.New("no certificates: an https listener needs at least one")
	}
	old := s.set.Load()
	var errs []error
	entries := make([]*entry, 0, len(specs))
	for _, spec := range specs {
		e, err := s.read(spec)
		if err != nil {
			e, err = instead(spec, e, err, old.find(spec), lenient)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		entries = append(entries, e)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	next := newSet(entries)
	return func() {
		s.reload.Lock()
		defer s.reload.Unlock()
		for _, e := range next.entries {
			s.warn(e)
			if now := time.Now(); e.problem(now) != nil && e != old.find(e.spec) {
				s.log.Error("a certificate can't be used: the others are served, and this one once it is mended", "cert", e.spec.Cert,
					"err", e.problem(now))
			}
		}
		s.set.Store(next)
	}, nil
}

// instead is the entry in the place of one that was read with an error, or the error if there must be none.
// served is the entry that serves the same files until now, or nil.
func instead(spec Spec, read *entry, err error, served *entry, lenient bool) (*entry, error) {
	_, ofFile := errors.AsType[*FileError](err)
	switch {
	case !ofFile: // no Covers
		return nil, err
	case served != nil && served.cert != nil && read != nil: // it has expired
		return served, nil
	case lenient || served != nil && served.cert == nil:
		return cmp.Or(read, &entry{spec: spec, stamp: stampOf(spec), err: err}), nil
	}
	return nil, err
}

// Usable says whether there is a certificate to serve, or somebody to ask for one.
func (s *Store) Usable() bool {
	return slices.ContainsFunc(s.set.Load().entries, func(e *entry) bool { return e.err == nil })
}

// refresh reads again the entries that want says, and swaps in what is good.
//
// +checklocks:s.reload
func (s *Store) refresh(want func(*entry) bool) error {
	old := s.set.Load()
	entries := slices.Clone(old.entries)
	var errs []error
	changed := false
	for i, e := range entries {
		if e.spec.GetCertificate != nil || !want(e) {
			continue
		}
		fresh, err := s.read(e.spec)
		if err != nil {
			errs = append(errs, err)
		}
		switch {
		case err == nil, e.cert == nil && fresh != nil: // even one that has expired is more than none
		case e.cert == nil && err.Error() != e.err.Error():
			s.log.Error("a certificate can still not be used", "cert", e.spec.Cert, "err", err)
			entries[i], changed = &entry{spec: e.spec, err: err}, true
			continue
		default:
			continue
		}
		if !fresh.sameLeaf(e) {
			s.log.Info("certificate changed", "cert", e.spec.Cert, "names", fresh.names, "expires", fresh.leaf.NotAfter)
			s.warn(fresh)
		}
		entries[i] = fresh
		changed = true
	}
	if changed {
		s.set.Store(newSet(entries))
	}
	return errors.Join(errs...)
}

// Run follows the files until ctx ends: what changed is served within about two
// intervals. A pair that could not be used when it was opened is read again each time. A pair that is broken
// for longer than one interval (a new certificate whose key is still on its way is not) is logged, once for
// each state of its files. It also warns of certificates that expire while served.
func (s *Store) Run(ctx context.Context) {
	tick := time.NewTicker(filestamp.Every)
	defer tick.Stop()
	var w watch
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.look(s)
		}
	}
}

// Asked is the name that a hello with this server name asks for, as routes and certificates are found by it:
// lower case, without port and trailing dot, "" for an address that no certificate has.
func (s *Store) Asked(serverName string) string { return s.set.Load().asked(serverName) }

// Shared says whether the certificate which a client gets for name is good for other too: browsers send
// requests for both on one connection then (RFC 9113 9.1.1). The names may be upper case, IP addresses (in
// brackets or not), and end with a dot; they have no port.
func (s *Store) Shared(name, other string) bool {
	name, other = canonical(name), canonical(other)
	for _, e := range s.set.Load().candidates(name) {
		c, err := e.certificate(&tls.ClientHelloInfo{ServerName: name})
		if err != nil || c == nil {
			continue
		}
		leaf := c.Leaf
		if leaf == nil && len(c.Certificate) > 0 {
			leaf, _ = x509.ParseCertificate(c.Certificate[0])
		}
		if leaf != nil && leaf.VerifyHostname(other) == nil {
			return true
		}
	}
	return false
}

// Info describes one certificate, for status.
type Info struct {
	Source    string    `json:"source"` // file, or the Spec's Name
	Names     []string  `json:"names,omitempty"`
	Issuer    string    `json:"issuer,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	Default   bool      `json:"default"`           // served to a hello without a name
	Problem   string    `json:"problem,omitempty"` // why clients can't use it now
}

// Certificates lists what is served, in the order of the config.
func (s *Store) Certificates() []Info {
	set, now, first := s.set.Load(), time.Now(), true
	out := make([]Info, 0, len(set.entries))
	for _, e := range set.entries {
		info := Info{Source: e.source(), Names: e.names, Default: first && e.err == nil}
		first = first && !info.Default
		if err := e.problem(now); err != nil {
			info.Problem = err.Error()
		}
		if e.leaf != nil {
			info.Issuer = issuerName(e.leaf)
			info.NotBefore, info.NotAfter = e.leaf.NotBefore, e.leaf.NotAfter
		}
		out = append(out, info)
	}
	return out
}

// Config returns a server configuration that always serves the store's newest certificates: TLS 1.2 and
// 1.3, crypto/tls's choice of suites and curves, session tickets with keys that crypto/tls rotates, and
// HTTP/2 before HTTP/1.1.
func (s *Store) Config() *tls.Config {
	alpn := []string{"h2", "http/1.1"}
	// A configuration with no certificate makes crypto/tls answer unrecognized_name. It is chosen at the
	// hello, before a session ticket from another name could spare its holder the choice of a certificate.
	refuse := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: alpn, SessionTicketsDisabled: true}
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     alpn,
		GetCertificate: s.getCertificate,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			set := s.set.Load()
			if name := set.asked(hello.ServerName); name != "" && !set.covers(name) {
				return refuse, nil
			}
			return nil, nil
		},
	}
}

// getCertificate chooses the certificate of a handshake. No certificate and no
// error makes crypto/tls answer unrecognized_name.
func (s *Store) getCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	set := s.set.Load()
	name := set.asked(hello.ServerName)
	if name != hello.ServerName {
		plain := *hello
		plain.ServerName = name
		hello = &plain
	}
	candidates := set.entries // for a hello without a name: the first that there is
	if name != "" {
		candidates = set.candidates(name)
	}
	var fallback *tls.Certificate
	var errs []error
	now := time.Now()
	for _, e := range candidates {
		c, err := e.certificate(hello)
		if err != nil {
			errs = append(errs, fmt.Errorf("certificate for %q from %s: %w", name, e.source(), err))
			continue
		}
		if c == nil {
			continue
		}
		// Of several for one name (RSA and ECDSA, an old one and a new one), the first
		// that the client can verify; if it can none, it shall say itself why not.
		if len(candidates) == 1 || name == "" || e.problem(now) == nil && hello.SupportsCertificate(c) == nil {
			return c, nil
		}
		if fallback == nil {
			fallback = c
		}
	}
	if fallback != nil {
		return fallback, nil
	}
	return nil, errors.Join(errs...)
}
