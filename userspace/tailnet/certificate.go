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
	// certFor is how long a certificate is used before tailscaled is asked again, which renews it by itself
	// (it keeps 90-day ones, and starts at a third of the time left).
	certFor    = 10 * time.Minute
	certErrFor = 5 * time.Second // how long a failure is repeated without asking
	// certTimeout bounds a request; the first certificate of a name is made by ACME meanwhile.
	certTimeout = 2 * time.Minute
)

// certCache holds parsed certificates by name.
type certCache struct {
	flight singleflight.Group
	mu     sync.Mutex
	// +checklocks:mu
	byName map[string]certEntry
}

type certEntry struct {
	cert *tls.Certificate
	err  error
	at   time.Time
}

var errNoName = errors.New("the client named no server")

// CertDomains returns the names that tailscaled can get certificates for, lower case: this node's full name
// where the tailnet has HTTPS on, else none. Errors are those of [Client.Resolve].
func (c *Client) CertDomains(ctx context.Context) ([]string, error) {
	t, err := c.running(ctx, false)
	if err != nil {
		return nil, err
	}
	return slices.Clone(t.certs), nil
}

// GetCertificate returns the certificate that tailscaled has, or gets, for the server name in hi, which must
// be one of [Client.CertDomains]. It has the signature that [tls.Config] wants. The user of this process must
// be root or the one that tailscaled's TS_PERMIT_CERT_UID names.
func (c *Client) GetCertificate(hi *tls.ClientHelloInfo) (*tls.Certificate, error) {
	ctx := hi.Context()
	if ctx == nil { // a hi that crypto/tls didn't make
		ctx = context.Background()
	}
	name := normalName(hi.ServerName)
	if name == "" {
		return nil, errNoName
	}
	if cert, err, ok := c.certs.recent(name); ok {
		return cert, err
	}
	domains, err := c.CertDomains(ctx)
	switch {
	case err != nil:
		if cert := c.certs.valid(name); cert != nil {
			return cert, nil // tailscaled may just be restarting
		}
		return nil, err
	case slices.Contains(domains, name):
		return c.certs.get(ctx, name, c.getCertificate)
	case len(domains) == 0:
		return nil, fmt.Errorf("no certificate for %s: this tailnet has no HTTPS certificates; switch them on in its DNS settings", name)
	}
	return nil, fmt.Errorf("no certificate for %s: tailscaled has them for %s only", name, strings.Join(domains, ", "))
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

// recent returns what came of the last request for name, if that is not long ago.
func (cc *certCache) recent(name string) (cert *tls.Certificate, err error, ok bool) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	e, ok := cc.byName[name]
	keep := certFor
	if e.err != nil {
		keep = certErrFor
	}
	return e.cert, e.err, ok && time.Since(e.at) < keep
}

// valid returns the last certificate for name if it has not expired, else nil.
func (cc *certCache) valid(name string) *tls.Certificate {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if c := cc.byName[name].cert; c != nil && time.Now().Before(c.Leaf.NotAfter) {
		return c
	}
	return nil
}

// get asks once for all who want name now, and goes on without ctx. A failure leaves a valid certificate.
func (cc *certCache) get(ctx context.Context, name string, ask func(string) (*tls.Certificate, error)) (*tls.Certificate, error) {
	got := cc.flight.DoChan(name, func() (any, error) {
		cert, err := ask(name)
		if err != nil {
			if old := cc.valid(name); old != nil {
				cert, err = old, nil
			}
		}
		cc.mu.Lock()
		defer cc.mu.Unlock()
		if cc.byName == nil {
			cc.byName = map[string]certEntry{}
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
