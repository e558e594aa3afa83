package front

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// lines collects what the daemon logs.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// daemon is a front under test.
type daemon struct {
	*Front
	t   *testing.T
	log *lines
}

func parse(t *testing.T, yaml string) *config.Config {
	t.Helper()
	cfg, err := config.Parse("test.yaml", []byte(yaml))
	if err != nil {
		t.Fatalf("config: %v", err)
	}
	return cfg
}

func start(t *testing.T, yaml string) *daemon {
	t.Helper()
	return startConfig(t, parse(t, yaml))
}

func startConfig(t *testing.T, cfg *config.Config) *daemon {
	t.Helper()
	d := &daemon{t: t, log: &lines{}}
	f, err := New(cfg, Options{Log: slog.New(slog.NewTextHandler(d.log, nil)), Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	d.Front = f
	t.Cleanup(func() {
		f.Close()
		if t.Failed() {
			t.Logf("log:\n%s", d.log)
		}
	})
	return d
}

// freeAddr is an address of 127.0.0.1 that nothing listens on. It is given once only.
func freeAddr(t *testing.T) string {
	t.Helper()
	for {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		if _, given := givenAddrs.LoadOrStore(ln.Addr().String(), true); !given {
			return ln.Addr().String()
		}
	}
}

var givenAddrs sync.Map

// certificate makes a self-signed certificate for names, and a pool that
// trusts it.
func certificate(t *testing.T, names ...string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}

// writePair writes a certificate as the config wants it.
func writePair(t *testing.T, c tls.Certificate) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: c.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// writeCA replaces a file of authorities.
func writeCA(t *testing.T, file string, certs ...tls.Certificate) {
	t.Helper()
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})...)
	}
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// backend accepts connections and hands each to serve.
func backend(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	return backendOn(t, "127.0.0.1", serve)
}

func backendOn(t *testing.T, host string, serve func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of files, by a test's doing
				time.Sleep(time.Millisecond)
				continue
			}
			go serve(c)
		}
	}()
	return ln.Addr().String()
}

// tlsBackend greets each client with its name.
func tlsBackend(t *testing.T, name string, cert tls.Certificate) string {
	return backend(t, func(c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"acme-tls/1", "h2"}})
		defer tc.Close()
		fmt.Fprintf(tc, "%s\n", name)
	})
}

// echo sends back what it gets.
func echo(c net.Conn) {
	defer c.Close()
	io.Copy(c, c)
}

func dialTLS(addr string, cfg *tls.Config) (string, error) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	c, err := tls.DialWithDialer(d, "tcp", addr, cfg)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	return bufio.NewReader(c).ReadString('\n')
}

// helloFor is the first record of a TLS client.
func helloFor(t *testing.T, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: name}).Handshake()
	buf := make([]byte, 16<<10)
	n, err := server.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

func (d *daemon) refused(reason string) int64 { return d.Status().Refused[reason] }

// eventually waits until ok. It is patient, for machines that do more than this.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	const patience = time.Minute
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within %v: %s", patience, what)
}

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
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { name: web, listen: [%q], mode: sni, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: 200ms, hello_bytes: 1024 }
`, addr))
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
		before := d.refused(c.reason)
		conn := dialTCP(t, addr)
		io.WriteString(conn, c.send)
		if c.half {
			conn.CloseWrite()
		}
		io.Copy(io.Discard, conn) // until the daemon closes
		eventually(t, c.name+" is counted as "+c.reason, func() bool { return d.refused(c.reason) == before+1 })
	}
	eventually(t, "nothing is left", func() bool { return d.flows.Len() == 0 && d.limiter.Total() == 0 })
}

// TestProxyChain: two hops keep the client's address, the name and the path's id.
func TestProxyChain(t *testing.T) {
	cert, pool := certificate(t, "a.test")
	headers := make(chan *proxyheader.Header, 1)
	last := backend(t, func(c net.Conn) {
		h, rest, err := proxyheader.Read(c, 4096, 5*time.Second)
		if err != nil {
			t.Error(err)
		}
		headers <- h
		tc := tls.Server(&inbound{TCPConn: c.(*net.TCPConn), ahead: rest}, &tls.Config{Certificates: []tls.Certificate{cert}})
		defer c.Close()
		fmt.Fprintln(tc, "last")
	})
	edge, home := freeAddr(t), freeAddr(t)
	dh := start(t, fmt.Sprintf(`
