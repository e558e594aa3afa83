package tlsterm

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

// TestAuthorities changes a file of authorities, breaks it and removes it.
//
// +checklocksignore
func TestAuthorities(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	one, two := mint(t, nil, []string{"one"}, authority("one")), mint(t, nil, []string{"two"}, authority("two"))
	var log logs.Log
	write(t, file, one.certPEM)
	a, err := OpenAuthorities(file, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	trusts := func(m *minted) bool {
		a.mu.Lock()
		a.looked = time.Time{} // an interval has passed
		a.mu.Unlock()
		pool, _ := a.Pool()
		_, err := m.cert.Verify(x509.VerifyOptions{Roots: pool})
		return err == nil
	}
	_, first := a.Pool()
	if !trusts(one) || trusts(two) {
		t.Fatal("not the file's authorities")
	}
	write(t, file, one.certPEM, []byte("\n"))
	if trusts(one); a.info.Size() != int64(len(one.certPEM)+1) {
		t.Fatal("the file was not read again")
	}
	if _, v := a.Pool(); v != first {
		t.Error("the same certificates are another version")
	}
	write(t, file, two.certPEM)
	if trusts(one) || !trusts(two) {
		t.Error("the change is not in force")
	}
	if _, v := a.Pool(); v == first {
		t.Error("other certificates are the same version")
	}
	// Whoever takes the last one out, in whatever way, wants nobody to come in by it.
	for name, take := range map[string]func(){
		"emptied":            func() { write(t, file) },
		"only a line's end":  func() { write(t, file, []byte("\n")) },
		"nonsense":           func() { write(t, file, []byte("nonsense")) },
		"a certificate, cut": func() { write(t, file, two.certPEM[:len(two.certPEM)/2]) },
		"removed":            func() { os.Remove(file) },
	} {
		write(t, file, two.certPEM)
		if !trusts(two) {
			t.Errorf("before %s: it is not trusted", name)
		}
		before := log.Count("nobody's certificate counts")
		take()
		for range 3 {
			if trusts(two) {
				t.Errorf("%s: it is trusted still", name)
			}
		}
		if n := log.Count("nobody's certificate counts") - before; n != 1 {
			t.Errorf("%s: %d complaints", name, n)
		}
		pool, v := a.Pool()
		if v == first || pool == nil {
			t.Errorf("%s: version %s, pool %v", name, v, pool)
		}
	}
	// What can't be read at all says nothing of what is in it.
	write(t, file, two.certPEM)
	trusts(two)
	os.Remove(file)
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	if !trusts(two) || log.Count("stay in force") != 1 {
		t.Error("a file that can't be read takes what was there")
	}
	os.Remove(file)
	write(t, file, one.certPEM, two.certPEM)
	if !trusts(one) || !trusts(two) {
		t.Error("the change after the trouble is not in force")
	}
	var fe *FileError
	if _, err := OpenAuthorities(filepath.Join(t.TempDir(), "none.pem"), log.Logger()); !errors.As(err, &fe) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a file that is not there: %v", err)
	}
}
