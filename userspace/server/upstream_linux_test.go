package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAuthoritiesFollowed changes the files of an upstream's and of clients'
// authorities under a running daemon: what they say counts from then on, for
// upstream connections in the pool too.
func TestAuthoritiesFollowed(t *testing.T) {
	server, pool := certificate(t, "a.test")
	stranger, _ := certificate(t, "a.test")
	client, _ := certificate(t, "client")
	up := httptestTLS(t, server)
	certFile, keyFile := writePair(t, server)
	upCA, clientCA := filepath.Join(t.TempDir(), "up.pem"), filepath.Join(t.TempDir(), "clients.pem")
	writeCA(t, upCA, stranger)
	writeCA(t, clientCA, stranger)
	addr, secure := freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - listen: [%q]
    mode: http
    routes:
      - { host: checked.test, forward: %[3]q, upstream: { protocol: https, ca: %[4]q, server_name: a.test } }
      - { host: insecure.test, forward: %[3]q, upstream: { protocol: https, insecure: true, server_name: other.test } }
  - listen: [%[2]q]
    mode: https
    certificates: [ { files: { cert: %[5]q, key: %[6]q } } ]
    default: { forward: %[3]q, upstream: { protocol: https, insecure: true }, client_certificates: { ca: %[7]q } }
`, addr, secure, up, upCA, certFile, keyFile, clientCA))
	byUpstream := func() int { res, _ := ask(t, addr, "GET", "checked.test", "/", nil); return res.StatusCode }
	byClient := func() int {
		c := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "a.test", Certificates: []tls.Certificate{client}}}}
		req, _ := http.NewRequest("GET", "https://"+secure+"/", nil)
		req.Host = "a.test"
		res, err := c.Do(req)
		if err != nil {
			t.Error(err)
			return 0
		}
		res.Body.Close()
		return res.StatusCode
	}
	if res, _ := ask(t, addr, "GET", "insecure.test", "/", nil); res.StatusCode != 200 {
		t.Errorf("an upstream that is not checked: %d", res.StatusCode)
	}
	for _, step := range []struct {
		trusted, clients []tls.Certificate
		up, client       int
	}{
		{[]tls.Certificate{stranger}, []tls.Certificate{stranger}, 502, 403},
		{[]tls.Certificate{stranger, server}, []tls.Certificate{client}, 200, 200},
		{[]tls.Certificate{stranger}, []tls.Certificate{stranger, server}, 502, 403},
	} {
		writeCA(t, upCA, step.trusted...)
		writeCA(t, clientCA, step.clients...)
		eventually(t, fmt.Sprintf("the upstream's answer is %d", step.up), func() bool { return byUpstream() == step.up })
		eventually(t, fmt.Sprintf("the client's answer is %d", step.client), func() bool { return byClient() == step.client })
	}
}

// httptestTLS answers everything over TLS.
func httptestTLS(t *testing.T, cert tls.Certificate) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto) }),
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// TestTimeouts waits in vain for a target that takes no connection, for one that
// does not answer, and for a client that stops in the middle of its body.
func TestTimeouts(t *testing.T) {
	var asked atomic.Int64
	release := make(chan struct{})
	defer close(release)
	silent := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/ok" {
			return
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: http
    routes:
      - { host: connect.test, forward: %q, timeouts: { connect: 200ms } }
      - { host: answer.test, forward: [ %[3]q, { to: %[4]q, weight: 0 } ], timeouts: { answer: 1s } }
      - { host: body.test, forward: %[3]q, timeouts: { body: 200ms } }
`, addr, full(t), silent, httpBackend(t, func(http.ResponseWriter, *http.Request) { t.Error("what took too long is tried elsewhere") })))
	res, body := ask(t, addr, "GET", "connect.test", "/", nil)
	if res.StatusCode != 504 {
		t.Errorf("connect: %d %s", res.StatusCode, body)
	}
	if res, body = ask(t, addr, "GET", "answer.test", "/", nil); res.StatusCode != 504 {
		t.Errorf("answer: %d %s", res.StatusCode, body)
	}
	eventually(t, "the target was asked once", func() bool { return asked.Load() == 1 })
	// Which is the time of the target's thinking, not the client's of sending.
	for try := 1; ; try++ { // one of a few is answered in time on a busy machine too
		c := dialTCP(t, addr)
		io.WriteString(c, "POST /ok HTTP/1.1\r\nHost: answer.test\r\nContent-Length: 2\r\n\r\nx")
		time.Sleep(1300 * time.Millisecond)
		io.WriteString(c, "x")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil && res.StatusCode == 200 {
			break
		}
		if try == 5 {
			t.Errorf("a slow body under a short timeouts.answer: %v, %v", res, err)
			break
		}
	}
	if res, body = ask(t, addr, "POST", "body.test", "/", nil, "Content-Length: 10"); res.StatusCode != 408 {
		t.Errorf("body: %d %s", res.StatusCode, body)
	}
}

// full is the address of a socket that takes no connection, as a host that
// drops packets: its queue is full, and nobody accepts.
func full(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
	for wait := patience; ; wait = 200 * time.Millisecond { // the first finds a place, however slow we are
		c, err := net.DialTimeout("tcp", addr, wait)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { c.Close() })
	}
}

