package vhost

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// broken is an upstream that can't be dialled.
func broken(err error) *Upstream {
	return &Upstream{Key: "broken", Name: "laptop", Dial: func(context.Context) (net.Conn, error) { return nil, err }}
}

// closedPort is an address where nothing listens.
func closedPort(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestNothingAnswers checks the status and the words for each way in which an
// upstream does not answer.
func TestNothingAnswers(t *testing.T) {
	secret := errors.New("dial 192.168.77.5:3000: secret detail")
	for name, tc := range map[string]struct {
		up     *Upstream
		status int
		want   string
		reason string
	}{
		"refused, really": {wayTo(closedPort(t)), 502, "laptop is not answering", "refused"},
		"no unix socket":  {&Upstream{Key: "unix", Name: "laptop", Dial: func(ctx context.Context) (net.Conn, error) { return net.Dial("unix", t.TempDir()+"/none") }}, 502, "laptop is not answering", "refused"},
		"reset, really": {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			c.SetLinger(0)
		}), 502, "laptop closed the connection", "reset"},
		"closed, really": {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) { readHead(br) }), 502, "laptop closed the connection", "reset"},
		"half a header": {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nSet-Cookie: a\r\n")
		}), 502, "laptop closed the connection", "reset"},
		"not HTTP, really": {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) { readHead(br); io.WriteString(c, "SSH-2.0-OpenSSH_9.2p1\r\n") }), 502, "laptop sent no valid answer", "malformed"},
		"TLS, really":      {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) { readHead(br); c.Write([]byte("\x15\x03\x01\x00\x02\x02\x46")) }), 502, "laptop sent no valid answer", "malformed"},
		"a header without end": {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for range 2 * answerHeaderBytes / 1000 {
				if _, err := io.WriteString(c, "X-A: "+strings.Repeat("a", 1000)+"\r\n"); err != nil {
					return
				}
			}
		}), 502, "laptop sent no valid answer", "malformed"},
		"silent, really":      {rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) { readHead(br); io.ReadAll(br) }), 504, "laptop did not answer in time", "timeout"},
		"dial: absent":        {broken(Fail(ReasonAbsent, secret)), 503, "laptop is not available right now", "absent"},
		"dial: timeout":       {broken(Fail(ReasonTimeout, secret)), 504, "laptop did not answer in time", "timeout"},
		"dial: unreachable":   {broken(fmt.Errorf("dial: %w", syscall.EHOSTUNREACH)), 502, "laptop can't be reached", "unreachable"},
		"dial: deadline":      {broken(fmt.Errorf("dial: %w", os.ErrDeadlineExceeded)), 504, "laptop did not answer in time", "timeout"},
		"dial: who knows":     {broken(secret), 502, "laptop can't be reached", "unreachable"},
		"dial: unknown words": {broken(Fail("solar flare", secret)), 502, "laptop can't be reached", "unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHop(t, tc.up, func(c *config) {
				c.AnswerTimeout = deadline
				if name == "silent, really" {
					c.AnswerTimeout = 200 * time.Millisecond
				}
			})
			c := protocols[0].client(t, h)
			for _, accept := range []string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/plain", "application/json", ""} {
				res, body := get(t, c, "http://example.org/x", func(r *http.Request) {
					r.Header.Set("Accept", accept)
					r.Header.Set("User-Agent", "Mozilla/5.0")
				})
				body = html.UnescapeString(body)
				if res.StatusCode != tc.status || !strings.Contains(body, tc.want) || !strings.Contains(body, "home") || !strings.Contains(body, "id-of-connection-0") {
					t.Errorf("Accept %q: %d, want %d and %q, the node's name and the id in\n%s", accept, res.StatusCode, tc.status, tc.want, body)
				}
				for _, leak := range []string{"127.0.0.1", "192.168", "secret", "dial", "goroutine", "read tcp", "yours", "config", "upstream", "its log", "route"} {
					if strings.Contains(body, leak) {
						t.Errorf("Accept %q: %q leaks:\n%s", accept, leak, body)
					}
				}
				if res.Header.Get("Cache-Control") != "no-store" || res.Header.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("header %v", res.Header)
				}
				if (res.StatusCode == 503) != (res.Header.Get("Retry-After") != "") {
					t.Errorf("Retry-After %q", res.Header.Get("Retry-After"))
				}
				kind, wants := res.Header.Get("Content-Type"), "text/plain; charset=utf-8"
				switch {
				case strings.HasPrefix(accept, "text/html"):
					wants = "text/html; charset=utf-8"
				case accept == "application/json":
					wants = "application/json"
					var got struct {
						Status                                        int
						Error, Detail, Hint, Node, Target, Reason, ID string
					}
					if err := json.Unmarshal([]byte(body), &got); err != nil || got.Status != tc.status || got.Reason != tc.reason || got.Node != "home" || got.Target != "laptop" || got.ID == "" {
						t.Errorf("%v %+v", err, got)
					}
				}
				if kind != wants {
					t.Errorf("Accept %q: type %q", accept, kind)
				}
			}
			res, body := get(t, c, "http://example.org/x", func(r *http.Request) { r.Method = "HEAD" })
			if res.StatusCode != tc.status || body != "" {
				t.Errorf("HEAD: %d %q", res.StatusCode, body)
			}
			if q := h.request(t, 1); q.Err == nil || q.Status != tc.status {
				t.Errorf("reported %d, %v", q.Status, q.Err)
			}
		})
	}
}

