package acme

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mholt/acmez/v3/acme"

	"github.com/tailsplice/tailsplice/userspace/acme/acmetest"
)

// TestChallenges: each challenge alone gets a certificate, several names at
// once, and what is stored nobody else may read.
func TestChallenges(t *testing.T) {
	dns, manage := nameServer(t, "127.0.0.1")
	hook := &Hook{Exec: []string{os.Args[0], "dns-hook", manage}}
	for _, c := range []struct {
		name    string
		section Section
		ask     []string
	}{
		{"http-01", Section{Names: []string{"a.example.org", "b.example.org", "c.example.org"}, Challenges: []string{HTTP01}}, []string{"a.example.org", "b.example.org", "c.example.org"}},
		{"tls-alpn-01", Section{Names: []string{"a.example.org", "b.example.org"}, Challenges: []string{TLSALPN01}}, []string{"a.example.org", "b.example.org"}},
		{"dns-01", Section{Names: []string{"example.org", "*.example.org"}, DNS: hook}, []string{"example.org", "any.example.org"}},
		{"default", Section{Names: []string{"a.example.org"}, Email: "me@example.org"}, []string{"a.example.org"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			a := newAuthority(t, h, acmetest.Config{DNS: dns})
			s := c.section
			s.CAs, s.Storage = []CA{a.ca()}, storageDir(t)
			h.apply(s)
			roots := a.pool()
			for _, name := range c.ask {
				h.wait(name, roots)
			}
			if n := a.issued(); n != len(s.Names) {
				t.Errorf("%d certificates were issued: want %d", n, len(s.Names))
			}
			for _, name := range s.Names {
				if st := h.status(name); st.State != StateValid || st.CA != a.Directory() || time.Until(st.RenewAt) < 30*time.Minute || time.Until(st.RenewAt) > 45*time.Minute {
					t.Errorf("status %+v", st)
				}
			}
			if _, err := h.get("other.example.net", nil); err == nil {
				t.Error("a name of nobody's is served")
			}
			files := 0
			filepath.WalkDir(s.Storage, func(path string, d fs.DirEntry, _ error) error {
				info, err := d.Info()
				if err != nil {
					t.Error(err)
					return nil
				}
				want := fs.FileMode(0o600)
				if files++; d.IsDir() {
					want = 0o700
				}
				if info.Mode().Perm() != want {
					t.Errorf("%s has mode %o: want %o", path, info.Mode().Perm(), want)
				}
				return nil
			})
			if files < 8 {
				t.Errorf("%d files and folders in storage: the test looks in the wrong place", files)
			}
			if err := contains(h.log.String(), "certificate obtained", "its terms of service count as agreed"); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKept: what is in storage is served by the next daemon from its first
// handshake on, without any authority, and no reload orders it again.
func TestKept(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	roots := a.pool()
	first := h.wait("a.example.org", roots)
	other := h.m.Source(Section{Names: []string{"z.example.org"}}) // as another listener has it
	if c, err := other.GetCertificate(&tls.ClientHelloInfo{ServerName: "a.example.org"}); c != nil || err != nil {
		t.Errorf("a section without the name gives its certificate: %v, %v", c, err)
	}
	for range 3 {
		h.apply(s)
	}
	s.Email = "other@example.org" // another account, the same authority
	h.apply(s)
	s.Names = append(s.Names, "b.example.org")
	h.apply(s)
	h.wait("b.example.org", roots)
	if n := a.issued(); n != 2 {
		t.Errorf("%d certificates were issued: want 2", n)
	}
	a.stop()
	next := newHost(t)
	next.apply(s)
	cert, err := next.get("a.example.org", roots)
	if err != nil {
		t.Fatalf("the first handshake after a restart: %v", err)
	}
	if !cert.Equal(first) {
		t.Error("the certificate is another one")
	}
	if _, err := next.get("", nil); err != nil {
		t.Errorf("a hello without a name: %v", err)
	}
}

// TestRemoved: a name that the configuration drops is no longer served, and
// comes back from storage.
func TestRemoved(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{})
	both := Section{Names: []string{"a.example.org", "b.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(both)
	roots := a.pool()
	h.wait("a.example.org", roots)
	h.wait("b.example.org", roots)
	one := both
	one.Names = both.Names[:1]
	h.apply(one)
	if _, err := h.get("b.example.org", roots); err == nil {
		t.Error("b is still served")
	}
	h.apply(both)
	if _, err := h.get("b.example.org", roots); err != nil {
		t.Errorf("b came back and is not served at once: %v", err)
	}
	if n := a.issued(); n != 2 {
		t.Errorf("%d certificates were issued: want 2", n)
	}
}

// TestRenewal: short-lived certificates are renewed again and again, while no
// handshake fails or gets one that has expired.
func TestRenewal(t *testing.T) {
	t.Parallel()
	const life = 24 * time.Second // a third is left for each renewal
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{Validity: life})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	roots := a.pool()
	h.wait("a.example.org", roots)
	serials := map[string]bool{}
	handshakes := 0
	for end := time.Now().Add(patience); len(serials) < 3 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		cert, err := h.get("a.example.org", roots)
		if err != nil {
			t.Fatalf("handshake %d, with %d certificates before: %v", handshakes, len(serials), err)
		}
		serials[cert.SerialNumber.String()] = true
		handshakes++
	}
	if len(serials) < 3 {
		t.Errorf("%d certificates in %v: want 3 of %v each", len(serials), patience, life)
	}
	if n := a.issued(); n > len(serials) {
		t.Errorf("%d certificates were issued, %d were served", n, len(serials))
	}
	t.Logf("%d handshakes, %d certificates", handshakes, len(serials))
}

// TestAuthorityDown: while the authority is down the certificate that there is
// goes on, log and status say why; it is renewed when the authority is back,
// which has forgotten the account meanwhile.
func TestAuthorityDown(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{Validity: 20 * time.Second})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	old := a.pool()
	first := h.wait("a.example.org", old)
	a.stop()
	eventually(t, "the failed renewal", func() error {
		st := h.status("a.example.org")
		if st.State != StateFailing || st.NextTry.IsZero() {
			return fmt.Errorf("%+v", st)
		}
		return contains(st.Problem, "127.0.0.1", "can't reach the authority", "refuses connections")
	})
	if err := contains(h.log.String(), "certificate can't be obtained", "can't reach the authority", "serving=\"the certificate that expires"); err != nil {
		t.Error(err)
	}
	if cert, err := h.get("a.example.org", nil); err != nil || !cert.Equal(first) { // expired or not
		t.Errorf("while the authority is down: %v", err)
	}
	a.start()
	h.wait("a.example.org", a.pool())
	if st := h.status("a.example.org"); st.State != StateValid || st.Problem != "" {
		t.Errorf("after all: %+v", st)
	}
	if err := contains(h.log.String(), "does not know the acme account any more"); err != nil {
		t.Error(err)
	}
}

// TestFallback: the second authority steps in for the first.
func TestFallback(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{})
	down := CA{Directory: fmt.Sprintf("https://127.0.0.1:%d/dir", freePort(t))}
	h.apply(Section{Names: []string{"a.example.org"}, CAs: []CA{down, a.ca()}, Storage: storageDir(t)})
	h.wait("a.example.org", a.pool())
	if st := h.status("a.example.org"); st.CA != a.Directory() || st.State != StateValid {
		t.Errorf("%+v", st)
	}
	if err := contains(h.log.String(), "the certificate came from the fallback", "can't reach the authority"); err != nil {
		t.Error(err)
	}
}

// TestOtherAuthority: when the configuration names another authority, the old
// certificate is served until the new one is there.
func TestOtherAuthority(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a, b := newAuthority(t, h, acmetest.Config{}), newAuthority(t, h, acmetest.Config{})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	h.wait("a.example.org", a.pool())
	rootsB := b.pool()
	b.stop()
	s.CAs = []CA{b.ca()}
	h.apply(s)
	eventually(t, "the failed order", func() error { return contains(h.status("a.example.org").Problem, "can't reach") })
	if _, err := h.get("a.example.org", a.pool()); err != nil {
		t.Errorf("the old certificate: %v", err)
	}
	_ = rootsB
	b.start()
	h.wait("a.example.org", b.pool())
}

// TestAccountBinding: an authority that wants it gets it, and otherwise the
// error says what it wants.
func TestAccountBinding(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{EAB: [2]string{"kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"}})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	eventually(t, "the refusal", func() error { return contains(h.status("a.example.org").Problem, "set acme.eab") })
	s.CAs[0].EABKeyID, s.CAs[0].EABMACKey = a.EAB[0], a.EAB[1]
	s.CAs = []CA{s.CAs[0]}
	s.Storage = storageDir(t)
	h.apply(s)
	h.wait("a.example.org", a.pool())
}

