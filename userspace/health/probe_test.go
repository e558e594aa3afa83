package health

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// patience is how long what does answer may take.
const patience = time.Minute

// listening serves connections at an address.
func listening(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return ln.Addr().String()
}

// TestProbe: each kind of check against targets that work, and that do not.
func TestProbe(t *testing.T) {
	silent := listening(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	closes := listening(t, func(net.Conn) {})
	trickles := listening(t, func(c net.Conn) {
		for {
			if _, err := io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n"); err != nil {
				return
			}
		}
	})
	endless := listening(t, func(c net.Conn) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nX: ")
		for {
			if _, err := io.WriteString(c, strings.Repeat("x", 1<<10)); err != nil {
				return
			}
		}
	})
	babbles := listening(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-x\r\n") })
	web := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var code int
		fmt.Sscanf(r.URL.Path, "/%d", &code)
		if r.Host != "a.test" || r.UserAgent() != userAgent || r.Method != http.MethodGet {
			code = http.StatusTeapot
		}
		w.WriteHeader(code)
		for range 100 { // nobody reads it
			w.Write(make([]byte, 64<<10))
		}
	})
	plain := httptest.NewServer(web)
	t.Cleanup(plain.Close)
	h2c := httptest.NewUnstartedServer(web)
	h2c.Config.Protocols = new(http.Protocols)
	h2c.Config.Protocols.SetUnencryptedHTTP2(true)
	h2c.Start()
	t.Cleanup(h2c.Close)
	cert := selfsigned.Certificate(t, "a.test")
	secure := httptest.NewUnstartedServer(web)
	secure.EnableHTTP2 = true
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if h.ServerName != "a.test" && h.ServerName != "b.test" {
			return nil, fmt.Errorf("who is %q?", h.ServerName)
		}
		return nil, nil
	}}
	secure.StartTLS()
	t.Cleanup(secure.Close)
	roots := func() *x509.CertPool { return selfsigned.Pool(cert) }
	at := func(s *httptest.Server) string { return s.Listener.Addr().String() }

	get := func(path string, more ...func(*Spec)) Spec {
		s := Spec{Kind: HTTP, Host: "a.test", Path: path, Expect: "2xx 3xx"}
		for _, m := range more {
			m(&s)
		}
		return s
	}
	byTLS := func(s *Spec) { s.TLS, s.ServerName = true, "a.test" }
	for _, c := range []struct {
		name   string
		target string
		spec   Spec
		want   string // a part of the error; "" for none
	}{
		{"connect", silent, Spec{Kind: Connect}, ""},
		{"connect, refused", freeaddr.Get(t), Spec{Kind: Connect}, "refused"},
		{"tls", at(secure), Spec{Kind: TLS, ServerName: "b.test"}, ""},
		{"tls, another name", at(secure), Spec{Kind: TLS, ServerName: "c.test"}, "TLS handshake: remote error"},
		{"tls, verified", at(secure), Spec{Kind: TLS, ServerName: "a.test", Verify: true, CA: "roots"}, ""},
		{"tls, verified, another certificate", at(secure), Spec{Kind: TLS, ServerName: "b.test", Verify: true, CA: "roots"}, "valid for a.test, not b.test"},
		{"tls, verified by the system", at(secure), Spec{Kind: TLS, ServerName: "a.test", Verify: true}, "unknown authority"},
		{"tls, silent", silent, Spec{Kind: TLS}, "TLS handshake: no answer within"},
		{"tls, closed", closes, Spec{Kind: TLS}, "TLS handshake: "},
		{"tls, no TLS", babbles, Spec{Kind: TLS}, "TLS handshake: "},
		{"http", at(plain), get("/200"), ""},
		{"http, redirect", at(plain), get("/301"), ""},
		{"http, not found", at(plain), get("/404"), "GET /404: the answer is 404, and expect is 2xx or 3xx"},
		{"http, fails", at(plain), get("/503"), "the answer is 503"},
		{"http, expected", at(plain), get("/404", func(s *Spec) { s.Expect = "204 404" }), ""},
		{"http, other name", at(plain), get("/200", func(s *Spec) { s.Host = "b.test" }), "418"},
		{"http, h2c", at(h2c), get("/204", func(s *Spec) { s.H2C = true }), ""},
		{"http, h2c, fails", at(h2c), get("/500", func(s *Spec) { s.H2C = true }), "500"},
		{"http, h2c to one without", at(plain), get("/200", func(s *Spec) { s.H2C = true }), "GET /200: "},
		{"http, TLS", at(secure), get("/200", byTLS), ""},
		{"http, TLS, fails", at(secure), get("/500", byTLS), "500"},
		{"http, TLS, verified", at(secure), get("/200", byTLS, func(s *Spec) { s.Verify, s.CA = true, "roots" }), ""},
		{"http, TLS, verified by the system", at(secure), get("/200", byTLS, func(s *Spec) { s.Verify = true }), "unknown authority"},
		{"http to TLS", at(secure), get("/200"), "400"},
		{"http, silent", silent, get("/200"), "GET /200: no answer within"},
		{"http, closed", closes, get("/200"), "GET /200: "},
		{"http, no HTTP", babbles, get("/200"), "malformed HTTP"},
		{"http, without end", endless, get("/200"), "exceeds 65536 bytes"},
		{"http, never final", trickles, get("/200"), "exceeds 65536 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.spec.Timeout = patience
			if strings.Contains(c.want, "no answer within") {
				c.spec.Timeout = 200 * time.Millisecond
			}
			var ca func() *x509.CertPool
			if c.spec.CA != "" {
				ca = roots
			}
			probe := Probe(c.spec, func(ctx context.Context) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "tcp", c.target)
			}, ca)
			ctx, cancel := context.WithTimeout(t.Context(), c.spec.Timeout)
			defer cancel()
			switch err := probe(ctx); {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// TestPreface: what is sent first comes first, and connect sends nothing.
func TestPreface(t *testing.T) {
	for _, c := range []struct{ kind, want string }{{Connect, ""}, {HTTP, "PREFACE\r\nGET / HTTP/1.1\r\n"}, {TLS, "PREFACE\r\n\x16\x03"}} {
		got := make(chan string, 1)
		addr := listening(t, func(c net.Conn) {
			c.SetDeadline(time.Now().Add(patience))
			b := make([]byte, len("PREFACE\r\nGET / HTTP/1.1\r\n"))
			n, _ := io.ReadFull(c, b)
			got <- string(b[:n])
		})
		probe := Probe(Spec{Kind: c.kind, Preface: "PREFACE\r\n", Host: "a.test", Path: "/"}, func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}, nil)
		probe(t.Context())
		if s := <-got; !strings.HasPrefix(s, c.want) || c.want == "" && s != "" {
			t.Errorf("%s sends %q", c.kind, s)
		}
	}
}

