package server

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// TestHostBehindSNI sends requests for other hosts than the hello named, through an sni listener to the https
// listener of the same daemon: what the sni listener does not let everybody have is had by its own name only.
func TestHostBehindSNI(t *testing.T) {
	cert, _ := certificate(t, "open.test", "too.test", "only.test", "no.test", "rest.test", "private.test")
	c, k := writePair(t, cert)
	target := witness(t)
	for i, w := range []wire{wires[2], wires[3], wires[2], wires[3]} {
		for _, rest := range []string{"forward: HOME, allow: [192.0.2.1]", "reject: true", ""} {
			host := [...]string{"127.0.0.1", "::1"}[i/2]
			edge, home := freeAddrAt(t, host), freeAddrAt(t, host)
			if rest != "" {
				rest = "    default: { " + strings.Replace(rest, "HOME", fmt.Sprintf("%q", home), 1) + " }\n"
			}
			d := start(t, fmt.Sprintf(`
listeners:
  - name: edge
    listen: [%[1]q]
    mode: sni
    routes:
      - { sni: [open.test, too.test], forward: %[2]q }
      - { sni: only.test, alpn: [acme-tls/1], forward: %[2]q }
      - { sni: only.test, forward: %[2]q, allow: [192.0.2.1] }
      - { sni: no.test, reject: true }
%[3]s  - name: home
    listen: [%[2]q]
    mode: https
    certificates: [ { files: { cert: %[4]q, key: %[5]q } } ]
    routes:
      - { host: [open.test, too.test, only.test, no.test, rest.test], forward: %[6]q }
`, edge, home, rest, c, k, target))
			for _, c := range []struct{ addr, name, host, want string }{
				{edge, "open.test", "open.test", "200"},
				{edge, "open.test", "too.test", "200"}, // the same route
				{edge, "open.test", "only.test", "421"},
				{edge, "open.test", "ONLY.test.:443", "421"},
				{edge, "open.test", "no.test", "421"},
				{edge, "too.test", "rest.test", "421"},
				{edge, "only.test", "only.test", "refused"},
				{edge, "no.test", "no.test", "refused"},
				{edge, "rest.test", "rest.test", "refused"},
				// Whoever comes to the https listener itself has not passed the other.
				{home, "only.test", "only.test", "200"},
				{home, "rest.test", "rest.test", "200"},
				{home, "only.test", "open.test", "200"},
				{home, "no.test", "only.test", "200"},
			} {
				w.sni = c.name
				if got, body := w.send(t, c.addr, message{target: "/", host: c.host}); got != c.want {
					t.Errorf("%s at %s, %q: hello for %s, request for %s: %s, want %s; %q", w.name, c.addr, rest, c.name,
						c.host, got, c.want, body)
				}
			}
			if n := d.refused(misdirected); n != 4 || d.log.Count("reason="+misdirected) == 0 {
				t.Errorf("%d counted as %s", n, misdirected)
			}
			d.Close()
		}
	}
}

// TestNewEdge: while a reload adds an sni listener, requests go on.
func TestNewEdge(t *testing.T) {
	cert, _ := certificate(t, "open.test", "too.test")
	c, k := writePair(t, cert)
	certs, err := tlsterm.Load([]tlsterm.Spec{{Cert: c, Key: k}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := &service{edges: []*listener{{name: "edge", mode: "sni"}}}
	req := &http.Request{RemoteAddr: "127.0.0.1:9", TLS: &tls.ConnectionState{ServerName: "open.test"}}
	if by := s.passesBy(req, "too.test", certs); by != "" {
		t.Errorf("it goes round %q", by)
	}
}

// TestACMEProtocolAlone: a route for acme-tls/1 takes no hello that offers more, which would go round what
// guards the name for everything else.
func TestACMEProtocolAlone(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	for _, local := range []string{"127.0.0.1", "::1"} {
		addr := freeAddrAt(t, local)
		d := start(t, fmt.Sprintf(`
listeners:
  - name: edge
    listen: [%q]
    mode: sni
    routes:
      - { sni: a.test, alpn: [acme-tls/1], forward: %q }
      - { sni: a.test, alpn: [h2, acme-tls/1], forward: %q }
      - { sni: a.test, reject: true }
`, addr, tlsBackend(t, "acme", cert), tlsBackend(t, "h2", cert)))
		for _, c := range []struct {
			protocols []string
			want      string
		}{
			{[]string{"acme-tls/1"}, "acme\n"}, {[]string{"h2"}, "h2\n"}, {[]string{"h2", "acme-tls/1"}, "h2\n"},
			{[]string{"acme-tls/1", "http/1.1"}, ""}, {[]string{"acme-tls/1", "acme-tls/1"}, ""}, {nil, ""},
		} {
			got, err := dialTLS(addr, &tls.Config{ServerName: "a.test", InsecureSkipVerify: true, NextProtos: c.protocols})
			if got != c.want || (err == nil) != (c.want != "") {
				t.Errorf("%s, %q: %q, %v; want %q", addr, c.protocols, got, err, c.want)
			}
		}
		d.Close()
	}
}