// TestAllDown: where health checks have found all of a route's targets down, the page says so and since when; it
// does not where one is up, or is not checked.
func TestAllDown(t *testing.T) {
	down := func(ago time.Duration) func() time.Time {
		since := time.Now().Add(-ago)
		return func() time.Time { return since }
	}
	up := func() time.Time { return time.Time{} }
	refused := Fail(ReasonRefused, errors.New("dial 192.168.77.5:3000: secret detail"))
	for _, tc := range []struct {
		name  string
		since []func() time.Time
		want  string
	}{
		{"one", []func() time.Time{down(5*time.Minute + time.Second)}, "It may be starting. Health checks found it down 5 minutes ago."},
		{"two", []func() time.Time{down(3*time.Hour + time.Second), down(2*time.Hour + time.Second)},
			"Health checks found all 2 places that could answer down, the last one 2 hours ago."},
		{"one of two is up", []func() time.Time{down(time.Hour), up}, ""},
		{"one of two is not checked", []func() time.Time{nil, down(time.Hour)}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			route := &Route{Name: "checked"}
			for i, since := range tc.since {
				one := broken(refused)
				one.Key = fmt.Sprint(i)
				route.Upstreams = append(route.Upstreams, Choice{Upstream: one, Weight: 1, DownSince: since})
			}
			h := newHop(t, nil, func(c *config) { c.Route = func(*http.Request, string, string) (*Route, error) { return route, nil } })
			res, body := get(t, protocols[0].client(t, h), "http://example.org/x")
			if res.StatusCode != 502 || !strings.Contains(body, tc.want) || (tc.want == "") == strings.Contains(body, "Health checks") {
				t.Errorf("%d, want 502 and %q in\n%s", res.StatusCode, tc.want, body)
			}
			for _, leak := range []string{"192.168", "secret"} {
				if strings.Contains(body, leak) {
					t.Errorf("%q leaks:\n%s", leak, body)
				}
			}
		})
	}
}

// TestPreferred checks who gets which form of page.
func TestPreferred(t *testing.T) {
	for _, tc := range []struct{ accept, agent, want string }{
		{"text/html,application/xhtml+xml,*/*;q=0.8", "Mozilla/5.0", "html"},
		{"*/*", "curl/8.0", "text"},
		{"*/*", "Mozilla/5.0", "text"},
		{"", "Go-http-client/1.1", "text"},
		{"text/html", "Wget/1.21", "text"},
		{"text/plain", "Mozilla/5.0", "text"},
		{"text/plain;q=0.5, text/html;q=0.4", "x", "text"},
		{"text/html;q=0.4, application/json", "x", "json"},
		{"application/problem+json", "x", "json"},
		{"image/avif,image/webp,*/*;q=0.8", "Mozilla/5.0", "text"},
		{";;;,,text/html;q=x", "Mozilla/5.0", "html"},
		{"text/html;q=0", "Mozilla/5.0", "text"},
	} {
		r := &http.Request{Header: http.Header{"Accept": {tc.accept}, "User-Agent": {tc.agent}}}
		if got := preferred(r); got != tc.want {
			t.Errorf("Accept %q from %s: %s, want %s", tc.accept, tc.agent, got, tc.want)
		}
	}
}