// TestSharing shares requests by weight, and tries elsewhere what does no harm
// twice: what was not sent, and methods that may be repeated.
func TestSharing(t *testing.T) {
	named := func(name string) (string, *atomic.Int64) {
		n := new(atomic.Int64)
		return httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
			n.Add(1)
			b, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %s %s", name, r.Method, b)
		}), n
	}
	big, bigN := named("big")
	small, smallN := named("small")
	spare, spareN := named("spare")
	// One that hangs up in the middle of each request, and one in the middle of its answer.
	var heard atomic.Int64
	hangsUp := backend(t, func(c net.Conn) {
		defer c.Close()
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			io.Copy(io.Discard, r.Body)
			heard.Add(1)
			if r.URL.Path == "/half" {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
			}
		}
	})
	addr, later := freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: http
    routes:
      - { host: weights.test, forward: [ { to: %[2]q, weight: 3 }, %[3]q, { to: %[4]q, weight: 0 } ] }
      - { host: hangs.test, forward: [ %[5]q, { to: %[4]q, weight: 0 } ] }
      - { host: down.test, forward: [ "127.0.0.1:9", { to: %[4]q, weight: 0 } ] }
      - { host: later.test, forward: [ %[6]q, "127.0.0.1:9" ] }
`, addr, big, small, spare, hangsUp, later))
	const all = 400
	for range all {
		ask(t, addr, "GET", "weights.test", "/", nil)
	}
	// 3:1 of 400 is 300, give or take 9: a deviation of 60 comes once in 10¹⁰ times.
	if b, s := bigN.Load(), smallN.Load(); b+s != all || b < 240 || b > 360 || spareN.Load() != 0 {
		t.Errorf("of %d requests %d and %d, the spare one %d", all, b, s, spareN.Load())
	}
	for _, c := range []struct {
		method, host, body string
		status             int
		want               string
		heard              int64 // by the one that hangs up
	}{
		{"GET", "hangs.test", "", 200, "spare GET ", 1},
		{"PUT", "hangs.test", "whole", 200, "spare PUT whole", 1},
		{"PUT", "hangs.test", strings.Repeat("x", 200<<10), 502, "closed the connection", 1}, // more than is kept of it
		{"DELETE", "hangs.test", "", 200, "spare DELETE ", 1},
		{"POST", "hangs.test", "pay", 502, "closed the connection", 1},
		{"PATCH", "hangs.test", "x", 502, "closed the connection", 1},
		{"POST", "down.test", "pay", 200, "spare POST pay", 0}, // nothing of it was sent
	} {
		heard.Store(0)
		req, _ := http.NewRequest(c.method, "http://"+addr+"/", strings.NewReader(c.body))
		req.Host = c.host
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != c.status || !strings.Contains(string(b), c.want) || heard.Load() != c.heard {
			t.Errorf("%s %s: %d %q, heard %d times; want %d %q, %d", c.method, c.host, res.StatusCode, b, heard.Load(), c.status, c.want, c.heard)
		}
	}
	// Where none could be reached lately, they are tried all the same.
	if res, _ := ask(t, addr, "GET", "later.test", "/", nil); res.StatusCode != 502 {
		t.Errorf("before there is a target: %d", res.StatusCode)
	}
	ln, err := net.Listen("tcp", later)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "here") }))
	if res, body := ask(t, addr, "GET", "later.test", "/", nil); res.StatusCode != 200 {
		t.Errorf("a target that came back a moment ago: %d %s", res.StatusCode, body)
	}
	// An answer that has begun is not begun again.
	heard.Store(0)
	c := dialTCP(t, addr)
	io.WriteString(c, "GET /half HTTP/1.1\r\nHost: hangs.test\r\n\r\n")
	answer, _ := io.ReadAll(c)
	if strings.Count(string(answer), "HTTP/1.1") > 1 || strings.Contains(string(answer), "spare") || heard.Load() != 1 || spareN.Load() != 4 {
		t.Errorf("half an answer: %q, heard %d times, the spare one %d", answer, heard.Load(), spareN.Load())
	}
}

// TestTimingOfHops checks that each hop of a path shows its part, that a hop
// behind does so only for one that it believes, and that the first one decides.
func TestTimingOfHops(t *testing.T) {
	app := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server-Timing", "db;dur=1")
		fmt.Fprint(w, r.Header.Get("X-Tailsplice-Timing"))
	})
	laptop, home, quiet := freeAddr(t), freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
node: laptop
listeners: [{ listen: %q, mode: http, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, request_headers: { remove: X-Tailsplice-Timing } } }]`, laptop, app))
	start(t, fmt.Sprintf(`
node: home
listeners:
  - { listen: %q, mode: http, server_timing: true, default: { forward: %[3]q } }
  - { listen: %[2]q, mode: http, default: { forward: %[3]q } }`, home, quiet, laptop))
	for to, want := range map[string]string{home: "db laptop home", quiet: "db"} {
		for _, line := range []string{"X: y", "X-Tailsplice-Timing: 1"} { // which no stranger may say
			res, body := ask(t, to, "GET", "a", "/", nil, line)
			var hops []string
			for _, v := range res.Header["Server-Timing"] {
				name, dur, _ := strings.Cut(v, ";dur=")
				if hops = append(hops, name); dur == "" {
					t.Errorf("%q", v)
				}
			}
			if got := strings.Join(hops, " "); got != want || body != "" {
				t.Errorf("%s: %q %q, want %q", line, got, body, want)
			}
		}
	}
}