func TestExpects(t *testing.T) {
	for _, c := range []struct {
		want string
		code int
		is   bool
	}{
		{"2xx 3xx", 200, true}, {"2xx 3xx", 399, true}, {"2xx 3xx", 400, false}, {"2xx 3xx", 199, false},
		{"204", 204, true}, {"204", 200, false}, {"204 5xx", 503, true}, {"", 200, false},
	} {
		if got := expects(c.want, c.code); got != c.is {
			t.Errorf("%d of %q: %v", c.code, c.want, got)
		}
	}
}

// said is a connection on which a target has said something, whatever it is asked.
type said struct {
	net.Conn
	bytes.Reader
}

func (s *said) Read(b []byte) (int, error)  { return s.Reader.Read(b) }
func (s *said) Write(b []byte) (int, error) { return len(b), nil }

// FuzzAnswer: whatever a target answers, it is a status or an error, and no more than is bounded is read.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 503\r\nA: b\r\n\r\nx", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "HTTP/2.0 200 OK\r\n\r\n", "SSH-2.0-x\r\n", "", "HTTP/1.1 999 x\r\nTransfer-Encoding: chunked\r\n\r\nzz"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &said{}
		c.Reset(data)
		r := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "a.test", Path: "/"}, Header: http.Header{}}
		code, err := ask1(c, r)
		if err == nil && (code < 101 || code > 999) {
			t.Errorf("the status is %d", code)
		}
		if read := len(data) - c.Len(); read > answerBytes {
			t.Errorf("%d bytes are read", read)
		}
	})
}
