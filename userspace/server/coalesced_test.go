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
)

// TestCoalesced sends requests for several names on one connection, as browsers
// do whose certificate and address are the same. Edges route by the hello's name:
// a connection for the other name may have gone elsewhere, so only a route for
// the very name takes them.
func TestCoalesced(t *testing.T) {
	cert, pool := certificate(t, "*.a.test")
	certFile, keyFile := writePair(t, cert)
	up := func(name string) string {
		return httpBackend(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, name) })
	}
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - listen: [%q]
    mode: https
    certificates: [ { files: { cert: %q, key: %q } } ]
    routes:
      - { host: [one.a.test, two.a.test], path: /x, forward: %q }
      - { host: ["*.a.test"], path: /wild, forward: %q }
    default: { forward: %q }
`, addr, certFile, keyFile, up("exact"), up("wildcard"), up("default")))
	for _, c := range []struct {
		name, host, path string
		h1               bool
		status           int
		want             string
	}{
		{"one.a.test", "one.a.test", "/x", false, 200, "exact"},
		{"one.a.test", "two.a.test", "/x", false, 200, "exact"},
		{"one.a.test", "two.a.test", "/y", false, 200, "default"}, // the name is served here, whatever the path
		{"one.a.test", "three.a.test", "/x", false, 421, "made for another name"},
		{"one.a.test", "three.a.test", "/wild", false, 421, ""},
		{"three.a.test", "three.a.test", "/wild", false, 200, "wildcard"},
		{"three.a.test", "THREE.a.test:443", "/x", false, 200, "default"},
		{"one.a.test", "three.a.test", "/x", true, 200, "default"}, // which browsers don't do by HTTP/1.1
		{"one.a.test", "b.test", "/x", false, 200, "default"},      // nor where the certificate is not good for it: a hop that speaks https
	} {
		tr := &http.Transport{ForceAttemptHTTP2: !c.h1, TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: c.name}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}}
		req, _ := http.NewRequest("GET", "https://"+c.name+c.path, nil)
		req.Host = c.host
		res, err := (&http.Client{Transport: tr, Timeout: patience}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		tr.CloseIdleConnections()
		if res.StatusCode != c.status || !strings.Contains(string(body), c.want) || res.ProtoMajor == 1 != c.h1 {
			t.Errorf("%+v: %s %d %q", c, res.Proto, res.StatusCode, body)
		}
	}
}