// TestProblems: what authorities report teaches what to do.
func TestProblems(t *testing.T) {
	nothing, _ := nameServer(t, "")
	for _, c := range []struct {
		name    string
		config  acmetest.Config
		section Section
		change  func(*testing.T, *authority, *Section)
		want    []string
	}{
		{name: "no DNS record", config: acmetest.Config{DNS: nothing}, section: Section{Challenges: []string{HTTP01}},
			want: []string{"http-01", "make its A or AAAA record in the public DNS point to your edges"}},
		{name: "port 80 is closed", config: acmetest.Config{HTTPPort: freePort(t)}, section: Section{Challenges: []string{HTTP01}},
			want: []string{"http-01: connection", "can't reach port 80 of a.example.org", "http listener"}},
		{name: "port 443 is closed", config: acmetest.Config{TLSPort: freePort(t)}, section: Section{Challenges: []string{TLSALPN01}},
			want: []string{"tls-alpn-01: ", "port 443 of a.example.org", "mode sni"}},
		{name: "both are closed", config: acmetest.Config{HTTPPort: freePort(t), TLSPort: freePort(t)},
			want: []string{"http-01: connection", "tls-alpn-01: ", "port 443"}},
		{name: "another server answers", section: Section{Challenges: []string{HTTP01}},
			change: func(t *testing.T, a *authority, s *Section) {
				other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "welcome") }))
				t.Cleanup(other.Close)
				fmt.Sscanf(other.URL, "http://127.0.0.1:%d", &a.HTTPPort)
				if _, _, err := a.Write(a.dir); err != nil {
					t.Fatal(err)
				}
				a.stop()
				a.start()
			}, want: []string{"http-01: unauthorized", "something else answers for a.example.org"}},
		{name: "unknown root", change: func(_ *testing.T, _ *authority, s *Section) { s.CAs[0].RootFile = "" },
			want: []string{"unknown authority", "set acme.ca"}},
		{name: "no such host", change: func(_ *testing.T, _ *authority, s *Section) { s.CAs[0].Directory = "https://acme.invalid/dir" },
			want: []string{"acme.invalid", "can't look up its directory's name"}},
		{name: "the hook fails", section: Section{DNS: &Hook{Exec: []string{"/bin/sh", "-c", "echo the token is wrong; exit 3"}}},
			want: []string{"dns hook `/bin/sh -c", "present _acme-challenge.a.example.org. ", "exit status 3", "the token is wrong"}},
		{name: "the hook sets nothing", section: Section{DNS: &Hook{Exec: []string{"/bin/true"}}},
			want: []string{"dns-01", "_acme-challenge.a.example.org", "hook"}},
		{name: "storage is a file", change: func(t *testing.T, _ *authority, s *Section) {
			if err := os.MkdirAll(filepath.Dir(s.Storage), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(s.Storage, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"acme.storage must be a folder"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			a := newAuthority(t, h, c.config)
			s := c.section
			s.Names, s.CAs, s.Storage = []string{"a.example.org"}, []CA{a.ca()}, storageDir(t)
			if c.change != nil {
				c.change(t, a, &s)
			}
			h.apply(s)
			var st Status
			eventually(t, "the problem", func() error {
				if st = h.status("a.example.org"); st.Problem == "" {
					return errors.New("none")
				}
				return nil
			})
			if err := contains(st.Problem, c.want...); err != nil {
				t.Error(err)
			}
			if st.State != StateFailing || st.Attempts != 1 || time.Until(st.NextTry) <= 0 {
				t.Errorf("%+v", st)
			}
			_, err := h.get("a.example.org", nil)
			if err == nil {
				t.Error("a handshake without a certificate works")
			}
			t.Log(st.Problem)
		})
	}
}

