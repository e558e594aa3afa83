package server

import (
	"fmt"
	"net"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/plan"
)

// TestTrace: a trace says of each listener what it would do, the same of a
// configuration in force and of one that is not.
func TestTrace(t *testing.T) {
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	alive, dead := up.Addr().String(), freeAddr(t)
	yaml := func() string {
		return fmt.Sprintf(`
node: laptop
listeners:
  - { name: pass, listen: [%q], mode: tcp, default: { forward: %q } }
  - name: edge
    listen: [%q]
    mode: sni
    allow: [127.0.0.0/8]
    routes:
      - { sni: [a.test], alpn: [acme-tls/1], forward: %q }
      - { sni: ["*.a.test", a.test], forward: "tailnet://home:443", send_proxy: v2 }
      - { sni: [no.test], reject: true }
  - name: web
    listen: [%q]
    mode: http
    routes:
      - { host: [a.test], path: /api/, strip_prefix: true, add_prefix: /v2, request_headers: { set: { Host: b.test } }, forward: [%q, { to: %q, weight: 0 }], basic_auth: { users: { me: "$2y$04$abcdefghijklmnopqrstuuO2lQ3cEJ2m1qC5sC8G3J1Cq0yqQX1bK" } } }
      - { host: [a.test], path: /post, methods: [POST], forward: %q }
      - { host: [a.test], headers: { X-Api: "2" }, forward: %q }
      - { host: [old.test], redirect: https }
`, freeAddr(t), dead, freeAddr(t), alive, freeAddr(t), alive, dead, dead, alive)
	}
	type target struct {
		name, kind  string
		alive, none bool // none: not tried
		next        string
	}
	for _, c := range []struct {
		name, listener   string
		q                plan.Question
		outcome, route   string
		reason, redirect string
		asks             string
		targets          []target
		ok               bool
	}{
		{"tcp takes all", "pass", plan.Question{Host: "whatever.test", Dial: true}, plan.TraceForward, "default", "", "", "", []target{{dead, "local", false, false, "whatever.test/"}}, false},
		{"and is not tried", "pass", plan.Question{Host: "whatever.test"}, plan.TraceForward, "default", "", "", "", []target{{dead, "local", false, true, "whatever.test/"}}, true},
		{"alpn", "edge", plan.Question{Host: "a.test", ALPN: []string{"acme-tls/1"}, Dial: true}, plan.TraceForward, "a.test", "", "", "allow 127.0.0.0/8", []target{{alive, "local", true, false, "a.test/"}}, true},
		{"a node without tailscaled", "edge", plan.Question{Host: "x.a.test", ALPN: []string{"h2"}, Dial: true}, plan.TraceForward, "*.a.test,a.test", "", "", "allow 127.0.0.0/8", []target{{"tailnet://home:443", "node", false, false, "x.a.test/"}}, false},
		{"rejected", "edge", plan.Question{Host: "no.test"}, plan.TraceReject, "no.test", "", "", "", nil, false},
		{"nobody's", "edge", plan.Question{Host: "b.test"}, plan.TraceNone, "", "unrecognized_name", "", "", nil, false},
		{"a path", "web", plan.Question{Host: "a.test", Path: "/x/../api//y", Dial: true}, plan.TraceForward, "a.test/api/", "", "", "basic_auth", []target{{alive, "local", true, false, "b.test/v2/y"}, {dead, "local", false, false, "b.test/v2/y"}}, true},
		{"another method", "web", plan.Question{Host: "a.test", Path: "/post"}, plan.TraceNone, "", "405", "", "", nil, false},
		{"the method", "web", plan.Question{Host: "a.test", Path: "/post", Method: "POST", Dial: true}, plan.TraceForward, "a.test/post", "", "", "", []target{{dead, "local", false, false, "a.test/post"}}, false},
		{"no header", "web", plan.Question{Host: "a.test", Path: "/"}, plan.TraceNone, "", "404", "", "", nil, false},
		{"the header", "web", plan.Question{Host: "a.test", Path: "/", Header: http.Header{"X-Api": {"2"}}, Dial: true}, plan.TraceForward, "a.test", "", "", "", []target{{alive, "local", true, false, "a.test/"}}, true},
		{"redirect", "web", plan.Question{Host: "old.test"}, plan.TraceRedirect, "old.test", "", "https", "", nil, true},
		{"no host", "web", plan.Question{Host: "c.test"}, plan.TraceNone, "", "404", "", "", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.q.Listener = c.listener
			q, err := plan.ParseQuestion(c.q.Values())
			if err != nil || q.Host != c.q.Host || q.Path != c.q.Path || len(q.Header) != len(c.q.Header) || q.Dial != c.q.Dial {
				t.Fatalf("the question %+v becomes %+v, %v", c.q, q, err)
			}
			d := start(t, yaml())
			inForce, err := d.Trace(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			config, err := plan.TraceConfig(t.Context(), parse(t, yaml()), q)
			if err != nil {
				t.Fatal(err)
			}
			for name, got := range map[string]plan.Trace{"in force": inForce, "a configuration": config} {
				if len(got.Listeners) != 1 || got.Node != "laptop" || got.OK() != c.ok {
					t.Fatalf("%s: %+v, ok %v", name, got, got.OK())
				}
				l := got.Listeners[0]
				if l.Outcome != c.outcome || l.Route != c.route || !strings.Contains(l.Reason, c.reason) || l.Redirect != c.redirect || strings.Join(l.Asks, "; ") != c.asks {
					t.Errorf("%s: %+v", name, l)
				}
				var targets []target
				for _, to := range l.Targets {
					targets = append(targets, target{to.Target, to.Kind, to.Tried && to.Error == "", !to.Tried, to.NextHost + to.NextPath})
				}
				if !reflect.DeepEqual(targets, c.targets) {
					t.Errorf("%s: targets %+v, want %+v", name, targets, c.targets)
				}
			}
		})
	}
	if _, err := plan.TraceConfig(t.Context(), parse(t, yaml()), plan.Question{Host: "a.test", Listener: "wbe"}); err == nil || !strings.Contains(err.Error(), `no listener "wbe"`) {
		t.Errorf("a listener that is not there: %v", err)
	}
}