// TestPageEscapes checks that a visitor can't put markup into a page.
func TestPageEscapes(t *testing.T) {
	h := newHop(t, nil, func(c *config) {
		c.Route = leading(func(string, string) (*Upstream, error) { return nil, ErrNoHost })
	})
	res, body := rawDo(t, h, "GET / HTTP/1.1\r\nHost: <script>'\"\r\nAccept: text/html\r\n\r\n")
	if strings.Contains(body, "<script>") {
		t.Errorf("%d\n%s", res.StatusCode, body)
	}
	h = newHop(t, broken(io.EOF), func(c *config) { c.Node = "<b>home" })
	if _, body := rawDo(t, h, "GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\nConnection: close\r\n\r\n"); strings.Contains(body, "<b>home") {
		t.Error(body)
	}
}

// TestNextHopsPage checks that the page of a hop further on passes untouched:
// it knows better which hop failed, and shows the whole path.
func TestNextHopsPage(t *testing.T) {
	laptop := newHop(t, broken(Fail(ReasonAbsent, io.EOF)), func(c *config) {
		c.Node, c.info = "laptop", func(i ConnInfo) ConnInfo { i.Trusted = true; return i }
	})
	laptop.Server.opts.Route = leading(func(string, string) (*Upstream, error) {
		up := broken(Fail(ReasonAbsent, io.EOF))
		up.Name = "the container blog"
		return up, nil
	})
	home := newHop(t, wayTo(laptop.addr), func(c *config) {
		c.info = func(i ConnInfo) ConnInfo { i.Hop = "edge-a"; return i } // which has passed on a client's TLS
	})
	res, body := rawDo(t, home, "GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: curl/8\r\nConnection: close\r\n\r\n")
	if res.StatusCode != 503 || !strings.Contains(body, "The container blog is not available right now") || !strings.Contains(body, "you -> edge-a -> home -> laptop -x- container blog (not available)\n") {
		t.Errorf("%d\n%s", res.StatusCode, body)
	}
	if q := home.request(t, 1); q.Status != 503 || q.Err != nil {
		t.Errorf("home reported %d, %v", q.Status, q.Err)
	}
}

// TestNoRoute checks what a request gets that leads nowhere.
func TestNoRoute(t *testing.T) {
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
	route := func(host, path string) (*Upstream, error) {
		switch host {
		case "example.org":
			if PathMatches("/api/", path) {
				return up, nil
			}
			return nil, ErrNoPath
		case "closed.example.org":
			return nil, ErrRejected
		case "nil.example.org":
			return nil, nil
		case "odd.example.org":
			return nil, errors.New("database of 10.0.0.1 is on fire")
		}
		return nil, fmt.Errorf("wrapped: %w", ErrNoHost)
	}
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, nil, func(c *config) { c.Route = leading(route) })
		c := p.client(t, h)
		misdirected := http.StatusNotFound
		if p.tls {
			misdirected = http.StatusMisdirectedRequest
		}
		for _, tc := range []struct {
			host, path string
			status     int
			want       string
		}{
			{"example.org", "/api", 200, "hello"},
			{"EXAMPLE.org:8443", "/api/x", 200, "hello"},
			{"example.org.", "/api/", 200, "hello"},
			{"example.org", "/apis", 404, "it has no page at this path"},
			{"other.example.org", "/", misdirected, "Nothing is served for other.example.org here"},
			{"nil.example.org", "/", misdirected, "Nothing is served for nil.example.org here"},
			{"192.0.2.1:80", "/", misdirected, "Nothing is served for 192.0.2.1 here"},
			{"[2001:db8::1]:80", "/", misdirected, "Nothing is served for 2001:db8::1 here"},
			{"closed.example.org", "/", 403, "closed.example.org does not let visitors in"},
			{"odd.example.org", "/", 500, "could not find out"},
		} {
			res, body := get(t, c, p.url(tc.path), func(r *http.Request) { r.Host = tc.host })
			if res.StatusCode != tc.status || !strings.Contains(body, tc.want) || strings.Contains(body, "10.0.0.1") {
				t.Errorf("%s%s: %d, want %d and %q in %q", tc.host, tc.path, res.StatusCode, tc.status, tc.want, body)
			}
		}
		if !strings.Contains(h.log.String(), "database of 10.0.0.1 is on fire") {
			t.Error("the log does not say why")
		}
	})
}