// TestOnDemand: allowed names get a certificate by the first handshake, all
// who ask meanwhile get the same, and other names get nothing.
func TestOnDemand(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{})
	s := Section{OnDemand: []string{"exact.example.org", "*.apps.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	roots := a.pool()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, err := h.get("one.apps.example.org", roots); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := a.issued(); n != 1 {
		t.Errorf("%d certificates were issued for one name: want 1", n)
	}
	for _, name := range []string{"exact.example.org", "two.deep.apps.example.org"} {
		if _, err := h.get(name, roots); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	issued := a.issued()
	for _, name := range []string{"apps.example.org", "other.example.org", "exact.example.org.evil.net", "under_score.apps.example.org", "-x.apps.example.org", strings.Repeat("a", 64) + ".apps.example.org"} {
		if _, err := h.get(name, nil); err == nil {
			t.Errorf("%s was served", name)
		}
	}
	if n := a.issued(); n != issued {
		t.Errorf("%d certificates more were issued for names that are not allowed", n-issued)
	}
	if st := h.status("one.apps.example.org"); !st.OnDemand || st.State != StateValid {
		t.Errorf("%+v", st)
	}
	// The next daemon has them without the authority.
	a.stop()
	next := newHost(t)
	next.apply(s)
	if _, err := next.get("one.apps.example.org", roots); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// TestOnDemandFlood: a stranger who asks for ever new names is stopped.
func TestOnDemandFlood(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.apply(Section{OnDemand: []string{"*.example.org"}, CAs: []CA{{Directory: fmt.Sprintf("https://127.0.0.1:%d/dir", freePort(t))}}, Storage: storageDir(t)})
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() { h.get(fmt.Sprintf("n%d.example.org", i), nil) })
	}
	all.Wait()
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if n := len(h.m.dynamic); n != demandBurst {
		t.Errorf("%d names are ordered: want %d", n, demandBurst)
	}
}

