package server

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// headers is a backend that answers with the headers that it got.
func headers(t *testing.T) string {
	return httpBackend(t, func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(r.Header) })
}

// ask makes a request on a connection of its own. header has NAME: VALUE lines.
func ask(t *testing.T, addr, method, host, path string, preface []byte, lines ...string) (*http.Response, string) {
	t.Helper()
	c := dialTCP(t, addr)
	c.Write(preface)
	fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%s\r\n", method, path, host, strings.Join(append(lines, ""), "\r\n"))
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s %s%s: %v", method, host, path, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s%s: %v", method, host, path, err)
	}
	return res, string(body)
}

func from(client string) []byte {
	h := proxyheader.Header{}
	if client != "" {
		h = proxyheader.Header{Source: netip.MustParseAddrPort(client), Destination: netip.MustParseAddrPort("192.0.2.80:443")}
		if h.Source.Addr().Is6() {
			h.Destination = netip.MustParseAddrPort("[2001:db8:80::80]:443")
		}
	}
	return h.Append(nil)
}

func TestAllowHTTP(t *testing.T) {
	addr, app := freeAddr(t), headers(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: http
    allow: [192.0.2.0/24, "2001:db8::/32", 127.0.0.1]
    accept_proxy: { from: [127.0.0.1] }
    routes:
      - { host: all.test, forward: %[2]q }
      - { host: one.test, forward: %[2]q, allow: [192.0.2.7, me@vsq.cz] }
`, addr, app))
	for _, c := range []struct {
		host, client, xff string
		status            int
	}{
		{"all.test", "192.0.2.9:1", "", 200},
		{"all.test", "[2001:db8::9]:1", "", 200},
		{"all.test", "203.0.113.9:1", "", 403},
		{"all.test", "203.0.113.9:1", "192.0.2.9", 403}, // forged by the client of a hop that passes bytes on
		{"other.test", "203.0.113.9:1", "", 403},        // who may not come in learns nothing of routes
		{"one.test", "192.0.2.7:1", "", 200},
		{"one.test", "192.0.2.9:1", "", 403},
	} {
		lines := []string{"Accept: application/json"}
		if c.xff != "" {
			lines = append(lines, "X-Forwarded-For: "+c.xff)
		}
		res, body := ask(t, addr, "GET", c.host, "/", from(c.client), lines...)
		if res.StatusCode != c.status || c.status == 403 && !strings.Contains(body, "Access is not allowed") {
			t.Errorf("%+v: %d %s", c, res.StatusCode, body)
		}
	}
	// The hop says that the request is somebody's, and not whose.
	unknown := []byte("PROXY UNKNOWN\r\n")
	if res, _ := ask(t, addr, "GET", "all.test", "/", unknown); res.StatusCode != 403 {
		t.Errorf("a client that nobody knows: %d", res.StatusCode)
	}
	// An HTTP hop says it in the request.
	for xff, want := range map[string]int{"X-Forwarded-For: 192.0.2.7": 200, "X-Forwarded-For: 192.0.2.7, 203.0.113.1": 403, "X-Forwarded-For: unknown": 403} {
		if res, _ := ask(t, addr, "GET", "one.test", "/", nil, xff); res.StatusCode != want {
			t.Errorf("%s: %d, want %d", xff, res.StatusCode, want)
		}
	}
	if n := d.refused(notAllowed); n != 7 {
		t.Errorf("%d refusals are counted", n)
	}
	if !strings.Contains(d.log.String(), "203.0.113.9 (not a tailnet address)") {
		t.Error("the log does not say who it was")
	}
}

func TestAllowSplice(t *testing.T) {
	app := backend(t, echo)
	sniAddr, tcpAddr := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: sni
    accept_proxy: { from: [127.0.0.1] }
    allow: [192.0.2.0/24]
    routes: [{ sni: one.test, forward: %[3]q, allow: [192.0.2.7] }]
  - listen: %[2]q
    mode: tcp
    accept_proxy: { from: [127.0.0.1] }
    allow: [192.0.2.0/24]
    default: { forward: %[3]q, allow: [192.0.2.7] }
`, sniAddr, tcpAddr, app))
	hello := clientHello(t, "one.test")
	for client, ok := range map[string]bool{"192.0.2.7:1": true, "192.0.2.8:1": false, "203.0.113.9:1": false} {
		c := dialTCP(t, sniAddr)
		c.Write(append(from(client), hello...))
		got := make([]byte, 7)
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatalf("sni, %s: %v", client, err)
		}
		const fatal, accessDenied = 2, 49
		if denied := got[0] == 21 && got[5] == fatal && got[6] == accessDenied; denied == ok {
			t.Errorf("sni, %s: % x", client, got)
		}
		c = dialTCP(t, tcpAddr)
		c.Write(append(from(client), "hello!!"...))
		if n, err := io.ReadFull(c, got); (err == nil) != ok {
			t.Errorf("tcp, %s: %d bytes, %v", client, n, err)
		}
	}
	if n := d.refused(notAllowed); n != 4 {
		t.Errorf("%d refusals are counted", n)
	}
}

