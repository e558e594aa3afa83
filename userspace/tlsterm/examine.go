package tlsterm

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// namesOf lists what a certificate is for. A certificate of the old kind, with
// its name only in the subject, still works for clients that are as old.
func namesOf(leaf *x509.Certificate) (names, warnings []string) {
	names = append(names, leaf.DNSNames...)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) > 0 {
		return names, nil
	}
	if cn := leaf.Subject.CommonName; cn != "" {
		return []string{cn}, []string{fmt.Sprintf("the certificate has the name %s only as its common name, which browsers have stopped to read: make one with subjectAltName", cn)}
	}
	return nil, []string{"the certificate is for no name at all: it is served only to clients that name none"}
}

// issuerOf finds the issuer of a chain's first certificate in it: its index, or 0.
func issuerOf(chain []*x509.Certificate) int {
	for i, c := range chain[1:] {
		if bytes.Equal(chain[0].RawIssuer, c.RawSubject) && chain[0].CheckSignatureFrom(c) == nil {
			return i + 1
		}
	}
	return 0
}

// validChain says that a certificate, or its issuer's, is outside of its validity, which no client accepts.
func validChain(chain []*x509.Certificate, issuer int, now time.Time) error {
	if err := validity(chain[0], now); err != nil || issuer == 0 {
		return err
	}
	if err := validity(chain[issuer], now); err != nil {
		return fmt.Errorf("the issuer's certificate (number %d in the file): %w", issuer+1, err)
	}
	return nil
}

// examine looks at the whole chain for what many clients would not accept.
func examine(chain []*x509.Certificate, issuer int, now time.Time) (warnings []string) {
	leaf := chain[0]
	for i, c := range chain {
		if err := validity(c, now); err != nil && i != 0 && i != issuer {
			warnings = append(warnings, fmt.Sprintf("certificate %d in the file: %v", i+1, err))
		}
	}
	if issuer == 0 && !selfIssued(leaf) && !publicRoot(leaf) {
		warnings = append(warnings, fmt.Sprintf("the certificate of the issuer, %s, is not in the file: unless that is a root which your clients trust, many will refuse: append the intermediate certificate (the authority's \"full chain\")", issuerName(leaf)))
	}
	if len(leaf.ExtKeyUsage) > 0 && !serverAuth(leaf) {
		warnings = append(warnings, "the certificate is not made for servers (no serverAuth in its extended key usage): browsers will refuse it")
	}
	if left := leaf.NotAfter.Sub(now); left > 0 && left < soon(leaf) {
		warnings = append(warnings, fmt.Sprintf("the certificate expires on %s: renew it", date(leaf.NotAfter)))
	}
	return warnings
}

func validity(c *x509.Certificate, now time.Time) error {
	if early := now.Before(c.NotBefore); early || now.After(c.NotAfter) {
		return &ExpiredError{Subject: subject(c), NotBefore: c.NotBefore, NotAfter: c.NotAfter, Early: early}
	}
	return nil
}

// soon is how long before its end a certificate is worth a warning: a week, or
// a sixth of its life if that is less (renewal is usual at a third).
func soon(c *x509.Certificate) time.Duration {
	return min(7*24*time.Hour, c.NotAfter.Sub(c.NotBefore)/6)
}

func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// publicRoot says whether a root of this machine issued leaf directly.
func publicRoot(leaf *x509.Certificate) bool {
	_, err := leaf.Verify(x509.VerifyOptions{KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return !errors.As(err, new(x509.UnknownAuthorityError))
}

func serverAuth(c *x509.Certificate) bool {
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// subject names a certificate in messages.
func subject(c *x509.Certificate) string {
	switch {
	case len(c.DNSNames) > 0:
		return "for " + c.DNSNames[0]
	case c.Subject.CommonName != "":
		return "of " + c.Subject.CommonName
	}
	return "with serial " + c.SerialNumber.String()
}

func issuerName(c *x509.Certificate) string { return cmp.Or(c.Issuer.CommonName, c.Issuer.String()) }
