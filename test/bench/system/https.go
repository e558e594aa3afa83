package system

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

// What terminates TLS has a backend of its own on the server's host: plain HTTP/1.1 with keep-alive on one
// port, and TLS by itself on the other, for direct.
const (
	httpPort  = 6080
	httpsPort = 6443
)

// terminating begins the names of the configurations of systems that terminate TLS.
const terminating = "https-"

// HTTPSBody is what the backend answers, and all of it: 1 KiB.
var HTTPSBody = hex.EncodeToString(stream.At(0, 0, 512))

// StartTerminating starts a system that terminates TLS and sends requests to the backend; the first call
// starts that too.
func (b *Builder) StartTerminating(ctx context.Context, name string) (*System, error) {
	t := b.Topology
	server := t.Target.Addr()
	if b.backend == nil {
		b.backend = &System{Name: "backend", config: terminating, Addr: netip.AddrPortFrom(server, httpPort)}
		if err := b.begin(ctx, b.backend); err != nil {
			return nil, err
		}
	}
	if name == Direct || name == DirectAgain {
		return &System{Name: name, Version: b.backend.Version, Addr: netip.AddrPortFrom(server, httpsPort)}, nil
	}
	s := &System{Name: name, config: terminating, Addr: netip.AddrPortFrom(t.Listen, b.nextPort()), target: netip.AddrPortFrom(server, httpPort)}
	return s, b.begin(ctx, s)
}

// certificate is the name of a file with an ECDSA P-256 key and certificate for the server name; all have the
// same one. It is "" if it can't be made, which whoever reads it will complain of.
func (b *Builder) certificate() string {
	file := filepath.Join(b.Dir, "certificate.pem")
	if _, err := os.Stat(file); err == nil {
		return file
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return ""
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: stream.ServerName}, DNSNames: []string{stream.ServerName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	private, err2 := x509.MarshalPKCS8PrivateKey(key)
	if errors.Join(err, err2) != nil {
		return ""
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return ""
	}
	return file
}
