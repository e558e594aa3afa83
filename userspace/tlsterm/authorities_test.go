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
	write(t, file, []byte("nonsense"))
	for range 3 {
		if !trusts(two) {
			t.Error("a broken file takes what was there")
		}
	}
	os.Remove(file)
	if !trusts(two) {
		t.Error("a missing file takes what was there")
	}
	if n := strings.Count(log.String(), "stay in force"); n != 2 {
		t.Errorf("%d complaints, want 2: %s", n, log.String())
	}
	write(t, file, one.certPEM, two.certPEM)
	if !trusts(one) || !trusts(two) {
		t.Error("the change after the trouble is not in force")
	}
	var fe *FileError
	if _, err := OpenAuthorities(filepath.Join(t.TempDir(), "none.pem"), log.Logger()); !errors.As(err, &fe) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a file that is not there: %v", err)
	}
}