// TestAllowExpress: the short way from a hello to an address is no way around allow.
func TestAllowExpress(t *testing.T) {
	app := backend(t, echo)
	byRoute, byListener := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: sni
    routes:
      - { sni: closed.test, forward: %[3]q, allow: [192.0.2.7] }
      - { sni: open.test, forward: %[3]q, allow: [127.0.0.1] }
  - listen: %[2]q
    mode: sni
    allow: [192.0.2.0/24]
    default: { forward: %[3]q }
`, byRoute, byListener, app))
	for _, c := range []struct {
		addr, name string
		ok         bool
	}{{byRoute, "closed.test", false}, {byRoute, "open.test", true}, {byListener, "open.test", false}} {
		conn := dialTCP(t, c.addr)
		conn.Write(clientHello(t, c.name))
		got := make([]byte, 7)
		if _, err := io.ReadFull(conn, got); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		const alert = 21
		if (got[0] != alert) != c.ok {
			t.Errorf("%s at %s: % x", c.name, c.addr, got)
		}
	}
	if n := d.refused(notAllowed); n != 2 {
		t.Errorf("%d refusals are counted", n)
	}
}

// clientHello is what a TLS client says first.
func clientHello(t *testing.T, name string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: name}).Handshake()
	b.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 16<<10)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func TestBasicAuth(t *testing.T) {
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(file, fmt.Appendf(nil, "you:%s\n", hash), 0o600); err != nil {
		t.Fatal(err)
	}
	addr, app := freeAddr(t), headers(t)
	logFile := filepath.Join(t.TempDir(), "access.log")
	yaml := fmt.Sprintf(`
access_log: { file: %q, format: combined }
listeners:
  - listen: %q
    mode: http
    routes:
      - { host: inline.test, forward: %[3]q, basic_auth: { users: { me: %[4]q } } }
      - { host: file.test, forward: %[3]q, basic_auth: { file: %[5]q } }
`, logFile, addr, app, hash, file)
	d := start(t, yaml)
	basic := func(user, password string) string {
		r, _ := http.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, password)
		return "Authorization: " + r.Header.Get("Authorization")
	}
	for _, c := range []struct {
		host, authorization string
		status              int
	}{
		{"inline.test", "X: y", 401}, {"inline.test", "Authorization: Bearer x", 401}, {"inline.test", basic("me", "wrong"), 401}, {"inline.test", basic("you", "secret"), 401},
		{"inline.test", basic("me", "secret"), 200}, {"file.test", basic("you", "secret"), 200}, {"file.test", basic("me", "secret"), 401},
	} {
		res, body := ask(t, addr, "GET", c.host, "/", nil, c.authorization, "X-Forwarded-User: forged", "X_Forwarded_User: forged")
		if res.StatusCode != c.status || (res.Header.Get("WWW-Authenticate") != "") != (c.status == 401) {
			t.Errorf("%+v: %d %v", c, res.StatusCode, res.Header)
		}
		if c.status == 200 && (strings.Contains(body, "Authorization") || strings.Contains(body, "forged") || !strings.Contains(body, `"X-Forwarded-User":["`)) {
			t.Errorf("%+v: the upstream gets %s", c, body)
		}
	}
	if d.refused("wrong_password") != 3 || d.refused("no_password") != 2 {
		t.Errorf("counted: %v", d.Status().Refused)
	}
	eventually(t, "the access log says who it was", func() bool {
		b, _ := os.ReadFile(logFile)
		return strings.Count(string(b), "\n") == 7 && strings.Contains(string(b), `127.0.0.1 - me [`) && strings.Contains(string(b), `"GET / HTTP/1.1" 200 `)
	})
	os.WriteFile(file, []byte("you:secret\n"), 0o600)
	cfg := parse(t, yaml)
	if err := d.Reload(cfg); err == nil || !strings.Contains(err.Error(), "test.yaml:") || !strings.Contains(err.Error(), "htpasswd -B") {
		t.Errorf("a file that can't be used: %v", err)
	}
	if res, _ := ask(t, addr, "GET", "inline.test", "/", nil, basic("me", "secret")); res.StatusCode != 200 {
		t.Error("the failed reload changed something")
	}
}