node: home
listeners: [ { name: web, listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.0/8] }, default: { forward: %q, send_proxy: v2 } } ]
`, home, last))
	de := start(t, fmt.Sprintf(`
node: edge
listeners: [ { name: web, listen: [%q], mode: sni, default: { forward: %q, send_proxy: v2 } } ]
`, edge, home))
	got, err := dialTLS(edge, &tls.Config{ServerName: "a.test", RootCAs: pool, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil || got != "last\n" {
		t.Fatalf("%q, %v", got, err)
	}
	h := <-headers
	if h.ServerName != "a.test" || h.ALPN != "h2" || len(h.ID) != 32 {
		t.Errorf("header %+v: want the name, the protocol and an id", h)
	}
	if h.Destination.String() != edge {
		t.Errorf("destination %v: want what the client connected to, %s", h.Destination, edge)
	}
	want := "id=" + h.ID
	for _, d := range []*daemon{de, dh} {
		eventually(t, "the id is in each hop's log", func() bool {
			return strings.Contains(d.log.String(), want) && strings.Contains(d.log.String(), "client="+h.Source.String())
		})
	}
}

// TestProxyUnknown: somebody whom the hop before can't name is unknown to the next one too, and is not that hop.
func TestProxyUnknown(t *testing.T) {
	headers := make(chan *proxyheader.Header, 1)
	last := backend(t, func(c net.Conn) {
		defer c.Close()
		h, _, err := proxyheader.Read(c, 4096, 5*time.Second)
		if err != nil {
			t.Error(err)
		}
		headers <- h
		io.WriteString(c, "HTTP/1.0 204 No Content\r\n\r\n")
	})
	tcp, web := freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - { listen: [%q], mode: tcp, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
  - { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
`, tcp, last, web, last))
	for _, addr := range []string{tcp, web} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "PROXY UNKNOWN\r\nGET / HTTP/1.0\r\nHost: a.test\r\n\r\n")
		if h := <-headers; h == nil || h.Source.IsValid() || h.Local {
			t.Errorf("the target heard %+v", h)
		}
	}
}

// TestProxyFromStranger: the header closes the connection and the log says
// who; without a header the same peer is a client like any other.
func TestProxyFromStranger(t *testing.T) {
	up := backend(t, echo)
	cert, pool := certificate(t, "a.test")
	tlsUp := tlsBackend(t, "up", cert)
	tcp, sni := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: tcp, listen: [%q], mode: tcp, accept_proxy: { from: [192.0.2.0/24, "tag:edge"] }, default: { forward: %q } }
  - { name: sni, listen: [%q], mode: sni, accept_proxy: { from: [192.0.2.0/24] }, default: { forward: %q } }
