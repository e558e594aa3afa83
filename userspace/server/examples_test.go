package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/config"
)

// example is one of examples/, run as it is but for addresses and paths.
type example struct {
	d      *daemon
	dir    string   // with its files
	addrs  []string // of its listeners, in their order
	client *http.Client
}

var (
	exampleListen = regexp.MustCompile(`listen: \["([^"]+)"\]`)
	exampleTarget = regexp.MustCompile(`127\.0\.0\.1:(\d+)`)
)

// runExample starts a daemon of examples/NAME.yaml. Its targets on 127.0.0.1
// are servers that answer with what they got, and their port in the example.
func runExample(t *testing.T, name string, files map[string][]byte) *example {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "examples", name+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	e := &example{dir: t.TempDir()}
	cert, pool := certificate(t, "vsq.cz", "app.vsq.cz", "old.vsq.cz", "grpc.vsq.cz", "admin.vsq.cz", "nas.lan")
	other, _ := certificate(t, "other.vsq.cz")
	pool.AddCert(other.Leaf)
	for file, c := range map[string]tls.Certificate{"site": cert, "other": other} {
		pem, key := writePair(t, c)
		os.Rename(pem, filepath.Join(e.dir, file+".pem"))
		os.Rename(key, filepath.Join(e.dir, file+".key"))
	}
	writeCA(t, filepath.Join(e.dir, "nas-ca.pem"), cert)
	own, _ := certificate(t, "client")
	writeCA(t, filepath.Join(e.dir, "clients-ca.pem"), own)
	for file, data := range files {
		if err := os.WriteFile(filepath.Join(e.dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yaml := exampleListen.ReplaceAllStringFunc(string(text), func(string) string {
		e.addrs = append(e.addrs, freeAddr(t))
		return fmt.Sprintf("listen: [%q]", fmt.Sprintf("LISTENER %d", len(e.addrs)-1))
	})
	servers := map[string]string{}
	yaml = exampleTarget.ReplaceAllStringFunc(yaml, func(at string) string {
		if servers[at] == "" {
			servers[at] = exampleServer(t, at[len("127.0.0.1:"):], cert)
		}
		return servers[at]
	})
	for i, addr := range e.addrs {
		yaml = strings.Replace(yaml, fmt.Sprintf("LISTENER %d", i), addr, 1)
	}
	yaml = strings.ReplaceAll(yaml, "/var/log/tailsplice", e.dir)
	file := filepath.Join(e.dir, "example.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	e.d = startConfig(t, cfg)
	// Whatever a URL says, http goes to the first listener and https to the one
	// that speaks TLS.
	secure := e.addrs[0]
	for i, l := range cfg.Listeners {
		if l.Mode == "https" {
			secure = e.addrs[i]
		}
	}
	tr := &http.Transport{ForceAttemptHTTP2: true, DisableCompression: true, TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{own}},
		DialContext: func(ctx context.Context, _, to string) (net.Conn, error) {
			if strings.HasSuffix(to, ":443") {
				to = secure
			} else {
				to = e.addrs[0]
			}
			return new(net.Dialer).DialContext(ctx, "tcp", to)
		}}
	t.Cleanup(tr.CloseIdleConnections)
	e.client = &http.Client{Timeout: patience, Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return e
}

// exampleServer is what the examples have on a port.
func exampleServer(t *testing.T, port string, cert tls.Certificate) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch port {
		case "9091", "4180": // who asks for a sign-in
			if r.Header.Get("Cookie") == "" {
				http.Redirect(w, r, "https://login.vsq.cz/", http.StatusFound)
			}
			w.Header().Set("Remote-User", "me")
			w.Header().Set("X-Auth-Request-User", "me")
			return
		}
		w.Header().Set("Server", "secret")
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprintf(w, "%s: %s %s %s body=%d", port, r.Proto, r.Method, r.RequestURI, len(body))
		for _, name := range slices.Sorted(maps.Keys(r.Header)) {
			fmt.Fprintf(w, " %s=%s", name, strings.Join(r.Header[name], ","))
		}
		fmt.Fprintf(w, " host=%s %s", r.Host, strings.Repeat("z", 2000))
	})}
	s.Protocols.SetHTTP1(port != "50051")
	s.Protocols.SetUnencryptedHTTP2(port == "50051")
	var served net.Listener = ln
	switch port {
	case "5001":
		served = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}})
	case "8081":
		served = proxyListener{ln}
	}
	go s.Serve(served)
	t.Cleanup(func() { s.Close() })
	return ln.Addr().String()
}