// TestOnDemandRetries: an attempt that is made again costs a token as the first one does.
func TestOnDemandRetries(t *testing.T) {
	t.Parallel()
	began := time.Now()
	h := newHost(t)
	h.m.demandSlots = make(chan struct{}, demandBurst) // so that it does not take so long
	s := Section{OnDemand: []string{"*.example.org"}, CAs: []CA{{Directory: fmt.Sprintf("https://127.0.0.1:%d/dir", freePort(t))}}, Storage: storageDir(t)}
	h.apply(s)
	var all sync.WaitGroup
	for i := range demandBurst {
		all.Go(func() { h.get(fmt.Sprintf("n%d.example.org", i), nil) })
	}
	all.Wait()
	settled := func() error {
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		for _, s := range h.m.dynamic {
			s.mu.Lock()
			waits := !s.trying && len(s.kick) == 0 && time.Now().Before(s.nextTry)
			s.mu.Unlock()
			if !waits {
				return fmt.Errorf("%s: an attempt is due", s.name)
			}
		}
		return nil
	}
	for i := range 3 { // somebody changes the settings: all are tried anew
		eventually(t, "all attempts have ended", settled)
		s.Email = fmt.Sprintf("me%d@example.org", i)
		h.apply(s)
	}
	eventually(t, "all attempts have ended", settled)
	if n, most := strings.Count(h.log.String(), "ordering a certificate"), demandBurst+int(time.Since(began)/demandInterval); n > most {
		t.Errorf("%d attempts: want %d at most", n, most)
	}
}

// TestOnDemandSlots: a configured name does not wait for on-demand names, and the other way round.
func TestOnDemandSlots(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{})
	for range cap(h.m.demandSlots) { // those are all busy, for ever
		h.m.demandSlots <- struct{}{}
	}
	h.apply(Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)})
	h.wait("a.example.org", a.pool())
}