// TestCoalescing checks that a browser's HTTP/2 connection for one name of a
// certificate gets 421 for another one which this listener does not route, and
// the right upstream for one that it does.
func TestCoalescing(t *testing.T) {
	p := protocols[3]
	named := func(name string) *Upstream {
		return upstream(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, name) })
	}
	ups := map[string]*Upstream{"a.example.org": named("a"), "b.example.org": named("b")}
	h := p.hop(t, nil, func(c *config) {
		c.Route = leading(func(host, _ string) (*Upstream, error) {
			if up := ups[host]; up != nil {
				return up, nil
			}
			return nil, ErrNoHost
		})
	})
	c := p.client(t, h) // one connection, as its URL's host stays the same
	for host, want := range map[string]string{"a.example.org": "200 a", "b.example.org": "200 b", "c.example.org": "421 "} {
		res, body := get(t, c, p.url("/"), func(r *http.Request) { r.Host = host })
		if got := fmt.Sprint(res.StatusCode, " ", body); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	if q := h.request(t, 3); q.Conn.ID != "id-of-connection-0" {
		t.Error("not one connection")
	}
}

// TestPathMatches checks prefixes at segments' ends.
func TestPathMatches(t *testing.T) {
	for _, tc := range []struct {
		route, path string
		want        bool
	}{
		{"", "/", true}, {"/", "/", true}, {"/", "/x", true}, {"/", "*", false}, {"", "/x/y", true},
		{"/api/", "/api/", true}, {"/api/", "/api/x", true}, {"/api/", "/api", true}, {"/api/", "/apis", false}, {"/api/", "/ap", false},
		{"/api", "/api", true}, {"/api", "/api/x", true}, {"/api", "/apix", false}, {"/a/b", "/a/b/c", true}, {"/a/b", "/a", false}, {"/api", "/API", false},
	} {
		if got := PathMatches(tc.route, tc.path); got != tc.want {
			t.Errorf("PathMatches(%q, %q) = %t", tc.route, tc.path, got)
		}
	}
}

// TestPathForms checks that no way of writing a path leads around a route, and
// that the upstream gets the target as it was sent.
func TestPathForms(t *testing.T) {
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RequestURI+" "+r.Host) })
	var asked string
	h := newHop(t, nil, func(c *config) {
		c.Route = leading(func(host, path string) (*Upstream, error) {
			if asked == "" { // the first is what counts, others are asked for by the readings of a path
				asked = host + " " + path
			}
			return up, nil
		})
	})
	for target, want := range map[string][2]string{
		"/":                           {"a /", "/ a"},
		"/a/../secret/":               {"a /secret/", "/a/../secret/ a"},
		"/%73ecret/x":                 {"a /secret/x", "/%73ecret/x a"},
		"/x/%2e%2e/secret":            {"a /secret", "/x/%2e%2e/secret a"},
		"//secret//x":                 {"a /secret/x", "//secret//x a"},
		"/x/..":                       {"a /", "/x/.. a"},
		"/secret/.":                   {"a /secret/", "/secret/. a"},
		"/q?a=1;b=2&c=%zz&d=<":        {"a /q", "/q?a=1;b=2&c=%zz&d=< a"},
		"/q?":                         {"a /q", "/q? a"},
		"/a|b{}":                      {"a /a|b{}", "/a|b{} a"},
		"/caf%C3%A9%2Fx":              {"a /café/x", "/caf%C3%A9%2Fx a"},
		"http://Other.example:81/p?q": {"other.example /p", "/p?q Other.example:81"},
		"https://other.example/p":     {"other.example /p", "/p other.example"},
	} {
		asked = ""
		res, body := rawDo(t, h, "GET "+target+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		if res.StatusCode != 200 || asked != want[0] || body != want[1] {
			t.Errorf("%s: %d, routed as %q, want %q; upstream got %q, want %q", target, res.StatusCode, asked, want[0], body, want[1])
		}
	}
	if res, body := rawDo(t, h, "OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); res.StatusCode != 200 {
		t.Errorf("OPTIONS *: %d %q", res.StatusCode, body)
	}
	asked = ""
	if res, _ := rawDo(t, h, "GET / HTTP/1.0\r\n\r\n"); res.StatusCode != 200 || asked != " /" {
		t.Errorf("HTTP/1.0 without a host: %d, routed as %q", res.StatusCode, asked)
	}
}