func TestForwardAuth(t *testing.T) {
	var asked http.Header
	server := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Clone()
		if r.Header.Get("Cookie") == "" {
			w.Header().Set("Set-Cookie", "a=b")
			http.Redirect(w, r, "https://login.test/?rd=x", http.StatusFound)
			return
		}
		w.Header().Set("Remote-User", "me")
		w.Header().Set("Not-Copied", "x")
		w.Header().Add("Set-Cookie", "session=fresh")
		w.Header().Add("Set-Cookie", "csrf=c")
	})
	addr := freeAddr(t)
	app := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Set-Cookie", "own=o")
		if r.Header.Get("Upgrade") != "" {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "test/1")
			w.WriteHeader(http.StatusSwitchingProtocols)
			return
		}
		json.NewEncoder(w).Encode(r.Header)
	})
	d := start(t, fmt.Sprintf(`
listeners:
  - listen: %q
    mode: http
    routes:
      - { host: app.test, forward: %[2]q, forward_auth: { address: "http://%[3]s/verify", copy_headers: [Remote-User, Remote-Groups] } }
      - { host: gone.test, forward: %[2]q, forward_auth: { address: "http://%[4]s/verify" } }
      - { host: dead.test, forward: "127.0.0.1:9", forward_auth: { address: "http://%[3]s/verify" } }
`, addr, app, server, freeAddr(t)))

	res, body := ask(t, addr, "POST", "app.test", "/a%2Fb?c=d", nil, "Content-Length: 0")
	if res.StatusCode != 302 || res.Header.Get("Location") != "https://login.test/?rd=x" || res.Header.Get("Set-Cookie") != "a=b" {
		t.Errorf("%d %v %s", res.StatusCode, res.Header, body)
	}
	before := asked
	if res, _ := ask(t, addr, "HEAD", "app.test", "/", nil); res.StatusCode != 302 || asked.Get("X-Forwarded-Method") != "HEAD" {
		t.Errorf("HEAD: %d", res.StatusCode)
	}
	asked = before
	for name, want := range map[string]string{"X-Forwarded-Method": "POST", "X-Forwarded-Uri": "/a%2Fb?c=d", "X-Forwarded-Host": "app.test", "X-Forwarded-Proto": "http", "X-Forwarded-For": "127.0.0.1"} {
		if got := asked.Get(name); got != want {
			t.Errorf("the server is asked with %s %q, want %q", name, got, want)
		}
	}
	// Whatever the client sends, the server and the target hear the truth.
	res, body = ask(t, addr, "GET", "app.test", "/", nil, "Cookie: s=1", "Remote-User: root", "Remote_User: root", "remote-groups: wheel", "X-Forwarded-For: 6.6.6.6", "Connection: X-Forwarded-For, Remote-User")
	var got http.Header
	if err := json.Unmarshal([]byte(body), &got); err != nil || res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	if len(got["Remote-User"]) != 1 || got.Get("Remote-User") != "me" || strings.Contains(body, "root") || strings.Contains(body, "wheel") || got.Get("Not-Copied") != "" {
		t.Errorf("the target gets %s", body)
	}
	if asked.Get("X-Forwarded-For") != "127.0.0.1" || asked.Get("Remote-Groups") != "" {
		t.Errorf("the server is asked with %v", asked)
	}
	// A session that is refreshed on the way reaches the client with whatever answer.
	for _, c := range []struct {
		host, line string
		status     int
		own        string
	}{{"app.test", "X: y", 200, "own=o "}, {"dead.test", "X: y", 502, ""}} {
		res, _ := ask(t, addr, "GET", c.host, "/", nil, "Cookie: s=1", c.line)
		if got := strings.Join(res.Header["Set-Cookie"], " "); res.StatusCode != c.status || got != c.own+"session=fresh csrf=c" {
			t.Errorf("%s: %d, the client is given the cookies %q", c.host, res.StatusCode, got)
		}
	}
	conn := dialTCP(t, addr)
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nCookie: s=1\r\nConnection: Upgrade\r\nUpgrade: test/1\r\n\r\n")
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 101 || len(res.Header["Set-Cookie"]) != 3 {
		t.Errorf("an upgrade: %v, %v", res, err)
	}
	res, body = ask(t, addr, "GET", "gone.test", "/", nil)
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "sign-in service is not answering") {
		t.Errorf("a server that is gone: %d %s", res.StatusCode, body)
	}
	if d.refused("auth_server") != 1 || d.refused("forward_auth") != 2 {
		t.Errorf("counted: %v", d.Status().Refused)
	}
}

