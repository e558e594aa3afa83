package tlsterm

import (
	"io/fs"
	"os"
	"time"

	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

// stamp is how a pair's files look from outside: what changes whenever somebody
// writes or replaces one of them.
type stamp [2]fs.FileInfo // cert, key; nil when it can't be looked at

func stampOf(spec Spec) stamp {
	var s stamp
	for i, name := range spec.files() {
		if info, err := os.Stat(name); err == nil { // follows links: what certbot and Kubernetes swap
			s[i] = info
		}
	}
	return s
}

func (s stamp) same(o stamp) bool { return filestamp.Same(s[0], o[0]) && filestamp.Same(s[1], o[1]) }

// watch is what Run remembers between two looks.
type watch struct {
	broken map[[2]string]brokenPair // pairs that changed and could not be read
	warned map[[2]string]expiryWarning
}

type expiryWarning struct {
	at      time.Time
	expired bool
}

type brokenPair struct {
	stamp  stamp
	logged bool
}

// warnEvery is how often an expired or expiring certificate is logged.
const warnEvery = 24 * time.Hour

func (w *watch) look(s *Store) {
	s.reload.Lock()
	defer s.reload.Unlock()
	if w.broken == nil {
		w.broken, w.warned = map[[2]string]brokenPair{}, map[[2]string]expiryWarning{}
	}
	for _, e := range s.set.Load().entries {
		if e.spec.GetCertificate != nil {
			continue
		}
		if e.cert == nil {
			_ = s.refresh(func(o *entry) bool { return o == e }) // which logs what is new about it
			continue
		}
		files := e.spec.files()
		now := stampOf(e.spec)
		if now.same(e.stamp) {
			delete(w.broken, files)
		} else {
			w.changed(s, e, now)
		}
		w.expiry(s, e)
	}
}

// changed reads a pair whose files are not what is served. One look's grace
// lets a writer finish that replaces the two files one after the other.
//
// +checklocks:s.reload
func (w *watch) changed(s *Store, e *entry, now stamp) {
	files := e.spec.files()
	before, seen := w.broken[files]
	settled := seen && before.stamp.same(now)
	if settled && before.logged {
		return
	}
	err := s.refresh(func(o *entry) bool { return o == e })
	if err == nil {
		delete(w.broken, files)
		return
	}
	if settled {
		s.log.Error("certificate changed and is broken: the one before is still served", "cert", e.spec.Cert, "expires", e.leaf.NotAfter, "err", err)
	}
	w.broken[files] = brokenPair{stamp: now, logged: settled}
}

// expiry warns, once a day, of a certificate that has expired or is about to.
func (w *watch) expiry(s *Store, e *entry) {
	now, end := time.Now(), e.leaf.NotAfter
	if end.Sub(now) > soon(e.leaf) {
		return
	}
	files, expired := e.spec.files(), now.After(end)
	last, known := w.warned[files]
	if known && last.expired == expired && now.Sub(last.at) < warnEvery {
		return
	}
	w.warned[files] = expiryWarning{at: now, expired: expired}
	switch {
	case expired:
		s.log.Warn("a certificate has expired and is still served: renew it, its files are read again when they change", "cert", e.spec.Cert, "names", e.names, "expired", end)
	case known: // the first time it was said when it was read
		s.log.Warn("a certificate expires soon: renew it", "cert", e.spec.Cert, "names", e.names, "expires", end)
	}
}

// warn logs what is doubtful about a certificate.
func (s *Store) warn(e *entry) {
	for _, text := range e.warnings {
		s.log.Warn("certificate: "+text, "cert", e.spec.Cert)
	}
}

// readableByAll says whether a key's file is open to every user. A file system
// without modes says 0666 or 0444 for all; there is nothing to advise then.
func readableByAll(name string) (bool, fs.FileMode) {
	info, err := os.Stat(name)
	if err != nil {
		return false, 0
	}
	mode := info.Mode().Perm()
	return mode&0o004 != 0, mode
}
