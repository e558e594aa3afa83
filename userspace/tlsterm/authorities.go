package tlsterm

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

// Authorities are those of a PEM file, by which others' certificates are verified. Make them with
// [OpenAuthorities]; their methods may be called from any goroutine.
type Authorities struct {
	file string
	log  *slog.Logger

	mu      sync.Mutex
	pool    *x509.CertPool // +checklocks:mu
	version string         // +checklocks:mu
	looked  time.Time      // +checklocks:mu
	// +checklocks:mu
	info os.FileInfo // of the file that was read
	// +checklocks:mu
	failed string // the last complaint
}

// OpenAuthorities reads a PEM file of certificates; the error is a *FileError. A certificate that can't be
// read is left out and logged: one odd root in a bundle of many is no reason to do without all. The file is
// read again when it changes. A file that is gone, empty, or without a readable certificate stands for no
// authority: its owner took the authorities away. While the file can't be read they stay as they were. Either
// is logged once. There is nothing to close.
func OpenAuthorities(file string, log *slog.Logger) (*Authorities, error) {
	a := &Authorities{file: file, log: log, looked: time.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.read(); err != nil {
		return nil, err
	}
	return a, nil
}

// Pool is the authorities as they are now, and a word that tells them from
// those of another time: the same for the same certificates.
func (a *Authorities) Pool() (pool *x509.CertPool, version string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := time.Now(); now.Sub(a.looked) >= filestamp.Every {
		a.looked = now
		a.look()
	}
	return a.pool, a.version
}

// look reads the file if it has changed.
//
// +checklocks:a.mu
func (a *Authorities) look() {
	now, err := os.Stat(a.file)
	if err == nil && filestamp.Same(now, a.info) {
		return
	}
	before := a.version
	if err := a.read(); err != nil {
		consequence := "the previous ones stay in force"
		if a.hasNone() {
			consequence = "nobody's certificate counts"
			a.pool, a.version = x509.NewCertPool(), "none"
		}
		if a.failed != err.Error() {
			a.failed = err.Error()
			a.log.Error("the file of authorities can't be used: "+consequence, "err", err)
		}
		return
	}
	a.failed = ""
	if a.version != before {
		a.log.Info("authorities changed", "file", a.file)
	}
}

// hasNone says whether a file that read has refused is one without an authority, and not one that can't be
// read.
func (a *Authorities) hasNone() bool {
	_, err := readFile(a.file)
	return err == nil || errors.Is(err, errNoFile) || errors.Is(err, errEmpty)
}

// +checklocks:a.mu
func (a *Authorities) read() error {
	info, _ := os.Stat(a.file) // before reading: a change meanwhile is seen later
	certs, unread, err := readCertificates(a.file)
	if err != nil {
		return &FileError{a.file, err}
	}
	for _, err := range unread {
		a.log.Warn("an authority is left out, for its certificate can't be read", "file", a.file, "err", err)
	}
	pool, sum := x509.NewCertPool(), sha256.New()
	for _, c := range certs {
		pool.AddCert(c)
		sum.Write(c.Raw)
	}
	a.pool, a.version, a.info = pool, hex.EncodeToString(sum.Sum(nil)[:8]), info
	return nil
}
