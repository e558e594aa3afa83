package server

import (
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"testing"
)

func TestSNIRoutes(t *testing.T) {
	cert, pool := certificate(t, "a.test", "*.b.test", "x.c.test", "other.test")
	a, b, acme, rest := tlsBackend(t, "a", cert), tlsBackend(t, "b", cert), tlsBackend(t, "acme", cert), tlsBackend(t, "rest", cert)
	addr, strict := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: [%q]
    mode: sni
    routes:
      - { sni: ["*.b.test"], alpn: [acme-tls/1], forward: %q }
      - { sni: [a.test], forward: %q }
      - { sni: ["*.b.test"], forward: %q }
      - { sni: [x.c.test], reject: true }
    default: { forward: %q }
  - name: strict
    listen: [%q]
    mode: sni
    routes: [ { sni: [a.test], forward: %q } ]
`, addr, acme, a, b, rest, strict, a))
	for _, c := range []struct {
		name  string
		alpn  []string
		addr  string
		want  string
		alert string
	}{
		{name: "a.test", want: "a"},
		{name: "A.Test", want: "a"},
		{name: "x.b.test", want: "b"},
		{name: "x.b.test", alpn: []string{"acme-tls/1"}, want: "acme"},
		{name: "x.b.test", alpn: []string{"h2"}, want: "b"},
		{name: "other.test", want: "rest"},
		{name: "x.c.test", alert: "unrecognized name"},
		{name: "a.test", addr: strict, want: "a"},
		{name: "other.test", addr: strict, alert: "unrecognized name"},
	} {
		to := c.addr
		if to == "" {
			to = addr
		}
		got, err := dialTLS(to, &tls.Config{ServerName: c.name, RootCAs: pool, NextProtos: c.alpn})
		if strings.TrimSpace(got) != c.want || (c.alert == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.alert) {
			t.Errorf("%s %v: got %q, %v: want %q, alert %q", c.name, c.alpn, got, err, c.want, c.alert)
		}
	}
	if n := d.refused("unrecognized_name"); n != 2 {
		t.Errorf("%d refused as unrecognized_name: want 2", n)
	}
	if want := "the configuration rejects this name (route x.c.test)"; !strings.Contains(d.log.String(), want) {
		t.Errorf("the log does not say %q of the first", want)
	}
	eventually(t, "one log line a flow", func() bool {
		return strings.Count(d.log.String(), `msg="flow ended"`) == 7 && strings.Contains(d.log.String(), "name=x.b.test")
	})
}

// TestBadHellos: each is refused with what the protocol has for it, and counted.
func TestBadHellos(t *testing.T) {
	addrs, daemons := map[bool]string{}, map[bool]*daemon{} // by whether the timeout is what ends it
	for late, timeout := range map[bool]string{false: "1m", true: "200ms"} {
		addrs[late] = freeAddr(t)
		daemons[late] = start(t, fmt.Sprintf(`
listeners: [ { name: web, listen: [%q], mode: sni, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: %s, hello_bytes: 1024 }
`, addrs[late], timeout))
	}
	for _, c := range []struct {
		name, send, reason string
		half               bool
	}{
		{name: "http", send: "GET / HTTP/1.1\r\n\r\n", reason: "not_tls"},
		{name: "slow", send: "\x16\x03\x01\x02\x00\x01", reason: "hello_timeout"},
		{name: "endless", send: "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + strings.Repeat("\x03", 4096), reason: "hello_too_large"},
		{name: "cut", send: "\x16\x03\x01\x02\x00\x01", half: true, reason: "hello_incomplete"},
		{name: "silent", reason: "hello_timeout"},
	} {
		late := c.reason == "hello_timeout"
		d := daemons[late]
		before := d.refused(c.reason)
		conn := dialTCP(t, addrs[late])
		io.WriteString(conn, c.send)
		if c.half {
			conn.CloseWrite()
		}
		io.Copy(io.Discard, conn) // until the daemon closes
		eventually(t, c.name+" is counted as "+c.reason, func() bool { return d.refused(c.reason) == before+1 })
	}
	for _, d := range daemons {
		eventually(t, "nothing is left", func() bool { return d.flows.Len() == 0 && d.limiter.Total() == 0 })
	}
}
