package tailnet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"testing"
	"time"
)

func certificate(t *testing.T, until time.Time) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"home.ts.net"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: until}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// +checklocksignore
func TestCertificateCache(t *testing.T) {
	var cache certCache
	var now *tls.Certificate // what tailscaled would give
	asked := 0
	get := func(wait time.Duration) (*tls.Certificate, error) {
		e := cache.byName["home.ts.net"]
		e.at = e.at.Add(-wait)
		if cache.byName != nil {
			cache.byName["home.ts.net"] = e
		}
		if c, err, ok := cache.recent("home.ts.net"); ok {
			return c, err
		}
		return cache.get(t.Context(), "home.ts.net", func(string) (*tls.Certificate, error) {
			asked++
			if now == nil {
				return nil, errors.New("no")
			}
			return now, nil
		})
	}
	first, second := certificate(t, time.Now().Add(time.Hour)), certificate(t, time.Now().Add(time.Hour))
	for i, c := range []struct {
		wait  time.Duration
		has   *tls.Certificate // tailscaled
		want  *tls.Certificate
		asked int
	}{
		{0, nil, nil, 1},
		{0, first, nil, 1}, // a failure is not asked about again at once
		{certErrFor, first, first, 2},
		{0, second, first, 2},
		{certFor, second, second, 3},
		{certFor, nil, second, 4}, // it outlives a failure
	} {
		now = c.has
		got, err := get(c.wait)
		if got != c.want || (err != nil) != (c.want == nil) || asked != c.asked {
			t.Fatalf("step %d: %p, %v, asked %d times; want %p, %d", i, got, err, asked, c.want, c.asked)
		}
	}
	// An expired one does not.
	cache.byName["home.ts.net"] = certEntry{cert: certificate(t, time.Now().Add(-time.Second)), at: time.Now()}
	if got, err := get(certFor); err == nil {
		t.Errorf("an expired certificate: %v", got.Leaf.NotAfter)
	}
	// Who gives up leaves, and the request goes on.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	release := make(chan struct{})
	_, err := cache.get(ctx, "slow.ts.net", func(string) (*tls.Certificate, error) { <-release; return first, nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(release)
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if cache.valid("slow.ts.net") == first {
			return
		}
	}
	t.Error("what was asked for is not kept")
}
