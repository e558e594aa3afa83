// Package acmetest runs pebble, Let's Encrypt's ACME server for tests, and its
// DNS server, for the tests of whatever needs an authority.
//
// Both are built once from the module proxy, outside of this module, and kept
// in the user's cache by version, as the lab keeps tailscaled.
package acmetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Version of pebble.
const Version = "v2.10.1"

const module = "github.com/letsencrypt/pebble/v2/cmd/"

// Programs are the paths of the built programs.
type Programs struct{ Pebble, DNS string }

// Build builds what is not in the cache yet. say is told when that begins.
func Build(ctx context.Context, say func(format string, args ...any)) (Programs, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return Programs{}, fmt.Errorf("go env: %w", err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return Programs{}, err
	}
	dir := filepath.Join(cache, "tailsplice", "pebble-"+Version+"-"+strings.TrimSpace(string(out)))
	p := Programs{filepath.Join(dir, "pebble"), filepath.Join(dir, "pebble-challtestsrv")}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return p, err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return p, err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		// tests of other packages may be building it
		return p, err
	}
	if _, err := os.Stat(dir); err == nil {
		return p, nil
	}
	say("building pebble %s once (kept in %s)", Version, dir)
	tmp := dir + ".new"
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "go", "install", module+"pebble@"+Version, module+"pebble-challtestsrv@"+Version)
	cmd.Env = append(os.Environ(), "GOBIN="+tmp, "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("build pebble: %w\n%s", err, out)
	}
	return p, os.Rename(tmp, dir)
}

// Config says how a pebble is to be.
type Config struct {
	Host     string        // IP address or name that it listens on and is called by
	Port     int           // of the directory; Port+1 is the management's
	HTTPPort int           // where it asks by http-01
	TLSPort  int           // where it asks by tls-alpn-01
	DNS      string        // the DNS server that it asks, host:port
	Validity time.Duration // of certificates
	EAB      [2]string     // if set, the only key id and MAC key that may register
	OCSP     string        // URL of the responder in certificates, if any
	RSA      bool          // its own keys are RSA, which are the only ones that its management gives away
}

// Directory is the ACME directory's URL.
func (c Config) Directory() string { return fmt.Sprintf("https://%s/dir", c.address(0)) }

// Roots is the URL of the root that it issues from; a new one at each start.
func (c Config) Roots() string { return fmt.Sprintf("https://%s/roots/0", c.address(1)) }

func (c Config) address(plus int) string {
	return net.JoinHostPort(c.Host, fmt.Sprint(c.Port+plus))
}

// Env are variables that make pebble quick, and keep it from remembering that a
// name was checked before.
var Env = []string{"PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0"}

// Write writes pebble's files into dir. It returns pebble's arguments, and the
// file with the root that its directory is believed by.
func (c Config) Write(dir string) (args []string, root string, err error) {
	root = filepath.Join(dir, "root.pem")
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if _, err := os.Stat(root); errors.Is(err, os.ErrNotExist) { // a restart has the same one
		if err := writeCertificate(c.Host, root, cert, key); err != nil {
			return nil, "", err
		}
	}
	algorithm := "ecdsa"
	if c.RSA {
		algorithm = "rsa"
	}
	p := map[string]any{
		"listenAddress": c.address(0), "managementListenAddress": c.address(1), "certificate": cert, "privateKey": key,
		"httpPort": c.HTTPPort, "tlsPort": c.TLSPort, "keyAlgorithm": algorithm, "ocspResponderURL": c.OCSP,
		"profiles":   map[string]any{"default": map[string]any{"description": "test", "validityPeriod": int(c.Validity.Seconds())}},
		"retryAfter": map[string]any{"authz": 1, "order": 1},
	}
	if c.EAB[0] != "" {
		p["externalAccountBindingRequired"] = true
		p["externalAccountMACKeys"] = map[string]string{c.EAB[0]: c.EAB[1]}
	}
	b, err := json.Marshal(map[string]any{"pebble": p})
	if err != nil {
		return nil, "", err
	}
	file := filepath.Join(dir, "pebble.json")
	return []string{"-config", file, "-dnsserver", c.DNS}, root, os.WriteFile(file, b, 0o644)
}

// DNSArgs are the arguments of the DNS server: it answers on dns with the given
// addresses ("" for none) for every name, and takes records by HTTP on management.
func DNSArgs(dns, management, ip4, ip6 string) []string {
	return []string{"-dnsserver", dns, "-management", management, "-defaultIPv4", ip4, "-defaultIPv6", ip6,
		"-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", ""}
}

// writeCertificate makes a root, and a certificate of it for a server.
func writeCertificate(host, rootFile, certFile, keyFile string) error {
	make := func(t, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, err
		}
		t.SerialNumber = big.NewInt(time.Now().UnixNano())
		t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
		t.BasicConstraintsValid = true
		if parent == nil {
			parent, parentKey = t, key
		}
		der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
		return key, der, err
	}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: "root of pebble's directory"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	rootKey, rootDER, err := make(root, nil, nil)
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: host}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(host); ip != nil {
		leaf.IPAddresses = []net.IP{ip}
	} else {
		leaf.DNSNames = []string{host}
	}
	key, der, err := make(leaf, root, rootKey)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name, kind string
		der        []byte
	}{{rootFile, "CERTIFICATE", rootDER}, {certFile, "CERTIFICATE", der}, {keyFile, "PRIVATE KEY", pkcs8}} {
		if err := os.WriteFile(f.name, pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der}), 0o600); err != nil {
			return err
		}
	}
	return nil
}