`, tcp, up, sni, tlsUp))
	forged := proxyheader.Header{Source: addrPort(&net.TCPAddr{IP: net.IPv4(203, 0, 113, 9), Port: 1}), Destination: addrPort(&net.TCPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 443})}.Append(nil)
	for i, addr := range []string{tcp, sni} {
		if c, err := net.Dial("tcp", addr); err == nil { // it may be closed that early
			c.Write(forged)
			c.Write([]byte("hello"))
			if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("%s: a stranger's header was answered", addr)
			}
			c.Close()
		}
		eventually(t, "counted", func() bool { return d.refused("proxy_from_stranger") == int64(i+1) })
	}
	if !strings.Contains(d.log.String(), "127.0.0.1") {
		t.Error("the log does not say who the stranger was")
	}
	if got, err := dialTLS(sni, &tls.Config{ServerName: "a.test", RootCAs: pool}); got != "up\n" {
		t.Errorf("without a header: %q, %v", got, err)
	}
	// A listener without accept_proxy takes such bytes as data.
	plain := freeAddr(t)
	start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, plain, up))
	c := dialTCP(t, plain)
	c.Write(forged)
	back := make([]byte, len(forged))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != string(forged) {
		t.Errorf("plain listener: %v", err)
	}
}

func TestLimits(t *testing.T) {
	up := backend(t, echo)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]
limits: { connections_per_source: 3 }
`, addr, up))
	ping := func(c net.Conn) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	var held []net.Conn
	for range 3 {
		c := dialTCP(t, addr)
		if err := ping(c); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	try := func() error { // a refusal may come as early as the connect
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		return ping(c)
	}
	if try() == nil {
		t.Error("the fourth connection of a source was served")
	}
	eventually(t, "it is counted", func() bool { return d.refused("over_limit") == 1 })
	held[0].Close()
	eventually(t, "a place is free again", func() bool { return try() == nil })
}

// TestReload: a flow goes on over a change of routes, and a config that can't
// be used changes nothing.
func TestReload(t *testing.T) {
	one := backend(t, func(c net.Conn) { io.WriteString(c, "1"); echo(c) })
	two := backend(t, func(c net.Conn) { io.WriteString(c, "2"); echo(c) })
	addr, more := freeAddr(t), freeAddr(t)
	yaml := func(listen, up string) string {
		return fmt.Sprintf(`listeners: [ { name: a, listen: %s, mode: tcp, default: { forward: %q } } ]`, listen, up)
	}
	first := func(addr string) string {
		c := dialTCP(t, addr)
		b := make([]byte, 1)
		io.ReadFull(c, b)
		return string(b)
	}
	d := start(t, yaml(`["`+addr+`"]`, one))
	old := dialTCP(t, addr)
	io.ReadFull(old, make([]byte, 1))

	if err := d.Reload(parse(t, yaml(`["`+addr+`", "`+more+`"]`, two))); err != nil {
		t.Fatal(err)
	}
	if a, b := first(addr), first(more); a != "2" || b != "2" {
		t.Errorf("after the reload: %q and %q answer, want 2 and 2", a, b)
	}
	busy := backend(t, echo)
	err := d.Reload(parse(t, yaml(`["`+addr+`", "`+busy+`"]`, one)))
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a port in use: %v", err)
	}
	if got := first(addr); got != "2" {
		t.Errorf("after a refused reload %q answers: want 2 as before", got)
	}
	if err := d.Reload(parse(t, yaml(`["`+addr+`"]`, one))); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("tcp", more); err == nil {
		t.Error("a removed address still listens")
	}
	io.WriteString(old, "still there")
	b := make([]byte, 11)
	if _, err := io.ReadFull(old, b); err != nil || string(b) != "still there" {
		t.Errorf("the flow from before: %q, %v", b, err)
	}
}

