package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

func TestHTTPS(t *testing.T) {
	cert, pool := certificate(t, "a.test", "*.b.test")
	certFile, keyFile := writePair(t, cert)
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "up %s for=%s proto=%s", r.URL.Path, r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Proto"))
	})
	api := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "api %s", r.URL.Path) })
	addr := freeAddr(t)
	yaml := func(routes string) string {
		return fmt.Sprintf(`
node: home
listeners:
  - name: web
    listen: [%q]
    mode: https
    certificates: [ { files: { cert: %q, key: %q } } ]
    routes: [ %s ]
`, addr, certFile, keyFile, routes)
	}
	d := start(t, yaml(fmt.Sprintf(`{ host: [a.test], forward: %q }, { host: [a.test], path: /api/, forward: %q }, { host: [dead.b.test], forward: "127.0.0.1:9" }`, up, api)))
	client := &http.Client{Timeout: patience, Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: pool},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}}}
	defer client.CloseIdleConnections()
	get := func(url string) (int, string) {
		req, _ := http.NewRequest("GET", url, nil)
		req.Header.Set("X-Forwarded-For", "203.0.113.66") // forged
		req.Header.Set("Accept", "text/plain")
		res, err := client.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	if code, body := get("https://a.test/x"); code != 200 || body != "up /x for=127.0.0.1 proto=https" {
		t.Errorf("%d %q", code, body)
	}
	if code, body := get("https://a.test/api/y"); code != 200 || body != "api /api/y" {
		t.Errorf("%d %q", code, body)
	}
	if code, _ := get("https://else.b.test/"); code != 421 {
		t.Errorf("a host without a route: %d, want 421", code)
	}
	if code, body := get("https://dead.b.test/"); code != 502 || !strings.Contains(body, "home") {
		t.Errorf("dead upstream: %d %q: want 502 and the name of the hop", code, body)
	}
	// The same connection goes on after a reload, with the new routes.
	if err := d.Reload(parse(t, yaml(fmt.Sprintf(`{ host: [a.test], forward: %q }`, api)))); err != nil {
		t.Fatal(err)
	}
	if code, body := get("https://a.test/x"); code != 200 || body != "api /x" {
		t.Errorf("after the reload: %d %q", code, body)
	}
	eventually(t, "each request has its line", func() bool {
		return strings.Contains(d.log.String(), "path=/api/y proto=HTTP/2.0 status=200") && strings.Contains(d.log.String(), "route=a.test/api/")
	})
}

// TestResetAtOnce: who begins HTTP/2 and resets the connection before it is looked at makes nothing panic.
func TestResetAtOnce(t *testing.T) {
	const clients = 200
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], name: web, mode: http, default: { forward: "127.0.0.1:9" } } ]`, addr))
	for range clients {
		c := dialTCP(t, addr)
		io.WriteString(c, http2.ClientPreface)
		c.SetLinger(0)
		c.Close()
	}
	eventually(t, "all have ended", func() bool { return d.Status().Accepted["web"] >= clients && d.limiter.Total() == 0 })
	if n := d.log.Count("panic"); n > 0 {
		t.Errorf("%d panics", n)
	}
}
