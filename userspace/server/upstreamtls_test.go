package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// deviceCertificate is what old devices make for themselves: key signs it, change says what is odd.
func deviceCertificate(t *testing.T, key crypto.Signer, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "device"}, DNSNames: []string{"device.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// oddCertificates are one with a negative serial number, and one with a URI whose host is none.
func oddCertificates(t *testing.T) (negative, uri tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const serial = 0x7654321076543210
	negative = deviceCertificate(t, key, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(serial) })
	// crypto/x509 makes none: the sign is set afterwards, and the signature is wrong then.
	at := strings.Index(string(negative.Certificate[0]), "\x76\x54\x32\x10\x76\x54\x32\x10")
	negative.Certificate[0][at] |= 0x80
	uri = deviceCertificate(t, key, func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "urn", Host: "a..b"}} })
	return negative, uri
}

// TestInsecureUpstream serves from devices that nobody could prove anything about. The page for the one certificate that
// Go can't read doesn't blame its proof.
func TestInsecureUpstream(t *testing.T) {
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	negative, uri := oddCertificates(t)
	plain := func(*x509.Certificate) {}
	device := func(c *tls.Config) string {
		ln, err := tls.Listen("tcp", "127.0.0.1:0", c)
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, tls.VersionName(r.TLS.Version)) }), ErrorLog: log.New(io.Discard, "", 0)}
		go s.Serve(ln)
		t.Cleanup(func() { s.Close() })
		return ln.Addr().String()
	}
	ec, rsaOnly := deviceCertificate(t, ecKey, plain), deviceCertificate(t, rsaKey, plain)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
node: home
listeners:
  - listen: [%q]
    mode: http
    routes:
      - { host: a.test, path: /negative, forward: %q, upstream: { protocol: https, insecure: true } }
      - { host: a.test, path: /tls10, forward: %q, upstream: { protocol: https, insecure: true } }
      - { host: a.test, path: /rsa, forward: %q, upstream: { protocol: https, insecure: true } }
      - { host: a.test, path: /new, forward: %q, upstream: { protocol: https, insecure: true } }
      - { host: a.test, path: /strict, forward: %q, upstream: { protocol: https } }
      - { host: a.test, path: /uri, forward: %q, upstream: { protocol: https, insecure: true } }
      - { host: a.test, path: /none, forward: %q, upstream: { protocol: https, insecure: true } }
`, addr,
		device(&tls.Config{Certificates: []tls.Certificate{negative}}),
		device(&tls.Config{Certificates: []tls.Certificate{ec}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}),
		device(&tls.Config{Certificates: []tls.Certificate{rsaOnly}, MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}}),
		device(&tls.Config{Certificates: []tls.Certificate{ec}}),
		device(&tls.Config{Certificates: []tls.Certificate{ec}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}),
		device(&tls.Config{Certificates: []tls.Certificate{uri}}),
		backend(t, func(c net.Conn) { io.WriteString(c, "220 no TLS\r\n"); c.Close() })))
	for path, want := range map[string]string{"/negative": "TLS 1.3", "/tls10": "TLS 1.0", "/rsa": "TLS 1.1", "/new": "TLS 1.3",
		"/strict": "There is no secure connection to a local service", "/uri": "There is no secure connection to a local service", "/none": "There is no secure connection to a local service"} {
		req, _ := http.NewRequest("GET", "http://"+addr+path, nil)
		req.Host = "a.test"
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if !strings.Contains(string(body), want) || strings.Contains(string(body), "could not prove") {
			t.Errorf("%s: %s %q, want %q", path, res.Status, body, want)
		}
	}
	eventually(t, "the log says what can't be read", func() bool { return strings.Contains(d.log.String(), `cannot parse URI`) })
}

// TestOddAuthorities starts with bundles in which there is one certificate that Go can't read.
func TestOddAuthorities(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	negative, uri := oddCertificates(t)
	ca, odd := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "odd.pem")
	writeCA(t, ca, uri, negative, cert)
	writeCA(t, odd, uri)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	up := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "served") })}
	go up.Serve(ln)
	t.Cleanup(func() { up.Close() })
	addr := freeAddr(t)
	yaml := `
listeners:
  - listen: [%q]
    mode: https
    certificates: [ { files: { cert: %q, key: %q } } ]
    default: { forward: %q, upstream: { protocol: https, ca: %q, server_name: a.test }, client_certificates: { ca: %[5]q } }
`
	d := start(t, fmt.Sprintf(yaml, addr, certFile, keyFile, ln.Addr(), ca))
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr, Timeout: time.Minute}).Get("https://" + addr + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); string(body) != "served" {
		t.Errorf("%s %q", res.Status, body)
	}
	if !strings.Contains(d.log.String(), "an authority is left out") || !strings.Contains(d.log.String(), "certificate 1 in it") {
		t.Error("the log does not say what is left out")
	}
	if f, err := New(parse(t, fmt.Sprintf(yaml, freeAddr(t), certFile, keyFile, ln.Addr(), odd)), Options{Log: d.log.Logger()}); err == nil || !strings.Contains(err.Error(), "certificate 1 in it") {
		if err == nil {
			f.Close()
		}
		t.Errorf("a bundle of nothing that can be read: %v", err)
	}
}