// TestOnDemandNames: of more names than are looked after, the one goes that nobody has asked for longest.
func TestOnDemandNames(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.m.demandNames = 3
	h.apply(Section{OnDemand: []string{"*.example.org"}, CAs: []CA{{Directory: fmt.Sprintf("https://127.0.0.1:%d/dir", freePort(t))}}, Storage: storageDir(t)})
	for i := range 6 {
		h.get(fmt.Sprintf("n%d.example.org", i), nil)
		h.m.mu.Lock()
		h.m.dynamic[fmt.Sprintf("n%d.example.org", i)].asked.Store(int64(i))
		h.m.mu.Unlock()
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if got := slices.Sorted(maps.Keys(h.m.dynamic)); !slices.Equal(got, []string{"n3.example.org", "n4.example.org", "n5.example.org"}) {
		t.Errorf("looked after: %v", got)
	}
}

// TestOnDemandExpired: a name whose certificate in storage has expired costs a token, and its handshake waits for the new
// one.
//
// +checklocksignore
func TestOnDemandExpired(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	const validity = 8 * time.Second
	a := newAuthority(t, h, acmetest.Config{Validity: validity})
	s := Section{OnDemand: []string{"*.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	eventually(t, "a certificate", func() error {
		_, err := h.get("a.example.org", nil)
		return err
	})
	h.m.Close() // it renews no more
	time.Sleep(time.Until(h.m.dynamic["a.example.org"].cert.Load().Leaf.NotAfter) + time.Second)

	poor := newHost(t)
	poor.m.budget.take(time.Now())
	poor.m.budget.tokens = 0
	poor.apply(s)
	if c, err := poor.get("a.example.org", nil); err == nil {
		t.Errorf("without a token: served a certificate until %v", c.NotAfter)
	}
	poor.m.Close()

	h.restart()
	h.apply(s)
	began := time.Now()
	c, err := h.get("a.example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	if !c.NotAfter.After(began) && time.Since(began) < demandWait {
		t.Errorf("at %v served a certificate until %v", began, c.NotAfter)
	}
	if left := h.m.budget.tokens; left > demandBurst-1 {
		t.Errorf("%v tokens are left: want one less than %d", left, demandBurst)
	}
}

func TestBudget(t *testing.T) {
	b := newBudget()
	now := time.Now()
	took := 0
	for range 100 {
		if b.take(now) {
			took++
		}
	}
	if took != demandBurst {
		t.Errorf("%d at once: want %d", took, demandBurst)
	}
	if now = now.Add(demandInterval); !b.take(now) || b.take(now) {
		t.Error("want one more after an interval")
	}
}

// TestPrepare: mistakes in sections change nothing.
func TestPrepare(t *testing.T) {
	ca := []CA{{Directory: "https://acme.invalid/dir"}}
	for _, c := range []struct {
		sections []Section
		want     string
	}{
		{[]Section{{Names: []string{"*.a.org"}, CAs: ca}}, "a wildcard is only given for challenge dns-01"},
		{[]Section{{Names: []string{"a.org"}, CAs: ca, Challenges: []string{DNS01}}}, "needs dns"},
		{[]Section{{Names: []string{"a.org"}, CAs: ca}, {Names: []string{"a.org"}, CAs: ca, Email: "x@a.org"}}, "a.org is in two sections with different settings"},
		{[]Section{{OnDemand: []string{"*.a.org"}, CAs: ca}, {OnDemand: []string{"*.a.org"}, CAs: ca, Email: "x@a.org"}}, "on demand in two sections"},
		{[]Section{{Names: []string{"a.org"}}}, "no authority"},
		{[]Section{{Names: []string{"a.org"}, CAs: []CA{{Directory: "https://acme.invalid/dir", RootFile: "/nowhere.pem"}}}}, "/nowhere.pem"},
		{[]Section{{Names: []string{"a.org"}, CAs: []CA{{Directory: "https://acme.invalid/dir", RootFile: os.Args[0]}}}}, "has no PEM certificate"},
	} {
		h := newHost(t)
		for i := range c.sections {
			c.sections[i].Storage = storageDir(t)
			c.sections[i].Storage = filepath.Dir(filepath.Dir(c.sections[i].Storage)) + "/same"
		}
		if _, err := h.m.Prepare(c.sections); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: want %q", err, c.want)
		}
	}
}

// TestServeChallenge: only the token of an open challenge, for its own name.
func TestServeChallenge(t *testing.T) {
	h := newHost(t)
	ch := acme.Challenge{Type: HTTP01, Token: "tok", KeyAuthorization: "tok.print", Identifier: acme.Identifier{Type: "dns", Value: "a.example.org"}}
	s := httpSolver{&h.m.challenges}
	ask := func(method, host, path string) (int, string) {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(method, "http://"+host+path, nil)
		if !h.m.ServeChallenge(w, r) {
			return 0, ""
		}
		return w.Code, w.Body.String()
	}
	if code, _ := ask("GET", "a.example.org", ChallengePath+"tok"); code != 0 {
		t.Error("answered before it was open")
	}
	s.Present(t.Context(), ch)
	for _, c := range []struct {
		method, host, path string
		ok                 bool
	}{
		{"GET", "a.example.org", ChallengePath + "tok", true},
		{"GET", "A.Example.org:80", ChallengePath + "tok", true},
		{"GET", "b.example.org", ChallengePath + "tok", false},
		{"GET", "a.example.org", ChallengePath + "other", false},
		{"GET", "a.example.org", ChallengePath, false},
		{"GET", "a.example.org", "/tok", false},
		{"POST", "a.example.org", ChallengePath + "tok", false},
	} {
		code, body := ask(c.method, c.host, c.path)
		if ok := code == 200 && body == "tok.print"; ok != c.ok {
			t.Errorf("%s %s%s: %d %q: want answered = %v", c.method, c.host, c.path, code, body, c.ok)
		}
	}
	s.CleanUp(t.Context(), ch)
	if code, _ := ask("GET", "a.example.org", ChallengePath+"tok"); code != 0 {
		t.Error("answered after it was over")
	}
}

