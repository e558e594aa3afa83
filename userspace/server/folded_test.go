package server

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http/httpguts"
)

// TestFoldedNames sends headers and trailers whose names become one variable with those that a hop writes or
// takes away, in CGI, WSGI and what is like them. None may reach a target or the auth server, from a
// stranger nor from a hop that is believed.
func TestFoldedNames(t *testing.T) {
	target := witness(t)
	var mu sync.Mutex
	told := http.Header{}
	auth := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		told = r.Header
	})
	var forged, allowed [][2]string
	for _, name := range []string{"Tailscale-User-Login", "Tailscale-User-Name", "X-Forwarded-For", "X-Forwarded-User", "X-Forwarded-Uri", "X-Forwarded-Prefix", "X-Forwarded-Proto", "X-Real-Ip", "Client-Cert",
		"Client-Cert-Chain", "X-Original-Url", "X-Tailsplice-Id", "X-Tailsplice-Path", "X-Request-Id", "Remote-User", "X-Set", "X-Gone", "Front-End-Https", "Cf-Connecting-Ip"} {
		for _, other := range "!#$%&'*+.^_`|~" {
			forged = append(forged, [2]string{strings.ReplaceAll(name, "-", string(other)), "forged"})
		}
		forged = append(forged, [2]string{strings.Replace(name, "-", ".", 1), "forged"})
	}
	for _, name := range []string{"Tailscale-User-Login", "Remote-User", "X-Set", "X-Gone"} {
		forged = append(forged, [2]string{name, "forged"})
	}
	trailers := [][2]string{{"X-Checksum", "kept"}, {"Content-Digest", "kept"}}
	for _, name := range []string{"Host", "Authorization", "Cookie", "Proxy-Authorization", "Connection", "Keep-Alive", "Te", "Upgrade", "Expect", "Range", "If-None-Match", "Content-Type", "Content-Encoding",
		"Cache-Control", "Max-Forwards", "X-Forwarded-For", "Forwarded", "X-Request-Id", "Content.Type", "If_Match"} {
		trailers = append(trailers, [2]string{name, "forged"})
	}
	allowed = append(allowed, [2]string{"X.Own", "kept"}, [2]string{"Remote-Users", "kept"}, [2]string{"Xforwarded.For", "kept"})
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			listen := []string{freeAddr(t), freeAddrAt(t, "::1")}
			guard := fmt.Sprintf(`forward_auth: { address: "http://%s/", copy_headers: [Remote-User] }, request_headers: { set: { X-Set: "ours" }, remove: [X-Gone] }`, auth)
			config := readingConfig(t, guard, w, listen, target)
			config = strings.Replace(config, "    routes:\n", "    routes:\n      - { host: app.test, headers: { X-Admin: \"1\" }, reject: true }\n", 1)
			for _, from := range []string{"", "    accept_proxy: { from: [127.0.0.1, \"::1\"] }\n"} {
				d := start(t, strings.Replace(config, "    routes:\n", from+"    routes:\n", 1))
				for _, addr := range listen {
					// A few at once: a header has a bound.
					for some := range slices.Chunk(forged, 40) {
						mu.Lock()
						told = http.Header{}
						mu.Unlock()
						m := message{method: "POST", target: "/admin", host: "app.test", header: append(slices.Clip(some), allowed...), trailer: trailers[:2]}
						status, body := w.send(t, addr, m)
						if status != "200" || strings.Contains(body, "forged") || strings.Count(body, "kept") != 5 || !strings.Contains(body, "\r\nX-Set: ours\r\n") {
							t.Errorf("%s: the target got %s", status, body)
						}
						mu.Lock()
						if len(told) == 0 {
							t.Error("the auth server was not asked")
						}
						for name, values := range told {
							ours := regexp.MustCompile(`(?i)^X.(Set|Gone)$`).MatchString(name) // request_headers is for the target
							if slices.Contains(values, "forged") && !ours {
								t.Errorf("the auth server got %s", name)
							}
						}
						mu.Unlock()
						m.header, m.trailer = nil, some
						if status, body := w.send(t, addr, m); status != "200" || strings.Contains(body, "forged") {
							t.Errorf("trailers, %s: the target got %s", status, body)
						}
					}
					m := message{method: "POST", target: "/admin", host: "app.test"}
					for _, kv := range trailers {
						if !w.h2 || httpguts.ValidTrailerHeader(kv[0]) && kv[0] != "Upgrade" { // net/http resets the stream for others
							m.trailer = append(m.trailer, kv)
						}
					}
					if status, body := w.send(t, addr, m); status != "200" || strings.Contains(body, "forged") || strings.Count(body, "kept") != 2 {
						t.Errorf("trailers, %s: the target got %s", status, body)
					}
					for _, name := range []string{"X-Admin", "X.Admin", "X_Admin"} {
						if status, body := w.send(t, addr, message{target: "/open", host: "app.test", header: [][2]string{{name, "1"}}}); status != "403" {
							t.Errorf("%s: leads around the route for X-Admin: %s %s", name, status, body)
						}
					}
				}
				d.Close()
			}
		})
	}
}
