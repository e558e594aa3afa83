package tlsterm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

// TestOpen checks that what is wrong with one pair of files keeps no other from being served, is said, and is
// over once the files are mended.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	good := mint(t, nil, []string{"good.example.org"})
	mended := mint(t, nil, []string{"mended.example.org"})
	other := mint(t, nil, []string{"other.example.org"})
	old := mint(t, nil, []string{"old.example.org"}, validFor(-48*time.Hour, -24*time.Hour))
	early := mint(t, nil, []string{"early.example.org"}, validFor(24*time.Hour, 48*time.Hour))
	cert, key := filepath.Join(dir, "mended.pem"), filepath.Join(dir, "mended.key")
	broken := Spec{Cert: cert, Key: key}
	missing := Spec{Cert: filepath.Join(dir, "none.pem")}
	specs := []Spec{broken, files(t, dir, "old", old), files(t, dir, "early", early), missing, files(t, dir, "good", good)}
	write(t, cert, mended.certPEM)
	write(t, key, other.keyPEM)

	var log logs.Log
	s, err := Open(specs, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	problems := func() (out []string) {
		for _, i := range s.Certificates() {
			out = append(out, i.Problem)
		}
		return out
	}
	for i, want := range []string{"does not match", "expired on", "not valid before", "no such file", ""} {
		if got := problems()[i]; !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("the problem of %s is %q, want %q in it", specs[i].Cert, got, want)
		}
		if want != "" && !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, log.String())
		}
	}
	if i := s.Certificates(); i[0].Default || !i[1].Default {
		t.Errorf("the default is not the first that can be served: %+v", i)
	}
	addr := serve(t, s.Config())
	for _, c := range []struct {
		name string
		want *minted
	}{{"good.example.org", good}, {"old.example.org", old}, {"early.example.org", early}, {"", old}} {
		if !served(t, addr, c.name).Equal(c.want.cert) {
			t.Errorf("not what is served for %q", c.name)
		}
	}
	if s.set.Load().covers(canonical("mended.example.org")) {
		t.Error("a certificate is served without its key")
	}

	// What was broken before is no reason against a change of something else; what would newly be broken is.
	if _, err := s.Prepare(specs[:4]); err != nil {
		t.Errorf("one certificate can't be taken out: %v", err)
	}
	if _, err := s.Prepare(append(specs, Spec{Cert: filepath.Join(dir, "new.pem")})); err == nil || !strings.Contains(err.Error(), "new.pem") ||
		strings.Contains(err.Error(), "none.pem") {
		t.Errorf("a new certificate that is missing: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	os.Remove(key)
	eventually(t, "the present problem is shown", func() bool { return strings.Contains(problems()[0], "no such file") })
	write(t, key, mended.keyPEM)
	eventually(t, "it is served once it is mended", func() bool { return s.set.Load().covers(canonical("mended.example.org")) })
	if !served(t, addr, "mended.example.org").Equal(mended.cert) || problems()[0] != "" {
		t.Errorf("after it was mended: %q", problems())
	}
}

// TestUsable: nothing can be served from files that are all broken, and an expired certificate can.
func TestUsable(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		spec Spec
		want bool
	}{
		{Spec{Cert: filepath.Join(dir, "none.pem")}, false},
		{files(t, dir, "old", mint(t, nil, []string{"old.example.org"}, validFor(-48*time.Hour, -24*time.Hour))), true},
	} {
		s, err := Open([]Spec{c.spec}, new(logs.Log).Logger())
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Usable(); got != c.want {
			t.Errorf("%s: usable %t", c.spec.Cert, got)
		}
	}
}

// TestOldAndNew: of two certificates for one name the one is served that has not expired.
func TestOldAndNew(t *testing.T) {
	dir := t.TempDir()
	old := mint(t, nil, []string{"example.org"}, validFor(-48*time.Hour, -24*time.Hour))
	fresh := mint(t, nil, []string{"example.org"})
	s, err := Open([]Spec{files(t, dir, "old", old), files(t, dir, "new", fresh)}, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	if !served(t, serve(t, s.Config()), "example.org").Equal(fresh.cert) {
		t.Error("the expired one is served")
	}
}
