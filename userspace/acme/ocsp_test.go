package acme

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/tailsplice/tailsplice/userspace/acme/acmetest"
)

// TestOCSP: what the authority's responder says of a certificate is stapled to
// it, and a responder that hangs keeps nobody waiting.
func TestOCSP(t *testing.T) {
	var issuer atomic.Pointer[x509.Certificate]
	var key atomic.Pointer[crypto.Signer]
	var hang atomic.Bool
	gone := make(chan struct{})
	responder := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hang.Load() {
			<-gone
			return
		}
		body, _ := io.ReadAll(r.Body)
		req, err := ocsp.ParseRequest(body)
		if err != nil || issuer.Load() == nil {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		b, err := ocsp.CreateResponse(issuer.Load(), issuer.Load(), ocsp.Response{Status: ocsp.Good, SerialNumber: req.SerialNumber,
			ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(24 * time.Hour)}, *key.Load())
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/ocsp-response")
		w.Write(b)
	}))
	t.Cleanup(responder.Close)
	t.Cleanup(func() { close(gone) })
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{OCSP: responder.URL, RSA: true, Validity: 30 * 24 * time.Hour})
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	fetch := func(what string) []byte {
		res, err := c.Get(strings.Replace(a.Roots(), "/roots/0", what, 1))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		block, _ := pem.Decode(b)
		if block == nil {
			t.Fatalf("%s: %q", what, b)
		}
		return block.Bytes
	}
	cert, err := x509.ParseCertificate(fetch("/intermediates/0"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.ParsePKCS1PrivateKey(fetch("/intermediate-keys/0"))
	if err != nil {
		t.Fatal(err)
	}
	signer := crypto.Signer(k)
	issuer.Store(cert)
	key.Store(&signer)

	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	roots := a.pool()
	h.wait("a.example.org", roots)
	eventually(t, "a staple", func() error {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", h.tls.Addr().String(), &tls.Config{ServerName: "a.example.org", RootCAs: roots})
		if err != nil {
			return err
		}
		defer c.Close()
		staple := c.ConnectionState().OCSPResponse
		if len(staple) == 0 {
			return errors.New("none")
		}
		r, err := ocsp.ParseResponse(staple, cert)
		if err == nil && (r.Status != ocsp.Good || r.SerialNumber.Cmp(c.ConnectionState().PeerCertificates[0].SerialNumber) != 0) {
			err = errors.New("about another certificate")
		}
		return err
	})

	hang.Store(true)
	s.Names = append(s.Names, "b.example.org")
	h.apply(s)
	h.wait("b.example.org", roots)
	closed := make(chan struct{})
	go func() { h.m.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("Close waits for a responder that hangs")
	}
}