// TestForwardAuthCondition: what a visitor asks of the target's answer is not asked of the auth server, whose
// file would be as the visitor has it, or too short.
func TestForwardAuthCondition(t *testing.T) {
	target, at := witness(t), time.Unix(1_000_000_000, 0)
	auth := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Etag", `"theirs"`)
		http.ServeContent(w, r, "", at, strings.NewReader("yes"))
	})
	before, after := at.Add(-time.Hour).UTC().Format(http.TimeFormat), at.Add(time.Hour).UTC().Format(http.TimeFormat)
	for _, w := range wires {
		listen := []string{freeAddr(t), freeAddrAt(t, "::1")}
		start(t, readingConfig(t, fmt.Sprintf(`forward_auth: { address: "http://%s/" }`, auth), w, listen, target))
		for _, header := range [][][2]string{
			{{"If-None-Match", "*"}}, {{"If-None-Match", `"theirs"`}}, {{"If-Modified-Since", after}},
			{{"If-Match", `"ours"`}}, {{"If-Unmodified-Since", before}}, {{"Range", "bytes=100-"}},
			{{"Range", "bytes=100-"}, {"If-Range", `"theirs"`}},
		} {
			for _, addr := range listen {
				m := message{target: "/admin", host: "app.test", header: header}
				status, body := w.send(t, addr, m)
				for _, kv := range header {
					if status != "200" || !strings.Contains(body, "\r\n"+kv[0]+": "+kv[1]+"\r\n") {
						t.Errorf("%s, %q: %s, the target got %q", w.name, header, status, body)
					}
				}
			}
		}
	}
}

