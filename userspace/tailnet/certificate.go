package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	// certFor is how long a certificate is used before tailscaled is asked
	// again, which renews it by itself (it keeps 90-day ones, and starts at a
	// third of the time left).
	certFor = 10 * time.Minute
	// certErrFor is how long a failure is repeated without asking.
	certErrFor = 5 * time.Second
	// certTimeout bounds a request; the first certificate of a name is made by
	// ACME meanwhile.
	certTimeout = 2 * time.Minute
)

// certCache holds parsed certificates by name.
type certCache struct {
	flight singleflight.Group
	mu     sync.Mutex
	byName map[string]certEntry
}

type certEntry struct {
	cert *tls.Certificate
	err  error
	at   time.Time
}

var errNoName = errors.New("the client named no server")

// CertDomains returns the names that tailscaled can get certificates for, lower
// case: this node's full name where the tailnet has HTTPS on, else none.
// Errors are those of [Client.Resolve].
func (c *Client) CertDomains(ctx context.Context) ([]string, error) {
	t, err := c.running(ctx, false)
	if err != nil {
		return nil, err
	}
	return slices.Clone(t.certs), nil
}

// GetCertificate returns the certificate that tailscaled has, or gets, for the
// server name in hi, which must be one of [Client.CertDomains]. It has the
// signature that [tls.Config] wants. The user of this process must be root or
// the one that tailscaled's TS_PERMIT_CERT_UID names.
func (c *Client) GetCertificate(hi *tls.ClientHelloInfo) (*tls.Certificate, error) {
	ctx := hi.Context()
	if ctx == nil { // a hi that crypto/tls didn't make
		ctx = context.Background()
	}
	name := normalName(hi.ServerName)
	if name == "" {
		return nil, errNoName
	}
	domains, err := c.CertDomains(ctx)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(domains, name) {
		if len(domains) == 0 {
			return nil, fmt.Errorf("no certificate for %s: this tailnet has no HTTPS certificates; switch them on in its DNS settings", name)
		}
		return nil, fmt.Errorf("no certificate for %s: tailscaled has them for %s only", name, strings.Join(domains, ", "))
	}
	return c.certs.get(ctx, name, c.getCertificate)
}

func (c *Client) getCertificate(name string) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(context.Background(), certTimeout)
	defer cancel()
	chain, key, err := c.lc.CertPair(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("get certificate for %s from tailscaled: %w", name, err)
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("certificate for %s from tailscaled: %w", name, err)
	}
	return &cert, nil
}

// get returns a remembered certificate or one request's result, for all who
// ask; it goes on when ctx ends.
func (cc *certCache) get(ctx context.Context, name string, ask func(string) (*tls.Certificate, error)) (*tls.Certificate, error) {
	cc.mu.Lock()
	e, ok := cc.byName[name]
	cc.mu.Unlock()
	age := time.Since(e.at)
	if ok && (e.err == nil && age < certFor || e.err != nil && age < certErrFor) {
		return e.cert, e.err
	}
	got := cc.flight.DoChan(name, func() (any, error) {
		cert, err := ask(name)
		cc.mu.Lock()
		defer cc.mu.Unlock()
		if cc.byName == nil {
			cc.byName = map[string]certEntry{}
		}
		if err != nil && e.cert != nil && time.Now().Before(e.cert.Leaf.NotAfter) {
			cert, err = e.cert, nil // still good: tailscaled may be restarting
		}
		cc.byName[name] = certEntry{cert, err, time.Now()}
		return cert, err
	})
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("certificate for %s: %w", name, ctx.Err())
	case r := <-got:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*tls.Certificate), nil
	}
}
