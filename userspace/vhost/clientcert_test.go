package vhost

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"testing"
	"time"
)

// TestCheckClient judges clients' certificates.
func TestCheckClient(t *testing.T) {
	type signed struct {
		*x509.Certificate
		key *ecdsa.PrivateKey
	}
	sign := func(name string, by *signed, change func(*x509.Certificate)) *signed {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
		change(c)
		parent, parentKey := c, key
		if by != nil {
			parent, parentKey = by.Certificate, by.key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		out, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return &signed{out, key}
	}
	authority := func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }
	usage := func(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = u }
	}
	root, stranger := sign("root", nil, authority), sign("root", nil, authority)
	between := sign("between", root, authority)
	cas := x509.NewCertPool()
	cas.AddCert(root.Certificate)
	for _, c := range []struct {
		name  string
		chain []*signed
		ok    bool
	}{
		{"for clients", []*signed{sign("c", root, usage(x509.ExtKeyUsageClientAuth))}, true},
		{"for anything", []*signed{sign("c", root, usage())}, true},
		{"for servers only", []*signed{sign("c", root, usage(x509.ExtKeyUsageServerAuth))}, false},
		{"of an intermediate", []*signed{sign("c", between, usage(x509.ExtKeyUsageClientAuth)), between}, true},
		{"without the intermediate", []*signed{sign("c", between, usage(x509.ExtKeyUsageClientAuth))}, false},
		{"of another authority of that name", []*signed{sign("c", stranger, usage(x509.ExtKeyUsageClientAuth))}, false},
		{"of one that it brings along", []*signed{sign("c", stranger, usage(x509.ExtKeyUsageClientAuth)), stranger}, false},
		{"expired", []*signed{sign("c", root, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })}, false},
	} {
		state := &tls.ConnectionState{ServerName: "a.test"}
		for _, s := range c.chain {
			state.PeerCertificates = append(state.PeerCertificates, s.Certificate)
		}
		if err := checkClient(state, cas, "a.test"); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	for name, want := range map[string]error{"a.test": errNoClientCertificate, "A.test.": errNoClientCertificate, "b.test": errOtherName, "": errOtherName} {
		if err := checkClient(&tls.ConnectionState{ServerName: name}, cas, "a.test"); !errors.Is(err, want) {
			t.Errorf("a connection for %q without a certificate: %v", name, err)
		}
	}
	if err := checkClient(nil, cas, "a.test"); !errors.Is(err, errNoClientCertificate) {
		t.Errorf("without TLS: %v", err)
	}
}