// TestDrainSilent: who has said nothing yet, or not enough, keeps no daemon from ending.
func TestDrainSilent(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	for _, c := range []struct{ name, listener, send string }{
		{"no hello", `mode: sni`, ""},
		{"half a hello", `mode: sni`, string(helloFor(t, "a.test")[:20])},
		{"no PROXY header", `mode: sni, accept_proxy: { from: [127.0.0.0/8] }`, ""},
		{"no PROXY header to tcp", `mode: tcp, accept_proxy: { from: [127.0.0.0/8] }`, ""},
		{"no handshake", fmt.Sprintf("mode: https, certificates: [ { files: { cert: %q, key: %q } } ]", certFile, keyFile), ""},
		{"half a request", "mode: http", "GET / HT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf("listeners: [ { listen: [%q], %s, default: { forward: \"127.0.0.1:9\" } } ]\nlimits: { hello_timeout: 10m }", addr, c.listener))
			conn := dialTCP(t, addr)
			io.WriteString(conn, c.send)
			eventually(t, "it is accepted", func() bool { return d.limiter.Total() == 1 })
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			done := make(chan error)
			go func() { done <- d.Drain(ctx) }()
			select {
			case err := <-done:
				// The server of HTTP ends its connections itself, and may be quicker than the count.
				if http := strings.HasPrefix(c.listener, "mode: http"); !http && (err == nil || !strings.Contains(err.Error(), "cut before their end: 1")) {
					t.Errorf("got %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Error("the daemon doesn't end")
			}
		})
	}
}

func TestDrain(t *testing.T) {
	up := backend(t, echo)
	for _, c := range []struct {
		name string
		ends bool
	}{{"flows end", true}, {"deadline cuts", false}} {
		t.Run(c.name, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, up))
			conn := dialTCP(t, addr)
			conn.Write([]byte("x"))
			io.ReadFull(conn, make([]byte, 1))
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			done := make(chan error)
			go func() { done <- d.Drain(ctx) }()
			eventually(t, "no new connections", func() bool {
				c, err := net.Dial("tcp", addr)
				if err == nil {
					c.Close() // or it would be one more flow to wait for
				}
				return err != nil
			})
			conn.Write([]byte("y"))
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Errorf("a flow does not go on while draining: %v", err)
			}
			if c.ends {
				conn.Close()
			}
			if err := <-done; (err == nil) != c.ends {
				t.Errorf("drain: %v", err)
			}
			if n := d.flows.Len(); n != 0 {
				t.Errorf("%d flows left", n)
			}
		})
	}
}

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
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: pool},
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

func httpBackend(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// TestForwardedBehindProxyHeader: a hop that sends a PROXY header passes on what
// its client wrote, so forwarding headers are the hop's word only without one.
func TestForwardedBehindProxyHeader(t *testing.T) {
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-For")) })
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.0/8] }, default: { forward: %q } } ]`, addr, up))
	for _, c := range []struct{ name, header, want string }{
		{"none", "", "6.6.6.6, 127.0.0.1"},
		{"a client", "PROXY TCP4 203.0.113.9 192.0.2.1 1234 443\r\n", "203.0.113.9"},
		{"a client that is not known", "PROXY UNKNOWN\r\n", "unknown"},
		{"the hop itself", string(proxyheader.Header{Local: true}.Append(nil)), "6.6.6.6, 127.0.0.1"},
	} {
		conn := dialTCP(t, addr)
		io.WriteString(conn, c.header+"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if b, _ := io.ReadAll(res.Body); string(b) != c.want {
			t.Errorf("%s: X-Forwarded-For is %q, want %q", c.name, b, c.want)
		}
	}
}

func TestMissingDatapathIsRefused(t *testing.T) {
	_, err := New(parse(t, fmt.Sprintf(`
datapath: sockmap
listeners: [ { listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]
`, freeAddr(t))), Options{Log: slog.New(slog.DiscardHandler), Missing: map[string]string{"sockmap": "kernel 4.19 is too old"}})
	if err == nil || !strings.Contains(err.Error(), "kernel 4.19 is too old") {
		t.Errorf("got %v", err)
	}
}

// TestHTTPChain: the last of three http hops knows the client that the first one saw.
func TestHTTPChain(t *testing.T) {
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-For")) })
	to := up
	for range 3 { // from the last hop to the first
		addr := freeAddr(t)
		start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.0/8] }, allow: [203.0.113.9], default: { forward: %q } } ]`, addr, to))
		to = addr
	}
	for client, want := range map[string]int{"203.0.113.9": 200, "203.0.113.10": 403} {
		conn := dialTCP(t, to)
		io.WriteString(conn, "PROXY TCP4 "+client+" 192.0.2.1 1234 443\r\nGET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != want {
			b, _ := io.ReadAll(res.Body)
			t.Errorf("%s: %s, want %d: %s", client, res.Status, want, b)
		}
	}
}