// TestBackoff: an authority's time is spared, our own disk's is not.
func TestBackoff(t *testing.T) {
	rejected := failure{problems: []acme.Problem{{Type: acme.ProblemTypeConnection}}, err: acme.Problem{Type: acme.ProblemTypeConnection}}
	at := time.Now().Add(90 * time.Minute).UTC()
	limited := failure{err: fmt.Errorf("order: %w", acme.Problem{Type: acme.ProblemTypeRateLimited, Detail: "too many certificates: retry after " + at.Format(time.DateTime) + " UTC: see https://letsencrypt.org"})}
	for _, c := range []struct {
		name     string
		a        attempt
		failures int
		least    time.Duration
		most     time.Duration
	}{
		{"disk", attempt{storage: &StorageError{}}, 0, time.Second, 10 * time.Second},
		{"rejected", attempt{failed: []failure{rejected}}, 0, 2 * time.Minute, 2 * time.Minute},
		{"rejected often", attempt{failed: []failure{rejected}}, 99, 6 * time.Hour, 6 * time.Hour},
		{"limited", attempt{failed: []failure{limited}}, 0, 89 * time.Minute, 91 * time.Minute},
		{"limited and another", attempt{failed: []failure{limited, rejected}}, 0, 2 * time.Minute, 2 * time.Minute},
	} {
		e := &attemptError{attempt: &c.a, settings: &Section{}, name: "a.org", err: errors.New("x")}
		if got := max(e.backoff(c.failures), e.retryAfter()); got < c.least || got > c.most {
			t.Errorf("%s: %v: want %v to %v", c.name, got, c.least, c.most)
		}
	}
}

// TestCovers: one label under names, any number under on_demand.
func TestCovers(t *testing.T) {
	h := newHost(t)
	s := h.m.Source(Section{Names: []string{"a.org", "*.b.org"}, OnDemand: []string{"*.c.org", "d.org"}})
	for name, want := range map[string]bool{"a.org": true, "x.a.org": false, "x.b.org": true, "b.org": false, "y.x.b.org": false,
		"x.c.org": true, "y.x.c.org": true, "c.org": false, "d.org": true, "org": false, "": false} {
		if got := s.Covers(name); got != want {
			t.Errorf("Covers(%q) = %v", name, got)
		}
	}
}

// TestRenewalInfo: an authority that wants a certificate renewed early (it may
// have to revoke many) gets it renewed, at the next question.
func TestRenewalInfo(t *testing.T) {
	h := newHost(t)
	a := newAuthority(t, h, acmetest.Config{Validity: 30 * 24 * time.Hour})
	s := Section{Names: []string{"a.example.org"}, CAs: []CA{a.ca()}, Storage: storageDir(t)}
	h.apply(s)
	roots := a.pool()
	first := h.wait("a.example.org", roots)
	if left := time.Until(h.status("a.example.org").RenewAt); left < 24*time.Hour {
		t.Errorf("it is renewed in %v already", left)
	}
	window, err := json.Marshal(map[string]any{"suggestedWindow": map[string]any{"start": time.Now().Add(-2 * time.Hour), "end": time.Now().Add(-time.Hour)}})
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: first.Raw})), "ariResponse": string(window)})
	if err != nil {
		t.Fatal(err)
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	res, err := c.Post(strings.Replace(a.Roots(), "/roots/0", "/set-renewal-info/", 1), "application/json", bytes.NewReader(body))
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	h.restart() // it asks when it begins
	h.apply(s)
	eventually(t, "the renewal", func() error {
		cert, err := h.get("a.example.org", roots)
		if err == nil && cert.Equal(first) {
			err = errors.New("still the first")
		}
		return err
	})
	if n := a.issued(); n != 2 {
		t.Errorf("%d certificates were issued: want 2", n)
	}
}
