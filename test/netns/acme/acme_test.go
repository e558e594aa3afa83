package acme

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestNewName: a new name gets its certificate by either challenge through either edge, while both announce
// the address that the authority is led to. The edges have no configuration for it.
func TestNewName(t *testing.T) {
	s := world(t)
	eventually(t, "the first page",
		func() error { _, err := s.page(t.Context(), "first.vsq.cz", s.roots); return err })
	http, hello := []string{"http-01", "first.vsq.cz"}, []string{"tls-alpn-01"}
	for _, c := range []struct {
		edge      *lab.Daemon
		challenge string
		name      string
	}{
		{s.edgeA, "http-01", "http-a.vsq.cz"},
		{s.edgeA, "tls-alpn-01", "hello-a.vsq.cz"},
		{s.edgeB, "http-01", "http-b.vsq.cz"},
		{s.edgeB, "tls-alpn-01", "hello-b.vsq.cz"},
	} {
		t.Run(c.challenge+" "+c.edge.Host.Name, func(t *testing.T) {
			if err := s.Prefer(t.Context(), c.edge.Host); err != nil {
				t.Fatal(err)
			}
			if c.challenge == "http-01" {
				http = append(http, c.name)
			} else {
				hello = append(hello, c.name)
			}
			before := s.issued()
			// The reload does not wait for the authority, which hangs meanwhile.
			if err := s.pebble.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			if len(hello) > 1 {
				s.configure(t, certificates(http, hello))
			} else {
				s.configure(t, certificates(http))
			}
			took := time.Since(begin)
			if err := s.pebble.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if took > patience {
				t.Errorf("the reload took %v", took)
			}
			eventually(t, "the page",
				func() error { _, err := s.page(t.Context(), c.name, s.roots); return err })
			t.Logf("%s had its certificate after %v", c.name, time.Since(begin))
			if n := s.issued() - before; n != 1 {
				t.Errorf("%d certificates were issued for one new name", n)
			}
			// The authority came through this edge: it is the client of a flow there.
			listener := map[string]string{"http-01": "plain", "tls-alpn-01": "web"}[c.challenge]
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if _, err := c.edge.WaitLog(ctx, func(l lab.LogLine) bool {
				client := fmt.Sprint(l["client"])
				return l["msg"] == "flow ended" && l["listener"] == listener &&
					(strings.HasPrefix(client, authorityIP+":") ||
						strings.HasPrefix(client, "[2001:db8:cc::2]:")) &&
					(l["name"] == c.name || c.challenge == "http-01")
			}); err != nil {
				t.Error(err)
			}
		})
	}
	// The edges hold no key, and a restart of home orders nothing.
	before := s.issued()
	if err := s.home.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the page after a restart",
		func() error { _, err := s.page(t.Context(), "hello-b.vsq.cz", s.roots); return err })
	if n := s.issued() - before; n != 0 {
		t.Errorf("%d certificates were issued by a restart", n)
	}
	if err := s.Prefer(t.Context(), s.EdgeA); err != nil {
		t.Fatal(err)
	}
}

// TestTailscale: tailscale: true beside acme. A name that is not this node's fails its own handshakes only,
// with tailscaled's answer in the log, and neither the reload nor the other names.
func TestTailscale(t *testing.T) {
	s := world(t)
	s.configure(t, strings.Replace(certificates([]string{"http-01", "first.vsq.cz"}), "    certificates:\n",
		"    certificates:\n      - { tailscale: true }\n", 1))
	eventually(t, "the page by acme",
		func() error { _, err := s.page(t.Context(), "first.vsq.cz", s.roots); return err })
	const name = "home.tail1234.ts.net"
	// Such lines are rationed: an earlier one may have taken this one's place.
	eventually(t, "the reason in the log", func() error {
		if _, err := s.page(t.Context(), name, s.roots); err == nil ||
			!strings.Contains(err.Error(), "internal error") {
			return fmt.Errorf("%s: %v: want the alert internal_error", name, err)
		}
		for _, l := range s.home.LogLines() {
			said := "no certificate for " + name + ": tailscaled has them for"
			if l["reason"] == "tls_handshake" && strings.Contains(fmt.Sprint(l["err"]), said) {
				return nil
			}
		}
		return errors.New("no line")
	})
}

