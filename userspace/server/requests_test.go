package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRequests checks what routes do with requests, over TLS and HTTP/2.
func TestRequests(t *testing.T) {
	cert, pool := certificate(t, "a.test", "mtls.test")
	certFile, keyFile := writePair(t, cert)
	own, _ := certificate(t, "client")
	stranger, _ := certificate(t, "stranger")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("Secret", "x")
		w.Header().Set("Strict-Transport-Security", "max-age=1")
		fmt.Fprintf(w, "%s %s prefix=%s a=%s b=%s body=%d cert=%t id=%t %s", r.Method, r.RequestURI, r.Header.Get("X-Forwarded-Prefix"),
			r.Header.Get("A"), r.Header.Get("B"), len(body), r.Header.Get("Client-Cert") != "", r.Header.Get("X-Request-Id") != "", strings.Repeat("z", len(r.URL.Query().Get("fill"))*2000))
	})
	h2c := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		fmt.Fprint(w, r.Proto)
		w.Header().Set("Grpc-Status", "0")
	}), Protocols: new(http.Protocols)}
	h2c.Protocols.SetUnencryptedHTTP2(true)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go h2c.Serve(ln)
	t.Cleanup(func() { h2c.Close() })
	tlsUp := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "tls ", r.Proto) })}
	tlsLn, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	go tlsUp.Serve(tlsLn)
	t.Cleanup(func() { tlsUp.Close() })

	addr, plain := freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
node: home
listeners:
  - listen: [%q]
    mode: https
    hsts: 1y
    server_timing: true
    certificates: [ { files: { cert: %q, key: %q } } ]
    routes:
      - { host: a.test, path: /api, methods: GET, headers: { X-Api: "2" }, forward: %[4]q, strip_prefix: true, add_prefix: /v2, request_headers: { set: { A: "1" }, remove: B }, response_headers: { remove: Secret } }
      - { host: a.test, path: /small, forward: %[4]q, max_body: 10 }
      - { host: a.test, path: /gzip, forward: %[4]q, compress: true }
      - { host: a.test, path: /two, forward: [ "127.0.0.1:9", { to: %[4]q, weight: 0 } ] }
      - { host: a.test, path: /h2c, forward: %[5]q, upstream: { protocol: h2c } }
      - { host: a.test, path: /tls, forward: %[6]q, upstream: { protocol: https, ca: %[2]q, server_name: a.test } }
      - { host: a.test, path: /badtls, forward: %[6]q, upstream: { protocol: https, ca: %[7]q, server_name: a.test } }
      - { host: a.test, path: /post, methods: POST, forward: %[4]q }
      - { host: a.test, path: /old, redirect: "https://new.test" }
      - { host: mtls.test, forward: %[4]q, client_certificates: { ca: %[7]q } }
  - { listen: [%[8]q], mode: http, default: { redirect: https } }
`, addr, certFile, keyFile, up, ln.Addr(), tlsLn.Addr(), ca, plain))
	client := func(certs ...tls.Certificate) *http.Client {
		tr := &http.Transport{ForceAttemptHTTP2: true, DisableCompression: true, TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: certs},
			DialContext: func(ctx context.Context, _, to string) (net.Conn, error) {
				if strings.HasSuffix(to, ":80") {
					return new(net.Dialer).DialContext(ctx, "tcp", plain)
				}
				return new(net.Dialer).DialContext(ctx, "tcp", addr)
			}}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Timeout: patience, Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	none := client()
	for _, c := range []struct {
		client            *http.Client
		method, url, body string
		header            map[string]string
		status            int
		want              string
	}{
		{none, "GET", "https://a.test/api/x%2Fy?q", "", map[string]string{"X-Api": "2", "B": "2"}, 200, "GET /v2/x%2Fy?q prefix=/api a=1 b= body=0 cert=false id=true"},
		{none, "GET", "https://a.test/api/x", "", nil, 404, ""},
		{none, "POST", "https://a.test/api/x", "", map[string]string{"X-Api": "2"}, 405, ""},
		{none, "GET", "https://a.test/post", "", nil, 405, ""},
		{none, "post", "https://a.test/post", "", nil, 200, "post /post"}, // a guard of POST is one of what targets take for it
		{none, "head", "https://a.test/api/x", "", map[string]string{"X-Api": "2"}, 200, ""},
		{none, "POST", "https://a.test/small", "0123456789", nil, 200, "body=10"},
		{none, "POST", "https://a.test/small", "0123456789a", nil, 413, "larger than the 10 bytes"},
		{none, "POST", "https://a.test/two", "once", nil, 200, "body=4"},
		{none, "GET", "https://a.test/h2c", "", nil, 200, "HTTP/2.0"},
		{none, "GET", "https://a.test/tls", "", nil, 200, "tls HTTP/2.0"},
		{none, "GET", "https://a.test/badtls", "", nil, 502, "could not prove its identity"},
		{none, "GET", "https://a.test/old/x?y", "", nil, 308, "https://new.test/old/x?y"},
		{none, "GET", "http://a.test/x?y", "", nil, 308, "https://a.test/x?y"},
		{none, "GET", "https://mtls.test/", "", nil, 403, ""},
		{client(stranger), "GET", "https://mtls.test/", "", nil, 403, ""},
		{client(own), "GET", "https://mtls.test/", "", map[string]string{"Client-Cert": "forged"}, 200, "cert=true"},
	} {
		var body io.Reader
		if c.body != "" {
			body = struct{ io.Reader }{strings.NewReader(c.body)} // of unknown length
		}
		req, _ := http.NewRequest(c.method, c.url, body)
		for k, v := range c.header {
			req.Header.Set(k, v)
		}
		res, err := c.client.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.url, err)
			continue
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != c.status || !strings.Contains(string(b)+res.Header.Get("Location"), c.want) {
			t.Errorf("%s %s: %d %q %q, want %d %q", c.method, c.url, res.StatusCode, b, res.Header.Get("Location"), c.status, c.want)
		}
		if https := strings.HasPrefix(c.url, "https"); https != (len(res.Header["Strict-Transport-Security"]) == 1 && res.Header.Get("Strict-Transport-Security") == "max-age=31536000") ||
			https != strings.HasPrefix(res.Header.Get("Server-Timing"), "home;dur=") {
			t.Errorf("%s: HSTS %q, timing %q", c.url, res.Header["Strict-Transport-Security"], res.Header.Get("Server-Timing"))
		}
		if strings.Contains(c.url, "/api") && res.Header.Get("Secret") != "" {
			t.Error("a response header was not removed")
		}
		if strings.HasSuffix(c.url, "/h2c") && res.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("trailers: %v", res.Trailer)
		}
	}
	req, _ := http.NewRequest("GET", "https://a.test/gzip?fill=z", nil)
	req.Header.Set("Accept-Encoding", "gzip")
	res, err := none.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	packed, _ := io.ReadAll(res.Body)
	res.Body.Close()
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatalf("%v: %q", err, packed)
	}
	if b, err := io.ReadAll(z); err != nil || len(packed) > 1000 || !bytes.HasSuffix(b, []byte("zzzz")) {
		t.Errorf("%d bytes of gzip: %v", len(packed), err)
	}
	// A connection for another name of the certificate has no client certificate.
	req, _ = http.NewRequest("GET", "https://a.test/", nil)
	req.Host = "mtls.test"
	if res, err = client(own).Do(req); err != nil || res.StatusCode != 421 {
		t.Errorf("coalesced: %v, %v, want 421", res, err)
	}
}
