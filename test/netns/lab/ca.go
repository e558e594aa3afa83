package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// CA is the world's own certificate authority, known to its client only: a root and, as with real ones, an
// intermediate that issues.
type CA struct {
	PEM  []byte         // the root certificate
	Pool *x509.CertPool // with the root in it

	issuer    *x509.Certificate
	issuerPEM []byte
	key       *ecdsa.PrivateKey // of the issuer
}

func newCA() (*CA, error) {
	root, rootKey, rootPEM, err := newAuthority("tailsplice lab root", nil, nil)
	if err != nil {
		return nil, err
	}
	ca := &CA{PEM: rootPEM, Pool: x509.NewCertPool()}
	ca.Pool.AddCert(root)
	ca.issuer, ca.key, ca.issuerPEM, err = newAuthority("tailsplice lab CA", root, rootKey)
	return ca, err
}

// newAuthority makes a certificate that may issue others, signed by itself where there is no parent.
func newAuthority(name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 7),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent == nil {
		parent, parentKey = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), parentKey)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, pemBlock("CERTIFICATE", der), err
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// Issue makes a server certificate (the chain without the root) for names, and its key, both PEM. It is valid
// for a day.
func (ca *CA) Issue(names ...string) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 1),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.issuer, k.Public(), ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("issue a certificate for %v: %w", names, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return append(pemBlock("CERTIFICATE", der), ca.issuerPEM...), pemBlock("PRIVATE KEY", pkcs8), nil
}

// Where InstallCertificate puts what it installs.
const (
	CertFile = "/etc/tailsplice/vsq.pem"
	KeyFile  = "/etc/tailsplice/vsq.key"
)

// InstallCertificate writes a certificate for names (by default Site and *.Domain) and its key to CertFile
// and KeyFile of the host.
func (h *Host) InstallCertificate(names ...string) error {
	if len(names) == 0 {
		names = []string{Site, "*." + Domain}
	}
	cert, key, err := h.world.CA.Issue(names...)
	if err != nil {
		return err
	}
	if err := h.WriteFile(CertFile, cert, 0o644); err != nil {
		return err
	}
	return h.WriteFile(KeyFile, key, 0o600)
}