// TestRenewal: certificates of a short life are renewed while clients come without a break, and no handshake
// fails.
func TestRenewal(t *testing.T) {
	s := world(t)
	// A third of its life is left for each renewal.
	const name, life, clients = "renewed.vsq.cz", 30 * time.Second, 6
	s.restartAuthority(t, life)
	s.configure(t, certificates([]string{"tls-alpn-01", name}))
	roots := s.roots
	eventually(t, "the first certificate",
		func() error { _, err := s.page(t.Context(), name, roots); return err })
	var serials sync.Map
	var pages, failed atomic.Int64
	var all sync.WaitGroup
	seen := func() (n int) {
		serials.Range(func(any, any) bool { n++; return true })
		return n
	}
	end := time.Now().Add(2 * patience)
	enough := func() bool { return seen() >= 3 && pages.Load() >= 100 || time.Now().After(end) }
	for range clients {
		all.Go(func() {
			for !enough() {
				cert, err := s.page(t.Context(), name, roots)
				if err != nil {
					if failed.Add(1) < 5 {
						t.Errorf("page %d: %v", pages.Load(), err)
					}
					continue
				}
				pages.Add(1)
				serials.Store(cert.SerialNumber.String(), true)
			}
		})
	}
	// A reload in the middle must not disturb it.
	for seen() < 2 && !enough() {
		time.Sleep(100 * time.Millisecond)
	}
	s.configure(t, certificates([]string{"tls-alpn-01", name}))
	all.Wait()
	n := seen()
	t.Logf("%d pages on connections of their own, %d failed, %d certificates", pages.Load(), failed.Load(), n)
	if n < 3 || pages.Load() < 100 {
		t.Errorf("%d certificates were seen on %d pages: want 3 or more on 100 or more", n, pages.Load())
	}
}

// TestTrouble: the authority is down, the disk is full, the disk is read-only: the certificate that there is
// goes on being served, log and status say what to do, and when that is done the renewal follows.
func TestTrouble(t *testing.T) {
	s := world(t)
	const name, life = "trouble.vsq.cz", 30 * time.Second
	sh := func(script string) func(*testing.T) {
		return func(t *testing.T) {
			if _, err := s.Home.Sh(context.Background(), script); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name        string
		break_, fix func(*testing.T)
		want        []string
	}{
		{"disk full", sh("dd if=/dev/zero of=" + storage + "/filler bs=1k 2>/dev/null || true"),
			sh("rm " + storage + "/filler"),
			[]string{"no space left on device", "make room on it", "acme.storage"}},
		{"read-only", sh("mount -o remount,ro " + storage), sh("mount -o remount,rw " + storage),
			[]string{"read-only file system", "mount it writable", "StateDirectory="}},
		{"authority down", func(*testing.T) { s.pebble.Kill() }, func(t *testing.T) {
			if err := s.startAuthority(life); err != nil {
				t.Fatal(err)
			}
		}, []string{authorityIP, "can't reach the authority", "it refuses connections to "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.restartAuthority(t, life)
			own := strings.ReplaceAll(c.name, " ", "-") + "." + name
			s.configure(t, certificates([]string{"http-01", own}))
			roots := s.roots
			eventually(t, "the first certificate",
				func() error { _, err := s.page(t.Context(), own, roots); return err })
			first, err := s.page(t.Context(), own, roots)
			if err != nil {
				t.Fatal(err)
			}
			c.break_(t)
			fixed := false
			t.Cleanup(func() {
				if !fixed {
					c.fix(t)
				}
			})
			has := func(text string) error {
				for _, w := range c.want {
					if !strings.Contains(text, w) {
						return fmt.Errorf("%q is not in %q", w, text)
					}
				}
				return nil
			}
			eventually(t, "status says so", func() error {
				st := s.status(t, own)
				if st.State != "failing" {
					return fmt.Errorf("%+v", st)
				}
				return has(st.Problem)
			})
			cert, err := s.page(t.Context(), own, roots)
			if err != nil || !cert.Equal(first) {
				t.Errorf("the old certificate: %v", err)
			}
			found := errors.New("no line")
			for _, l := range s.home.LogLines() {
				if l["msg"] == "certificate can't be obtained" && l["name"] == own && l["level"] == "ERROR" {
					found = has(fmt.Sprint(l["err"]))
				}
			}
			if found != nil {
				t.Errorf("the log: %v", found)
			}
			c.fix(t)
			fixed = true
			eventually(t, "the renewal", func() error {
				cert, err := s.page(t.Context(), own, s.roots)
				if err == nil && cert.Equal(first) {
					err = errors.New("still the old one")
				}
				return err
			})
		})
	}
}
