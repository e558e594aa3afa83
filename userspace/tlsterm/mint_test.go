package tlsterm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// minted is a certificate with its key, as PEM.
type minted struct {
	cert    *x509.Certificate
	key     crypto.Signer
	certPEM []byte
	keyPEM  []byte
}

// mint makes a certificate for names; parent nil signs it by itself.
func mint(t testing.TB, parent *minted, names []string, change ...func(*x509.Certificate)) *minted {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return mintKey(t, key, parent, names, change...)
}

func mintKey(t testing.TB, key crypto.Signer, parent *minted, names []string, change ...func(*x509.Certificate)) *minted {
	t.Helper()
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<60))
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(90 * 24 * time.Hour),
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	for _, c := range change {
		c(template)
	}
	issuer, signer := template, key
	if parent != nil {
		issuer, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &minted{cert: cert, key: key,
		certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		keyPEM:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})}
}

func authority(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: name}
		c.IsCA, c.BasicConstraintsValid = true, true
		c.KeyUsage, c.ExtKeyUsage = x509.KeyUsageCertSign, nil
	}
}

func validFor(from, to time.Duration) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}

func newRSA(t testing.TB) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// write replaces a file as careful tools do: by a rename.
func write(t testing.TB, path string, parts ...[]byte) string {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, bytes.Join(parts, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// files writes m as a pair in dir.
func files(t testing.TB, dir, name string, m *minted) Spec {
	t.Helper()
	return Spec{Cert: write(t, filepath.Join(dir, name+".pem"), m.certPEM), Key: write(t, filepath.Join(dir, name+".key"), m.keyPEM)}
}

// serve terminates TLS with c on a loopback port, echoes one byte and tells of
// the handshakes that failed.
func serve(t testing.TB, c *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(patience))
				tc := tls.Server(conn, c)
				if tc.Handshake() == nil {
					b := make([]byte, 1)
					if n, _ := tc.Read(b); n == 1 {
						tc.Write(b)
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// hello makes a handshake and returns what the server served.
func hello(t testing.TB, addr, name string, change ...func(*tls.Config)) (tls.ConnectionState, error) {
	t.Helper()
	c := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	for _, f := range change {
		f(c)
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	tc := tls.Client(conn, c)
	if err := tc.Handshake(); err != nil {
		return tls.ConnectionState{}, err
	}
	// In TLS 1.3 tickets come after the handshake, and so does an alert.
	if _, err := tc.Write([]byte{1}); err != nil {
		return tls.ConnectionState{}, err
	}
	if _, err := tc.Read(make([]byte, 1)); err != nil {
		return tls.ConnectionState{}, err
	}
	return tc.ConnectionState(), nil
}

func served(t testing.TB, addr, name string, change ...func(*tls.Config)) *x509.Certificate {
	t.Helper()
	st, err := hello(t, addr, name, change...)
	if err != nil {
		t.Fatalf("handshake for %q: %v", name, err)
	}
	return st.PeerCertificates[0]
}