// TestForwardAuthNonsense: an auth server's answer that is no final answer of HTTP lets nobody in, and reaches
// nobody.
func TestForwardAuthNonsense(t *testing.T) {
	target := witness(t)
	for _, answer := range []string{
		"101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket", "20 Odd", "2000 Odd",
		"099 Odd", "000 Odd", "304 Not Modified", "412 Precondition Failed", "416 Range Not Satisfiable",
	} {
		auth := backend(t, func(c net.Conn) {
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			br := bufio.NewReader(c)
			for line := ""; line != "\r\n"; {
				var err error
				if line, err = br.ReadString('\n'); err != nil {
					return
				}
			}
			fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n", answer)
		})
		for _, w := range wires {
			listen := []string{freeAddr(t), freeAddrAt(t, "::1")}
			d := start(t, readingConfig(t, fmt.Sprintf(`forward_auth: { address: "http://%s/" }`, auth), w, listen, target))
			for _, addr := range listen {
				if status, body := w.send(t, addr, message{target: "/admin", host: "app.test"}); status != "502" {
					t.Errorf("%s, %.10q: %s %q", w.name, answer, status, body)
				}
			}
			if log := d.log.String(); strings.Contains(log, "panic") {
				t.Errorf("%s, %.10q: %s", w.name, answer, log)
			}
		}
	}
}

// TestForwardAuthHost: the auth server is asked about the host that is routed, and not about another one that a hop which is
// believed was told by its client.
func TestForwardAuthHost(t *testing.T) {
	asked := make(chan http.Header, 1)
	server := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { asked <- r.Header })
	addr, app := freeAddr(t), headers(t)
	start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, forward_auth: { address: "http://%s/" } } }]`, addr, app, server))
	for _, line := range []string{"X-Forwarded-Host: public.test", "X_Forwarded_Host: public.test", "x-forwarded-host: app.test, public.test"} {
		res, body := ask(t, addr, "GET", "app.test", "/", nil, "X-Forwarded-For: 192.0.2.1", line)
		if h := <-asked; res.StatusCode != 200 || h.Get("X-Forwarded-For") != "192.0.2.1, 127.0.0.1" || len(h["X-Forwarded-Host"]) != 1 || h.Get("X-Forwarded-Host") != "app.test" {
			t.Errorf("%s: %d %s, the server was asked with %v", line, res.StatusCode, body, h)
		}
	}
}

// TestTailscaleHeaders checks that nobody can bring their own.
func TestTailscaleHeaders(t *testing.T) {
	addr, app := freeAddr(t), headers(t)
	start(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q } }]`, addr, app))
	for _, preface := range [][]byte{nil, from("192.0.2.7:1"), from("100.101.102.103:1")} {
		_, body := ask(t, addr, "GET", "a.test", "/", preface, "Tailscale-User-Login: root@vsq.cz", "tailscale_user_login: root@vsq.cz", "Tailscale-User-Name: root", "X-Request-Id: mine-and-short")
		if strings.Contains(strings.ToLower(body), "tailscale-user") || strings.Contains(body, "root") {
			t.Errorf("the upstream gets %s", body)
		}
		if !strings.Contains(body, `"X-Request-Id":["mine-and-short"]`) {
			t.Errorf("the request's id is lost: %s", body)
		}
	}
	if got, want := headerText("Jürgen"), "=?utf-8?q?J=C3=BCrgen?="; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestForwardLocalhost: the server of a forward_auth may be called by a localhost name, as a target may.
func TestForwardLocalhost(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners: [{ listen: %q, mode: http, default: { forward: "app.localhost:%[2]s", forward_auth: { address: "http://auth.localhost:%[2]s/verify" } } }]`,
		addr, portOf(server.Listener.Addr().String())))
	if res, body := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 200 {
		t.Errorf("%d: %s", res.StatusCode, body)
	}
}

// TestForwardTargets checks that servers on the tailnet and in containers are
// dialled as targets are: here nobody can be asked, and the page says so.
func TestForwardTargets(t *testing.T) {
	t.Setenv("TAILSPLICE_TAILSCALED_SOCKET", filepath.Join(t.TempDir(), "none.sock"))
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [{ listen: %q, mode: http, default: { forward: "127.0.0.1:1", forward_auth: { address: "tailnet://auth:9091/verify" } } }]`, addr))
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 503 {
		t.Errorf("%d", res.StatusCode)
	}
	if !strings.Contains(d.log.String(), "no tailscaled") {
		t.Error("the log does not say why")
	}
}
