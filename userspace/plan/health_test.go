package plan

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/health"
)

// TestSpecs: what is checked, by mode and route; and routes that want the same share a check.
func TestSpecs(t *testing.T) {
	p, err := Compile(parse(t, `listeners:
  - listen: [":443"]
    mode: sni
    routes:
      - { sni: ["*.a.test", b.a.test], forward: ["a:1", "b:1"], health: { check: http, path: /x, expect: [204, 3xx] }, send_proxy: v2 }
      - { sni: a.test, forward: "a:1", health: connect }
      - { sni: b.test, forward: ["c:1", "a:1"], health: { check: connect, slow_start: 30s } }
      - { sni: c.test, forward: "a:1", health: { check: tls, verify: true } }
      - { sni: e.test, forward: "a:1", health: { check: connect, fall: 4 } }
      - { sni: f.test, forward: "a:1" }
    default: { forward: "a:1", health: tls }
  - { listen: [":81"], mode: tcp, default: { forward: "[::1]:1", health: http } }
  - listen: [":80"]
    mode: http
    routes:
      - { host: a.test, forward: "a:1", health: http }
      - { host: b.test, forward: "a:1", health: http, upstream: { protocol: h2c }, request_headers: { set: { Host: inner.test } } }
      - { host: c.test, forward: "a:1", health: http, upstream: { protocol: https, insecure: true } }
      - { host: d.test, forward: "a:1", health: tls, upstream: { protocol: https, server_name: inner.test } }
    default: { forward: "unix:///run/x", health: http }
`), NewDeps(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	const local = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00" // PROXY v2, LOCAL, no addresses
	base := health.Spec{Target: "a:1", Every: 5 * time.Second, Timeout: 2 * time.Second, Rise: 2, Fall: 3, SlowStart: 30 * time.Second}
	spec := func(kind string, change func(*health.Spec)) health.Spec {
		s := base
		s.Kind = kind
		change(&s)
		return s
	}
	want := []health.Spec{
		spec("http", func(s *health.Spec) {
			s.TLS, s.ServerName, s.Host, s.Path, s.Expect, s.Preface = true, "b.a.test", "b.a.test", "/x", "204 3xx", local
		}),
		spec("http", func(s *health.Spec) {
			s.Target, s.TLS, s.ServerName, s.Host, s.Path, s.Expect, s.Preface = "b:1", true, "b.a.test", "b.a.test", "/x", "204 3xx", local
		}),
		spec("connect", func(*health.Spec) {}), // of two routes
		spec("connect", func(s *health.Spec) { s.Target = "c:1" }),
		spec("connect", func(s *health.Spec) { s.Fall = 4 }),
		spec("tls", func(s *health.Spec) { s.TLS, s.ServerName, s.Verify = true, "c.test", true }),
		spec("tls", func(s *health.Spec) { s.TLS = true }),
		spec("http", func(s *health.Spec) { s.Target, s.Host, s.Path, s.Expect = "[::1]:1", "[::1]", "/", "2xx 3xx" }),
		spec("http", func(s *health.Spec) { s.Host, s.Path, s.Expect = "a.test", "/", "2xx 3xx" }),
		spec("http", func(s *health.Spec) { s.H2C, s.Host, s.Path, s.Expect = true, "inner.test", "/", "2xx 3xx" }),
		spec("http", func(s *health.Spec) {
			s.TLS, s.ServerName, s.Host, s.Path, s.Expect = true, "a", "c.test", "/", "2xx 3xx"
		}),
		spec("tls", func(s *health.Spec) { s.TLS, s.ServerName, s.Verify = true, "inner.test", true }),
		spec("http", func(s *health.Spec) {
			s.Target, s.Host, s.Path, s.Expect = "unix:///run/x", "localhost", "/", "2xx 3xx"
		}),
	}
	for _, s := range want {
		if p.checks[s] == nil {
			t.Errorf("there is no check %+v", s)
		}
	}
	for name, s := range p.Services {
		for _, r := range s.Rules {
			for _, one := range append([]*Rule{r}, r.Several...) {
				if one.Check != nil && one.Check != p.checks[one.Check.Spec] {
					t.Errorf("%s: route %s has a check of its own of %s, which does not run", name, r.Name, one.Check.Target)
				}
			}
		}
	}
	if len(p.Checks()) != len(want) {
		t.Errorf("there are %d checks, want %d", len(p.Checks()), len(want))
		for s := range p.checks {
			t.Logf("%+v", s)
		}
	}
}

// node is a machine of the tailnet.
type node struct{ online map[string]bool }

func (n node) Resolve(context.Context, string) ([]netip.Addr, error) { return nil, nil }

func (n node) Presence(name string) (online bool, seen time.Time, ok bool) {
	online, ok = n.online[name]
	return online, time.Unix(1, 0), ok
}

// TestOfflineIsLast: a node that the tailnet says is offline comes after those that it does not say that of,
// and is no less a choice; and its health checks know better.
func TestOfflineIsLast(t *testing.T) {
	for _, checks := range []string{"", ", health: connect"} {
		p, err := Compile(parse(t, `listeners: [ { name: a, listen: [":81"], mode: tcp, default: { forward: ["tailnet://away:1", "tailnet://new:1", { to: "tailnet://home:1", backup: true }]`+checks+` } } ]`),
			NewDeps(slog.New(slog.DiscardHandler)))
		if err != nil {
			t.Fatal(err)
		}
		r := p.Services["a"].Fallback
		r.Dialer.Tailnet = node{map[string]bool{"away": false, "home": true}}
		firsts := map[string]int{}
		for range 200 {
			var tried []*Rule
			for one := r.Pick(netip.Addr{}, tried); one != nil; one = r.Pick(netip.Addr{}, tried) {
				tried = append(tried, one)
			}
			if len(tried) != 3 {
				t.Fatalf("%d of 3 targets are tried", len(tried))
			}
			if checks == "" && tried[2].To.Host != "away" {
				t.Fatalf("the offline one is not the last: %s is", tried[2].To.Host)
			}
			firsts[tried[0].To.Host]++
		}
		if (firsts["away"] > 0) != (checks != "") || firsts["new"] == 0 {
			t.Errorf("with checks %q the first are %v", checks, firsts)
		}
	}
}
