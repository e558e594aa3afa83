package tlsterm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// FileError is what is wrong with a certificate's or key's file, and what to do about it.
type FileError struct {
	File string
	Err  error
}

func (e *FileError) Error() string { return e.File + ": " + e.Err.Error() }
func (e *FileError) Unwrap() error { return e.Err }

// ExpiredError says that a certificate is outside of its validity.
type ExpiredError struct {
	Subject             string
	NotBefore, NotAfter time.Time
	Early               bool // not yet valid
}

func (e *ExpiredError) Error() string {
	if e.Early {
		return fmt.Sprintf("the certificate %s is not valid before %s: wait, or set this machine's clock", e.Subject, date(e.NotBefore))
	}
	return fmt.Sprintf("the certificate %s expired on %s: renew it", e.Subject, date(e.NotAfter))
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }

// maxFile bounds what is read as a certificate: a chain has a few KiB, and a
// wrong path must not read a disk image.
const maxFile = 1 << 20

// read makes an entry of a spec. All its errors name a file. Where a certificate is only outside of its
// validity the entry is there, too.
func (s *Store) read(spec Spec) (*entry, error) {
	if spec.GetCertificate != nil {
		if spec.Covers == nil {
			return nil, fmt.Errorf("certificate source %q: no Covers", spec.Name)
		}
		return &entry{spec: spec}, nil
	}
	e := &entry{spec: spec, stamp: stampOf(spec)} // before reading: a change meanwhile is seen later
	chain, err := readChain(spec.Cert)
	if err != nil {
		return nil, &FileError{spec.Cert, err}
	}
	key, err := readKey(spec.key())
	if err != nil {
		return nil, &FileError{spec.key(), err}
	}
	if err := matches(spec, chain, key); err != nil {
		return nil, err
	}
	e.leaf, e.chain, e.issuer = chain[0], chain, issuerOf(chain)
	e.cert = &tls.Certificate{PrivateKey: key, Leaf: e.leaf}
	for _, c := range chain {
		e.cert.Certificate = append(e.cert.Certificate, c.Raw)
	}
	e.names, e.warnings = namesOf(e.leaf)
	e.warnings = append(e.warnings, examine(chain, e.issuer, time.Now())...)
	if open, mode := readableByAll(spec.key()); open {
		e.warnings = append(e.warnings, fmt.Sprintf("%s can be read by every user of this machine (mode %o): chmod 600 it", spec.key(), mode))
	}
	return e, e.problem(time.Now())
}

var (
	errNoFile = errors.New("no such file")
	errEmpty  = errors.New("is empty")
)

// readFile reads a small file, with errors that say what to do.
func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	var data []byte
	switch {
	case err != nil:
	case info.IsDir():
		return nil, errors.New("is a directory: name the PEM file in it")
	case !info.Mode().IsRegular():
		return nil, errors.New("is not a regular file")
	case info.Size() > maxFile:
		return nil, fmt.Errorf("has %d bytes, more than any certificate has: is it the right file?", info.Size())
	default:
		data, err = os.ReadFile(name)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errNoFile
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("no permission to read it as user id %d: chown or chmod it, or its directory", os.Geteuid())
	case err != nil:
		if pe, ok := errors.AsType[*fs.PathError](err); ok {
			return nil, pe.Err // FileError has the path
		}
		return nil, err
	case len(bytes.TrimSpace(data)) == 0:
		return nil, errEmpty
	}
	return data, nil
}

// readBlocks reads the PEM blocks of a file. want is what openssl calls what should be in it.
func readBlocks(name, want string) (out []*pem.Block, err error) {
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	for b, rest := pem.Decode(data); b != nil; b, rest = pem.Decode(rest) {
		out = append(out, b)
	}
	switch {
	case len(out) > 0:
		return out, nil
	case data[0] == 0x30: // an ASN.1 SEQUENCE: DER, or PKCS #12
		return nil, fmt.Errorf("is not PEM but binary: convert it with `openssl %s -inform DER -in IN -out OUT`, or `openssl pkcs12 -nodes -in IN -out OUT` if it is a .p12 or .pfx", want)
	}
	return nil, errors.New("is not PEM: there is no whole -----BEGIN ...----- block in it")
}

// readChain reads all certificates of a file: one that can't be read is an error.
func readChain(name string) ([]*x509.Certificate, error) {
	chain, unread, err := readCertificates(name)
	return chain, errors.Join(append(unread, err)...)
}

// readCertificates reads the certificates of a file. unread is what is wrong with
// those that it has to leave out; err, that there is none that can be read.
func readCertificates(name string) (certs []*x509.Certificate, unread []error, err error) {
	bs, err := readBlocks(name, "x509")
	if err != nil {
		return nil, nil, err
	}
	other := ""
	for _, b := range bs {
		if b.Type != "CERTIFICATE" {
			other = b.Type
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			unread = append(unread, fmt.Errorf("certificate %d in it: %w", len(certs)+len(unread)+1, err))
			continue
		}
		certs = append(certs, c)
	}
	switch {
	case len(certs) > 0:
		return certs, unread, nil
	case len(unread) > 0:
		return nil, nil, errors.Join(unread...)
	case strings.HasSuffix(other, "PRIVATE KEY"):
		return nil, nil, errors.New("has a private key and no certificate: are cert and key swapped?")
	case strings.Contains(other, "CERTIFICATE REQUEST"):
		return nil, nil, errors.New("is a certificate request: put here the certificate that the authority made of it")
	}
	return nil, nil, fmt.Errorf("has no certificate, only %s", other)
}

func readKey(name string) (crypto.Signer, error) {
	bs, err := readBlocks(name, "pkey")
	if err != nil {
		return nil, err
	}
	other := ""
	for _, b := range bs {
		if !strings.HasSuffix(b.Type, "PRIVATE KEY") {
			other = b.Type
			continue
		}
		if b.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED") {
			return nil, errors.New("the key is encrypted, and nobody is there to type its passphrase: decrypt it with `openssl pkey -in IN -out OUT`, and chmod 600 OUT")
		}
		return parseKey(b.Bytes)
	}
	if other == "CERTIFICATE" {
		return nil, errors.New("has a certificate and no private key: are cert and key swapped, or is the key in another file?")
	}
	return nil, fmt.Errorf("has no private key, only %s", other)
}

func parseKey(der []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
			return k, nil
		}
		if k, err := x509.ParseECPrivateKey(der); err == nil {
			return k, nil
		}
		return nil, fmt.Errorf("the private key can't be parsed: %w", err)
	}
	switch k := key.(type) {
	case *rsa.PrivateKey, *ecdsa.PrivateKey, ed25519.PrivateKey:
		return k.(crypto.Signer), nil
	}
	return nil, fmt.Errorf("keys of type %T can't serve TLS: make an ECDSA P-256 or RSA key", key)
}

// matches checks that key belongs to the chain's first certificate.
func matches(spec Spec, chain []*x509.Certificate, key crypto.Signer) error {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return &FileError{spec.key(), errors.New("the key can't be compared with the certificate's")}
	}
	at := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return public.Equal(c.PublicKey) })
	switch {
	case at == 0:
		return nil
	case at > 0:
		return &FileError{spec.Cert, fmt.Errorf("the key belongs to certificate %d in the file (%s): put that one first, its intermediates after it", at+1, subject(chain[at]))}
	case spec.key() == spec.Cert:
		return &FileError{spec.Cert, fmt.Errorf("the private key in it does not match the certificate %s", subject(chain[0]))}
	}
	return &FileError{spec.key(), fmt.Errorf("the private key does not match the certificate %s in %s", subject(chain[0]), spec.Cert)}
}