// proxyListener takes off the PROXY header with which each connection begins,
// and is nobody's client without one.
type proxyListener struct{ net.Listener }

func (l proxyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	br := bufio.NewReader(c)
	if b, _ := br.Peek(12); string(b) != "\r\n\r\n\x00\r\nQUIT\n" {
		c.Close()
		return c, nil
	}
	head := make([]byte, 16)
	io.ReadFull(br, head)
	br.Discard(int(head[14])<<8 | int(head[15]))
	return &bufferedConn{c, br}, nil
}

type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// TestExamples runs the examples of what http and https listeners do, and checks
// that they do it.
func TestExamples(t *testing.T) {
	const hash = "you:$2a$10$MmbwJ//lWu8bJSkj8GrR/.ldwzbD6zJ22c0yVkHMTi668GQPYh.am\n" // "secret"
	basic := func(user, password string) string {
		r, _ := http.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, password)
		return r.Header.Get("Authorization")
	}
	type header = map[string]string
	type request struct {
		method, url string
		send        header
		body        string
		status      int
		want        string // in the body or the Location
		answer      header
	}
	for name, requests := range map[string][]request{
		"redirect": {
			{"GET", "http://app.vsq.cz/a?b", nil, "", 308, "https://app.vsq.cz/a?b", nil},
			{"GET", "https://old.vsq.cz/a?b", nil, "", 308, "https://app.vsq.cz/a?b", nil},
			{"GET", "https://app.vsq.cz/moved/x", nil, "", 302, "https://app.vsq.cz/new", nil},
			{"GET", "https://app.vsq.cz/a", nil, "", 200, "3000: HTTP/1.1 GET /a ", nil},
		},
		"paths": {
			{"GET", "http://app.vsq.cz/api/a", header{"X-Api": "2"}, "", 200, "3002: ", nil},
			{"HEAD", "http://app.vsq.cz/api/a", nil, "", 200, "", nil},
			{"GET", "http://app.vsq.cz/api/a", header{"X-Api": "1"}, "", 200, "3001: ", nil},
			{"DELETE", "http://app.vsq.cz/api/a", nil, "", 405, "", header{"Allow": "GET, POST"}},
			{"GET", "http://app.vsq.cz/docs/a%2Fb?c", nil, "", 200, "3003: HTTP/1.1 GET /v1/a%2Fb?c ", nil},
			{"GET", "http://app.vsq.cz/docs", nil, "", 200, " X-Forwarded-Prefix=/docs ", nil},
			{"GET", "http://app.vsq.cz/docsx", nil, "", 404, "", nil},
			{"GET", "http://a.b.apps.vsq.cz/x", nil, "", 200, "3000: ", nil},
			{"GET", "http://apps.vsq.cz/x", nil, "", 404, "", nil},
		},
		"headers": {
			{"GET", "https://app.vsq.cz/", header{"Cookie2": "x"}, "", 200, " X-Site=app ",
				header{"Server": "", "X-Frame-Options": "DENY", "Strict-Transport-Security": "max-age=31536000; includeSubDomains"}},
			{"GET", "https://app.vsq.cz/", nil, "", 200, " host=app.internal ", nil},
		},
		"weights":      {{"POST", "http://a/", nil, "x", 200, "POST / body=1", nil}},
		"grpc":         {{"POST", "https://grpc.vsq.cz/a.B/C", header{"Te": "trailers"}, "x", 200, "50051: HTTP/2.0 POST /a.B/C body=1", nil}},
		"upstream-tls": {{"GET", "http://nas.vsq.cz/", nil, "", 200, "5001: ", nil}},
		"bounds": {
			{"POST", "http://app.vsq.cz/upload", nil, strings.Repeat("x", 10<<20), 200, "body=10485760", nil},
			{"POST", "http://app.vsq.cz/upload", nil, strings.Repeat("x", 10<<20+1), 413, "", nil},
			{"GET", "http://app.vsq.cz/", header{"Accept-Encoding": "gzip"}, "", 200, "\x1f\x8b", header{"Content-Encoding": "gzip"}},
			{"GET", "http://app.vsq.cz/upload", header{"Accept-Encoding": "gzip"}, "", 200, "3001: ", header{"Content-Encoding": ""}},
		},
		"client-certificates": {
			{"GET", "https://app.vsq.cz/", header{"Client-Cert": "forged"}, "", 200, "3000: ", nil},
			{"GET", "https://admin.vsq.cz/", nil, "", 200, " Client-Cert=:", nil},
		},
		"allow": {
			{"GET", "http://blog.vsq.cz/", nil, "", 200, "3001: ", nil},
			{"GET", "http://notes.vsq.cz/", nil, "", 403, "Access is not allowed", nil},
		},
		"basic-auth": {
			{"GET", "http://wiki.vsq.cz/", nil, "", 401, "", header{"Www-Authenticate": "*"}},
			{"GET", "http://wiki.vsq.cz/", header{"Authorization": basic("me", "secret")}, "", 200, " X-Forwarded-User=me ", nil},
			{"GET", "http://wiki.vsq.cz/", header{"Authorization": basic("you", "secret")}, "", 401, "", nil},
			{"GET", "http://files.vsq.cz/", header{"Authorization": basic("you", "secret")}, "", 200, "3002: ", nil},
		},
		"forward-auth": {
			{"GET", "http://photos.vsq.cz/", nil, "", 302, "https://login.vsq.cz/", nil},
			{"GET", "http://photos.vsq.cz/", header{"Cookie": "s", "Remote-Groups": "wheel"}, "", 200, " Remote-User=me ", nil},
			{"GET", "http://grafana.vsq.cz/", header{"Cookie": "s"}, "", 200, " X-Auth-Request-User=me ", nil},
		},
		"access-log":   {{"GET", "http://a/x", nil, "", 200, "3000: ", nil}},
		"certificates": {{"GET", "https://app.vsq.cz/", nil, "", 200, "3000: ", nil}, {"GET", "https://other.vsq.cz/", nil, "", 200, "3000: ", nil}},
		"send-proxy":   {{"GET", "http://mail.vsq.cz/", nil, "", 200, "8081: ", nil}, {"GET", "http://a/", nil, "", 200, " X-Forwarded-For=127.0.0.1 ", nil}},
	} {
		t.Run(name, func(t *testing.T) {
			e := runExample(t, name, map[string][]byte{"htpasswd": []byte(hash)})
			for _, r := range requests {
				req, _ := http.NewRequest(r.method, r.url, strings.NewReader(r.body))
				if r.body == "" {
					req.Body = nil
				}
				for k, v := range r.send {
					req.Header.Set(k, v)
				}
				res, err := e.client.Do(req)
				if err != nil {
					t.Errorf("%s %s: %v", r.method, r.url, err)
					continue
				}
				body, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if text := string(body) + res.Header.Get("Location"); res.StatusCode != r.status || !strings.Contains(text, r.want) || strings.Contains(text, "forged") {
					t.Errorf("%s %s: %d %.500q, want %d %q", r.method, r.url, res.StatusCode, text, r.status, r.want)
				}
				for k, want := range r.answer {
					if got := res.Header.Get(k); got != want && (want != "*" || got == "") {
						t.Errorf("%s %s: %s is %q, want %q", r.method, r.url, k, got, want)
					}
				}
			}
			switch name {
			case "access-log":
				ask(t, e.addrs[1], "GET", "a", "/y", nil)
				for file, want := range map[string]string{"access.log": `"uri":"/x"`, "apart.log": `"GET /y HTTP/1.1" 200`} {
					eventually(t, "the line in "+file, func() bool {
						b, _ := os.ReadFile(filepath.Join(e.dir, file))
						return strings.Count(string(b), "\n") == 1 && strings.Contains(string(b), want)
					})
				}
			case "send-proxy": // the other way round: a header that is believed
				if _, body := ask(t, e.addrs[0], "GET", "a", "/", from("192.0.2.7:5")); !strings.Contains(body, " X-Forwarded-For=192.0.2.7 ") {
					t.Errorf("%s", body)
				}
			}
		})
	}
}
