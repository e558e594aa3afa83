package server

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// TestForwardAuthLoop: a forward_auth that leads back to its own listener is told from one that does not
// answer, after one question, and takes nobody's connections. A route for the auth server on the same
// listener works.
func TestForwardAuthLoop(t *testing.T) {
	target := witness(t)
	yes := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {})
	for _, host := range []string{"127.0.0.1", "::1"} {
		one, two, good := freeAddrAt(t, host), freeAddrAt(t, host), freeAddrAt(t, host)
		_, port, _ := strings.Cut(good[strings.LastIndex(good, ":")-1:], ":")
		d := start(t, fmt.Sprintf(`
limits: { connections_per_source: 16, connections: 64 }
listeners:
  - { name: one, listen: [%[1]q], mode: http, default: { forward: %[4]q, forward_auth: { address: "http://%[1]s/" } } }
  - { name: two, listen: [%[2]q], mode: http, routes: [
      { host: first.test, forward: %[4]q, forward_auth: { address: "http://%[2]s/?second" } } ],
      default: { forward: %[4]q, forward_auth: { address: "http://%[2]s/" } } }
  - { name: good, listen: [%[3]q], mode: http, routes: [{ host: auth.localhost, forward: %[5]q }],
      default: { forward: %[4]q, forward_auth: { address: "http://auth.localhost:%[6]s/" } } }
`, one, two, good, target, yes, port))
		for _, w := range wires[:2] {
			for range 3 {
				if status, body := w.send(t, one, message{target: "/x", host: "a.test"}); status != "508" {
					t.Errorf("%s: %s %s", w.name, status, body)
				}
				if status, body := w.send(t, two, message{target: "/x", host: "first.test"}); status != "508" {
					t.Errorf("%s, by two: %s %s", w.name, status, body)
				}
				if status, body := w.send(t, good, message{target: "/x", host: "a.test"}); status != "200" {
					t.Errorf("%s, an auth server with a route of its own: %s %s", w.name, status, body)
				}
			}
		}
		// One question for each request to one, and two for each to two.
		if n := d.refused("auth_loop"); n != 12 || d.log.Count("reason=auth_loop") == 0 || d.refused("over_limit") != 0 {
			t.Errorf("%d counted as auth_loop, over_limit %d", n, d.refused("over_limit"))
		}
		d.Close()
	}
}