// TestNoForwardProxy checks that CONNECT opens no tunnel.
func TestNoForwardProxy(t *testing.T) {
	dialled := make(chan bool, 1)
	up := &Upstream{Key: "x", Name: "laptop", Dial: func(context.Context) (net.Conn, error) { dialled <- true; return nil, io.EOF }}
	h := newHop(t, up)
	res, _ := rawDo(t, h, "CONNECT 192.0.2.1:25 HTTP/1.1\r\nHost: 192.0.2.1:25\r\n\r\n")
	if res.StatusCode != http.StatusMethodNotAllowed || len(dialled) != 0 {
		t.Errorf("%d, dialled %d times", res.StatusCode, len(dialled))
	}
}

// TestPlainHTTPOnTLS checks that a browser which asks a TLS port in plain HTTP
// is told so.
func TestPlainHTTPOnTLS(t *testing.T) {
	h := newHop(t, nil, overTLS(t, "example.org"))
	res, body := rawDo(t, h, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if res.StatusCode != 400 || !strings.Contains(body, "https://") {
		t.Errorf("%d %q", res.StatusCode, body)
	}
	if err := <-h.serveErr; err == nil || !strings.Contains(err.Error(), "plain HTTP") {
		t.Errorf("ServeConn: %v", err)
	}
	c, _ := raw(t, h, false)
	io.WriteString(c, "SSH-2.0-x\r\n")
	if err := <-h.serveErr; err == nil || !strings.Contains(err.Error(), "tls handshake") {
		t.Errorf("ServeConn: %v", err)
	}
}

// TestCurl asks with the client that people type.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		lacking(t, "curl")
	}
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%s %s %d bytes, %s\n", r.Method, r.Host, n, r.Header.Get("X-Forwarded-Proto"))
	})
	h := newHop(t, up, overTLS(t, "example.org"))
	dead := newHop(t, wayTo(closedPort(t)), overTLS(t, "example.org"))
	run := func(h *hop, args ...string) string {
		_, port, _ := net.SplitHostPort(h.addr)
		args = append([]string{"-sS", "-k", "--max-time", "15", "--resolve", "example.org:" + port + ":127.0.0.1", "https://example.org:" + port + "/"}, args...)
		out, err := exec.Command(curl, args...).CombinedOutput()
		if err != nil {
			t.Errorf("curl %v: %v\n%s", args, err, out)
		}
		return strings.ReplaceAll(string(out), port, "PORT")
	}
	big := t.TempDir() + "/big"
	if err := os.WriteFile(big, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"--http1.1", "--http2"} {
		if got := run(h, version, "-T", big, "-w", "%{http_version}"); got != "PUT example.org:PORT 3145728 bytes, https\n"+map[string]string{"--http1.1": "1.1", "--http2": "2"}[version] {
			t.Errorf("%s: %q", version, got)
		}
		if got := run(dead, version); !strings.HasPrefix(got, "502 Bad Gateway: laptop is not answering\n") || !strings.Contains(got, "path: you -> home -x- laptop (not answering)\n") {
			t.Errorf("%s: %q", version, got)
		}
	}
}

// TestConnectionOutlivesFailure: an upstream that does not answer a request without a body ends no connection of
// the client's.
func TestConnectionOutlivesFailure(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		c := p.client(t, p.hop(t, wayTo(closedPort(t))))
		for i := range 3 {
			var reused bool
			trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }}
			res, _ := get(t, c, p.url("/"), func(r *http.Request) { *r = *r.WithContext(httptrace.WithClientTrace(r.Context(), trace)) })
			if res.StatusCode != 502 || reused != (i > 0) {
				t.Errorf("request %d: %s, reused: %v", i, res.Status, reused)
			}
			time.Sleep(20 * time.Millisecond) // a GOAWAY may come behind the answer
		}
	})
}
