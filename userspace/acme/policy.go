package acme

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
)

// policy is how certificates are obtained: a section without its names.
type policy struct {
	settings Section
	storage  *storage
	issuers  []*issuer
	config   *certmagic.Config
}

func newPolicy(m *Manager, s Section) (*policy, error) {
	p := &policy{settings: s, storage: storageAt(s.Storage)}
	var issuers []certmagic.Issuer
	for _, ca := range s.CAs {
		client, err := newHTTPClient(ca.RootFile)
		if err != nil {
			return nil, err
		}
		i := &issuer{m: m, policy: p, ca: ca, http: client}
		p.issuers = append(p.issuers, i)
		issuers = append(issuers, i)
	}
	p.config = certmagic.New(m.cache(), certmagic.Config{
		Issuers: issuers, Storage: p.storage, Logger: m.zap,
		KeySource: certmagic.StandardKeyGenerator{KeyType: certmagic.P256},
	})
	return p, nil
}

// newHTTPClient talks to an authority.
func newHTTPClient(rootFile string) (*http.Client, error) {
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: 15 * time.Second, ResponseHeaderTimeout: 30 * time.Second, IdleConnTimeout: 30 * time.Second}
	if rootFile != "" {
		pem, err := os.ReadFile(rootFile)
		if err != nil {
			return nil, fmt.Errorf("acme: ca: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("acme: ca: %s has no PEM certificate: name the file with the root certificate of the private authority's directory", rootFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{Transport: t, Timeout: time.Minute}, nil
}

// pair is a certificate with its key as found in storage.
type pair struct {
	cert   *tls.Certificate
	issuer *issuer
}

// newest finds the certificate for name in storage that is valid longest, or nil. What can't be read or
// doesn't fit together is passed over: an attempt replaces it, and says why if it can't.
func (p *policy) newest(name string) *pair {
	var best *pair
	for _, i := range p.issuers {
		key := i.IssuerKey()
		for _, c := range p.storage.generations(certmagic.StorageKeys.SiteCert(key, name)) {
			for _, k := range p.storage.generations(certmagic.StorageKeys.SitePrivateKey(key, name)) {
				cert, err := tls.X509KeyPair(c, k)
				if err != nil || cert.Leaf.VerifyHostname(strings.Replace(name, "*.", "any.", 1)) != nil {
					continue
				}
				if best == nil || cert.Leaf.NotAfter.After(best.cert.Leaf.NotAfter) {
					best = &pair{&cert, i}
				}
			}
		}
	}
	return best
}

// checkStorage says in the log what is wrong with the storage's folder, which keeps nobody from being served.
func (p *policy) checkStorage(log *slog.Logger) {
	if err := p.storage.usable(); err != nil {
		log.Error("acme storage can't be used: certificates that it has are served, new ones can't be obtained", "storage", p.settings.Storage, "err", err)
		return
	}
	if info, err := os.Stat(p.settings.Storage); err == nil && info.Mode().Perm()&0o077 != 0 {
		log.Warn("acme storage is open to other users of this machine: chmod 700 it", "storage", p.settings.Storage, "mode", fmt.Sprintf("%o", info.Mode().Perm()))
	}
}

// attemptTimeout is how long an attempt may take.
func (p *policy) attemptTimeout() time.Duration {
	d := 5 * time.Minute
	if slices.Contains(p.settings.Challenges, DNS01) {
		d += 2 * (p.settings.DNS.limit() + p.settings.DNS.Wait)
	}
	return d
}
