package vhost

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/selfsigned"
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

// asking makes a hop ask clients for a certificate of ca.
func asking(t *testing.T, ca tls.Certificate) func(*config) {
	return func(c *config) {
		overTLS(t, "example.org")(c)
		ask := c.TLS.Clone()
		ask.ClientAuth = tls.RequestClientCert
		c.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return ask, nil }
		lead := c.Route
		c.Route = func(r *http.Request, host, path string) (*Route, error) {
			route, err := lead(r, host, path)
			route.ClientCAs = func() *x509.CertPool { return selfsigned.Pool(ca) }
			return route, err
		}
	}
}

// TestClientCertificatePatience lets somebody take longer over a client certificate than a handshake may take that
// waits for no person.
func TestClientCertificatePatience(t *testing.T) {
	own := selfsigned.Certificate(t, "client")
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "served") })
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, p := range []protocol{{"h1 TLS", true, false}, {"h2 TLS", true, true}} {
			t.Run(tls.VersionName(version)+" "+p.name, func(t *testing.T) {
				t.Parallel()
				h := newHop(t, up, asking(t, own), func(c *config) { c.HeaderTimeout = 5 * time.Second })
				client := p.client(t, h)
				client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true, ServerName: "example.org", MaxVersion: version,
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
						// A connection that came later and says nothing is ended: so much time has passed.
						c, err := net.Dial("tcp", h.addr)
						if err != nil {
							return nil, err
						}
						defer c.Close()
						io.Copy(io.Discard, c)
						return &own, nil
					}}
				if res, body := get(t, client, p.url("/")); res.StatusCode != 200 || body != "served" {
					t.Errorf("%d %q", res.StatusCode, body)
				}
			})
		}
	}
	t.Run("not for ever", func(t *testing.T) {
		h := newHop(t, up, asking(t, own), func(c *config) { c.HeaderTimeout, c.CertificateTimeout = time.Hour, 100*time.Millisecond })
		c, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ended := make(chan struct{})
		tc := tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: "example.org", GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			<-ended
			return &own, nil
		}})
		go tc.Handshake()
		select {
		case err := <-h.serveErr:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("ended by %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("not ended within a minute")
		}
		close(ended)
	})
}

// TestRefusedCertificatePage shows strangers nothing of the authority that would let them in.
func TestRefusedCertificatePage(t *testing.T) {
	own, stranger := selfsigned.Certificate(t, "Corp Vault CA"), selfsigned.Certificate(t, "Corp Vault CA")
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) { t.Error("a stranger got through") })
	for _, p := range []protocol{{"h1 TLS", true, false}, {"h2 TLS", true, true}} {
		for name, shown := range map[string][]tls.Certificate{"the client showed no certificate": nil, "is not one of those": {stranger}} {
			h := newHop(t, up, asking(t, own))
			client := p.client(t, h)
			client.Transport.(*http.Transport).TLSClientConfig.Certificates = shown
			res, body := get(t, client, p.url("/"))
			if res.StatusCode != 403 || strings.Contains(body, "Vault") || strings.Contains(body, "x509") || !strings.Contains(body, name) {
				t.Errorf("%s, %s: %d %q", p.name, name, res.StatusCode, body)
			}
			if err := h.request(t, 1).Err; shown != nil && !strings.Contains(err.Error(), "Vault") {
				t.Errorf("the log does not say of which authority: %v", err)
			}
		}
	}
}
