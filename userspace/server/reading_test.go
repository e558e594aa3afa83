package server

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// wire is a way to send a request byte by byte.
type wire struct {
	name    string
	h2, tls bool
	sni     string // the server name in the hello; "" is app.test
}

var wires = []wire{{"h1", false, false, ""}, {"h2c", true, false, ""}, {"h1 TLS", false, true, ""}, {"h2 TLS", true, true, ""}}

// message is a request, whatever is wrong with it. In HTTP/2 target is :path and host is :authority.
type message struct {
	method, target, host string
	noHost               bool // no Host, no :authority
	scheme               string
	version              string // of HTTP/1: "" is 1.1
	header, trailer      [][2]string
}

// send sends m on a connection of its own and returns the status of the answer, or "refused" where there is
// none, and the body.
func (w wire) send(t *testing.T, addr string, m message) (status, body string) {
	t.Helper()
	var c net.Conn = dialTCP(t, addr)
	c.SetDeadline(time.Now().Add(time.Minute))
	defer c.Close()
	if m.method == "" {
		m.method = "GET"
	}
	if w.tls {
		next := "http/1.1"
		if w.h2 {
			next = "h2"
		}
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: cmp.Or(w.sni, "app.test"), NextProtos: []string{next}})
	}
	if w.h2 {
		return sendHTTP2(t, c, w, m)
	}
	if m.version == "" {
		m.version = "1.1"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/%s\r\n", m.method, m.target, m.version)
	if !m.noHost {
		fmt.Fprintf(&b, "Host: %s\r\n", m.host)
	}
	for _, kv := range m.header {
		fmt.Fprintf(&b, "%s: %s\r\n", kv[0], kv[1])
	}
	b.WriteString("Connection: close\r\n")
	if m.trailer != nil {
		for _, kv := range m.trailer {
			fmt.Fprintf(&b, "Trailer: %s\r\n", kv[0])
		}
		b.WriteString("Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n")
		for _, kv := range m.trailer {
			fmt.Fprintf(&b, "%s: %s\r\n", kv[0], kv[1])
		}
	}
	b.WriteString("\r\n")
	c.Write(b.Bytes())
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: m.method})
	if err != nil {
		return "refused", ""
	}
	text, _ := io.ReadAll(res.Body)
	return fmt.Sprint(res.StatusCode), string(text)
}

func sendHTTP2(t *testing.T, c net.Conn, w wire, m message) (status, body string) {
	io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	f.WriteSettings()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	scheme := m.scheme
	if scheme == "" {
		scheme = map[bool]string{false: "http", true: "https"}[w.tls]
	}
	fields := [][2]string{{":method", m.method}, {":scheme", scheme}, {":path", m.target}}
	if !m.noHost {
		fields = append(fields, [2]string{":authority", m.host})
	}
	for _, kv := range slices.Concat(fields, m.header) {
		enc.WriteField(hpack.HeaderField{Name: strings.ToLower(kv[0]), Value: kv[1]})
	}
	for _, kv := range m.trailer {
		enc.WriteField(hpack.HeaderField{Name: "trailer", Value: kv[0]})
	}
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: m.trailer == nil})
	if m.trailer != nil {
		f.WriteData(1, false, []byte("hi"))
		block.Reset()
		for _, kv := range m.trailer {
			enc.WriteField(hpack.HeaderField{Name: strings.ToLower(kv[0]), Value: kv[1]})
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
	}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return "refused", body
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			if v := frame.PseudoValue("status"); v != "" {
				status = v
			}
			if frame.StreamEnded() {
				return status, body
			}
		case *http2.DataFrame:
			body += string(frame.Data())
			f.WriteWindowUpdate(0, max(1, uint32(len(frame.Data()))))
			if frame.StreamEnded() {
				return status, body
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "refused", body
		}
	}
}

// witness is a target that answers with the bytes of the request, head and trailers.
func witness(t *testing.T) string {
	return backend(t, func(c net.Conn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		br, seen := bufio.NewReader(c), ""
		section := func() {
			for {
				line, err := br.ReadString('\n')
				seen += line
				if err != nil || line == "\r\n" {
					return
				}
			}
		}
		section()
		if strings.Contains(strings.ToLower(seen), "transfer-encoding: chunked") {
			for !strings.Contains(seen, "\r\n0\r\n") {
				line, err := br.ReadString('\n')
				if seen += line; err != nil {
					return
				}
			}
			section()
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(seen), seen)
	})
}

// gives says whether a target that is asked so, as body has it from a witness, might give what is at host
// and below prefix: it obeys an address in the request-target, takes what it can for the host, and reads the
// path in all ways that there are.
func gives(body, host, prefix string) bool {
	line, rest, _ := strings.Cut(body, "\r\n")
	target := strings.Fields(line)
	if len(target) != 3 {
		return true
	}
	p, _, _ := strings.Cut(target[1], "?")
	hosts := []string{}
	for l := range strings.SplitSeq(rest, "\r\n") {
		if name, value, ok := strings.Cut(l, ":"); ok && strings.EqualFold(name, "host") {
			hosts = append(hosts, strings.TrimSpace(value))
		}
	}
	if before, after, ok := strings.Cut(p, "://"); ok && !strings.Contains(before, "/") {
		h, rest, _ := strings.Cut(after, "/")
		hosts, p = append(hosts, h), "/"+rest
	}
	if !slices.ContainsFunc(hosts, func(h string) bool {
		h = strings.ToLower(h[strings.LastIndex(h, "@")+1:])
		h, _, _ = strings.Cut(h, ":")
		return strings.Trim(h, "[].") == host
	}) {
		return false
	}
	if rest, ok := strings.CutPrefix(strings.ReplaceAll(p, `\`, "/"), "//"); ok {
		for _, rest := range []string{rest, strings.TrimLeft(rest, "/")} {
			if _, rest, _ = strings.Cut(rest, "/"); below(rest, prefix) {
				return true
			}
		}
	}
	return below(p, prefix)
}

func below(p, prefix string) bool {
	if once, err := url.PathUnescape(p); err == nil && strings.ContainsAny(once, "%?#") { // it is decoded twice
		cut, _, _ := strings.Cut(strings.ReplaceAll(once, "#", "?"), "?")
		if belowOnce(cut, prefix) || belowOnce(once, prefix) {
			return true
		}
	}
	return belowOnce(p, prefix)
}

func belowOnce(p, prefix string) bool {
	p = strings.NewReplacer("%5c", "/", "%5C", "/", `\`, "/").Replace(p)
	names := strings.Split(p, "/")
	for i := range names {
		names[i], _, _ = strings.Cut(names[i], ";")
	}
	for _, p := range []string{p, strings.Join(names, "/")} {
		decoded, _ := url.PathUnescape(p)
		inOrder := func(p string) string { // a name between two slashes is empty, and one that .. takes back
			return (&url.URL{Scheme: "x", Host: "x", Path: "/"}).ResolveReference(&url.URL{Path: "/" + strings.TrimLeft(p, "/")}).Path
		}
		for _, p := range []string{"/" + decoded, path.Clean("/" + p), path.Clean("/" + decoded), inOrder(p), inOrder(decoded)} {
			p = strings.ToLower(strings.ToUpper(strings.TrimLeft(p, "/"))) // which some servers take for the same
			if strings.HasPrefix("/"+p+"/", prefix) {
				return true
			}
		}
	}
	return false
}

// guards are the ways to keep a stranger out of a route. The auth server of forward_auth says no.
func guards(t *testing.T) map[string]string {
	ca, _ := certificate(t, "client")
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	writeCA(t, caFile, ca)
	hash, err := bcrypt.GenerateFromPassword([]byte("right"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	no := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
	return map[string]string{
		"allow":               `allow: [192.0.2.1]`,
		"basic_auth":          fmt.Sprintf(`basic_auth: { users: { me: %q } }`, hash),
		"forward_auth":        fmt.Sprintf(`forward_auth: { address: "http://%s/" }`, no),
		"client_certificates": fmt.Sprintf(`client_certificates: { ca: %q }`, caFile),
		"reject":              "",
	}
}

// readingConfig has a host that is guarded whole, one with a guarded path, a guarded path below one that is
// stripped, and a default.
func readingConfig(t *testing.T, guard string, w wire, listen []string, target string) string {
	mode, guarded := "mode: http", fmt.Sprintf("forward: %q, %s", target, guard)
	if guard == "" {
		guarded = "reject: true"
	}
	if w.tls {
		cert, _ := certificate(t, "app.test", "secret.test")
		c, k := writePair(t, cert)
		mode = fmt.Sprintf("mode: https\n    certificates: [ { files: { cert: %q, key: %q } } ]", c, k)
	}
	return fmt.Sprintf(`
listeners:
  - name: web
    listen: [%q, %q]
    %s
    routes:
      - { host: secret.test, %s }
      - { host: app.test, path: /admin, %[4]s }
      - { host: app.test, path: /app/private, %[4]s }
      - { host: app.test, path: /key, %[4]s }
      - { host: app.test, path: /app, forward: %[5]q, strip_prefix: true, request_headers: { set: { Host: stripped.test } } }
      - { host: app.test, path: /sub, forward: %[5]q, add_prefix: /below, request_headers: { set: { Host: below.test } } }
      - { host: app.test, forward: %[5]q }
    default: { forward: %[5]q }
`, listen[0], listen[1], mode, guarded, target)
}

// odd are requests that name something guarded in odd ways. refused are those that nobody may be asked.
var odd = []struct {
	message
	only    string // "h1" or "h2"
	refused bool
}{
	{message: message{target: "/admin"}}, {message: message{target: "/admin/x?y"}}, {message: message{target: "/", host: "secret.test"}},
	{message: message{target: "/app/private/x"}},
	// Request-targets that are none.
	{message: message{target: "x:http://app.test/admin"}, refused: true}, {message: message{target: "x:http://secret.test/"}, refused: true},
	{message: message{target: "x:/admin"}, refused: true}, {message: message{target: "x:admin"}, refused: true}, {message: message{target: "http:/admin"}, refused: true},
	{message: message{target: "http:admin"}, refused: true}, {message: message{target: "http:///admin"}, refused: true}, {message: message{target: "https:///admin", host: "app.test"}, refused: true},
	{message: message{target: "ftp://app.test/admin"}, refused: true}, {message: message{target: "app.test:443"}, refused: true}, {message: message{target: "secret.test:80"}, refused: true},
	{message: message{target: "443"}, refused: true}, {message: message{target: "admin"}, refused: true}, {message: message{target: "*"}, refused: true},
	{message: message{target: "*", method: "POST"}, refused: true}, {message: message{target: "?x"}, refused: true}, {message: message{target: "/open#/../admin"}, refused: true},
	{message: message{target: "/admin%00/../open"}, refused: true}, {message: message{target: "/open%00"}, refused: true}, {message: message{target: "/%zz"}, refused: true},
	{message: message{target: "x:http://app.test/admin", method: "OPTIONS"}, refused: true}, {message: message{target: "*/admin", method: "OPTIONS"}, refused: true},
	{message: message{target: "http://app.test@secret.test/"}, refused: true}, {message: message{target: "http://me:pw@app.test/admin"}, refused: true},
	{message: message{target: "http://secret.test:80:80/"}, refused: true}, {message: message{target: "http://[secret.test]/"}, refused: true}, {message: message{target: "http://secret%2etest/"}, refused: true},
	{message: message{target: "http://?x"}, refused: true},
	{message: message{target: "http://app.test/admin"}, only: "h2", refused: true}, {message: message{target: "/a /admin"}, only: "h2", refused: true},
	{message: message{target: "/open HTTP/1.1\r\nHost: secret.test\r\nX: y"}, only: "h2", refused: true}, {message: message{target: ""}, only: "h2", refused: true},
	{message: message{target: "/", method: "GET /admin"}, only: "h2", refused: true}, {message: message{target: "/", method: `GET"`}, only: "h2", refused: true},
	// A whole address.
	{message: message{target: "http://app.test/admin"}, only: "h1"}, {message: message{target: "HTTP://APP.test:80/admin?x=1"}, only: "h1"}, {message: message{target: "https://secret.test"}, only: "h1"},
	{message: message{target: "http://secret.test/", host: "app.test"}, only: "h1"}, {message: message{target: "http://secret.test?x", host: "app.test"}, only: "h1"},
	{message: message{target: "http://app.test/open", host: "secret.test"}, only: "h1"},
	// OPTIONS *, and no host.
	{message: message{target: "*", method: "OPTIONS", host: "secret.test"}}, {message: message{target: "/", noHost: true, version: "1.0"}, only: "h1"},
	{message: message{target: "/", noHost: true}, refused: true}, {message: message{target: "http://secret.test/", noHost: true, version: "1.0"}, only: "h1"},
	// Paths that servers read in more than one way.
	{message: message{target: "/%61dmin"}}, {message: message{target: "//admin"}}, {message: message{target: "/./admin"}}, {message: message{target: "/open/../admin"}}, {message: message{target: "/open/%2e%2e/admin"}},
	{message: message{target: "/admin/..%2fopen"}, refused: true}, {message: message{target: "/admin/../open"}, refused: true}, {message: message{target: "/open/..%2fadmin"}},
	{message: message{target: "/admin;x"}, refused: true}, {message: message{target: "/open/..;/admin"}, refused: true}, {message: message{target: "/;x/admin"}, refused: true},
	{message: message{target: "/open/..%5cadmin"}, refused: true}, {message: message{target: `/open\..\admin`}, refused: true}, {message: message{target: `/\x/admin`}, refused: true},
	{message: message{target: "/admin%5cx"}, refused: true}, {message: message{target: "//x/admin"}, refused: true}, {message: message{target: "/open/..%3b/admin"}},
	{message: message{target: "///x/admin"}, refused: true}, {message: message{target: `/\/x/admin`}, refused: true}, {message: message{target: "/////x/admin"}, refused: true},
	{message: message{target: "/x/../admin//../open"}, refused: true}, {message: message{target: "/x/../admin/%2e%2e/open"}, refused: true}, {message: message{target: "/x/..%2fadmin%2f%2f../open"}, refused: true},
	{message: message{target: "/x/%252e%252e/admin"}, refused: true}, {message: message{target: "/%2561dmin"}, refused: true}, {message: message{target: "/admin%3fx"}, refused: true}, {message: message{target: "/admin%23x"}, refused: true},
	{message: message{target: "/open/100%25"}}, {message: message{target: "/open/why%3F"}}, {message: message{target: "/open/%2523"}},
	{message: message{target: "/open/a//../b"}}, {message: message{target: "/open/%2e%2e/b"}}, {message: message{target: "/.well-known//x"}}, {message: message{target: "///open"}},
	{message: message{target: "/app/x/..%2fprivate"}}, {message: message{target: "/app/..;/admin"}, refused: true}, {message: message{target: "/app/;x/private"}, refused: true},
	{message: message{target: "/app%2fprivate"}}, {message: message{target: "/app//private"}},
	{message: message{target: "/x/%2e%2e/admin%252f.."}, refused: true}, {message: message{target: "/x/../admin%252f..%252fopen"}, refused: true}, {message: message{target: "/./open/100%25"}},
	{message: message{target: "/.%2fapp/private%252f.."}, refused: true}, {message: message{target: "/./app/private%252f../x"}, refused: true}, {message: message{target: "//app/private%252f."}, refused: true},
	{message: message{target: "/sub/..;/..;/sub/x"}, refused: true}, {message: message{target: "/sub/..%2f../sub/x"}}, {message: message{target: `/sub/..\..\sub\x`}, refused: true}, {message: message{target: "/sub/../../sub/x"}},
	// Paths in another case. The last begins with a letter that becomes a K.
	{message: message{target: "/Admin"}}, {message: message{target: "/ADMIN/x"}}, {message: message{target: "/%41dmin"}},
	{message: message{target: "/app/Private"}}, {message: message{target: "/APP/private"}},
	{message: message{target: "/open/../aDmin"}}, {message: message{target: "/Admin;x"}, refused: true},
	{message: message{target: "/%E2%84%AAey"}},
	// Hosts that are none.
	{message: message{target: "/", host: "secret.test:80:80"}, refused: true}, {message: message{target: "/", host: "secret.test:1:2"}, refused: true}, {message: message{target: "/", host: "secret.test:80:"}, refused: true},
	{message: message{target: "/", host: "secret.test:"}, refused: true}, {message: message{target: "/", host: "secret.test:0"}, refused: true}, {message: message{target: "/", host: "secret.test:65536"}, refused: true},
	{message: message{target: "/", host: "secret.test:+80"}, refused: true}, {message: message{target: "/", host: "secret.test:8a"}, refused: true}, {message: message{target: "/", host: "secret.test:http"}, refused: true},
	{message: message{target: "/", host: "secret.test:000080"}, refused: true}, {message: message{target: "/", host: "secret.test.."}, refused: true}, {message: message{target: "/", host: ".secret.test"}, refused: true},
	{message: message{target: "/", host: "me@secret.test"}, refused: true}, {message: message{target: "/", host: "app.test@secret.test"}, refused: true}, {message: message{target: "/", host: "[secret.test]"}, refused: true},
	{message: message{target: "/", host: "[secret.test]:80"}, refused: true}, {message: message{target: "/", host: "[::1"}, refused: true}, {message: message{target: "/", host: "::1"}, refused: true},
	{message: message{target: "/", host: "[::1]80"}, refused: true}, {message: message{target: "/", host: "[::1%25lo]"}, refused: true}, {message: message{target: "/", host: "[127.0.0.1]"}, refused: true},
	{message: message{target: "/", host: "secret%2etest"}, refused: true}, {message: message{target: "/", host: "s\xc3\xa9cret.test"}, refused: true}, {message: message{target: "/", host: "secret.test,app.test"}, refused: true},
	{message: message{target: "/", host: "secret.test/"}, refused: true}, {message: message{target: "/", host: "secret.test;x"}, refused: true}, {message: message{target: "/", host: "*.test"}, refused: true},
	{message: message{target: "/", host: "secret.test app.test"}, refused: true}, {message: message{target: "/", host: ":80"}, refused: true}, {message: message{target: "/", host: "."}, refused: true},
	{message: message{target: "/", host: strings.Repeat("a.", 127) + "test"}, refused: true},
	{message: message{target: "/", host: "SECRET.test"}}, {message: message{target: "/", host: "secret.test."}}, {message: message{target: "/", host: "secret.test:8443"}}, {message: message{target: "/", host: "Secret.Test.:1"}},
	{message: message{target: "/", host: "[::1]:80"}}, {message: message{target: "/", host: "127.0.0.1"}}, {message: message{target: "/", host: "under_score.test"}},
	// Two hosts.
	{message: message{target: "/", header: [][2]string{{"Host", "secret.test"}}}, refused: true}, {message: message{target: "/", header: [][2]string{{"Host", "app.test"}, {"Host", "secret.test"}}}, refused: true},
	{message: message{target: "/", noHost: true, header: [][2]string{{"Host", "secret.test"}, {"Host", "app.test"}}}, refused: true},
	{message: message{target: "/", noHost: true, header: [][2]string{{"Host", "app.test"}, {"Host", "app.test"}}}, refused: true},
	{message: message{target: "/", host: "secret.test", header: [][2]string{{"Host", "app.test"}}}, refused: true}, {message: message{target: "/", host: "app.test", header: [][2]string{{"Host", "app.test:80"}}}, refused: true},
	{message: message{target: "/", noHost: true, header: [][2]string{{"Host", "secret.test"}}}}, {message: message{target: "/", header: [][2]string{{":authority", "secret.test"}}}, only: "h2", refused: true},
	// Schemes.
	{message: message{target: "/admin", scheme: "ftp"}, only: "h2", refused: true}, {message: message{target: "/admin", scheme: "HTTPS"}, only: "h2", refused: true},
	{message: message{method: "CONNECT", target: "secret.test:80", host: "secret.test:80"}, only: "h1"}, {message: message{method: "PRI", target: "*"}, refused: true},
}

// TestOneReading sends requests that can be read in more than one way to listeners with guarded hosts and
// paths. No guard lets the stranger in, so whatever a target was asked must be nothing guarded, by all that
// it may read into it.
func TestOneReading(t *testing.T) {
	target := witness(t)
	for name, guard := range guards(t) {
		for _, w := range wires {
			if name == "client_certificates" && !w.tls {
				continue
			}
			t.Run(name+"/"+w.name, func(t *testing.T) {
				t.Parallel()
				listen := []string{freeAddr(t), freeAddrAt(t, "::1")}
				d := start(t, readingConfig(t, guard, w, listen, target))
				for _, addr := range listen {
					if status, body := w.send(t, addr, message{target: "/open?x", host: "app.test"}); status != "200" || !strings.HasPrefix(body, "GET /open?x HTTP/1.1\r\nHost: app.test\r\n") {
						t.Fatalf("what is open: %s %q", status, body)
					}
					for _, c := range odd {
						if c.host == "" && !c.noHost {
							c.host = "app.test"
						}
						if c.only != "" && w.h2 != (c.only == "h2") {
							continue
						}
						status, body := w.send(t, addr, c.message)
						if status == "200" && (gives(body, "secret.test", "/") || gives(body, "app.test", "/admin/") || gives(body, "app.test", "/key/") || gives(body, "app.test", "/app/private/") || gives(body, "stripped.test", "/private/") || gives(body, "below.test", "/sub/")) {
							t.Errorf("%v: a target was asked for what is guarded: %q", c.message, body)
						}
						if refused := status == "400" || status == "refused"; c.refused && !refused {
							t.Errorf("%v: %s, want it refused", c.message, status)
						} else if !c.refused && refused {
							t.Errorf("%v: refused, %s", c.message, body)
						}
					}
					if w.tls && w.h2 {
						// The scheme is the connection's.
						if status, body := w.send(t, addr, message{target: "/open", host: "app.test", scheme: "http"}); status != "200" || !strings.Contains(body, "\r\nX-Forwarded-Proto: https\r\n") {
							t.Errorf(":scheme http within TLS: %s %q", status, body)
						}
					}
				}
				want := []string{"bad_target", "bad_host", "bad_path"}
				if w.h2 {
					want = append(want, "host_mismatch")
				}
				for _, reason := range want {
					eventually(t, reason+" is counted and logged", func() bool { return d.refused(reason) > 0 && d.log.Count("reason="+reason) > 0 })
				}
			})
		}
	}
}

// TestOneReadingByAll compares what routes, the auth server, the access log and the target learn of a
// request: it is the same, and what the client sent. Only the auth server, which compares hosts, hears the
// one spelling that routes are looked up by.
func TestOneReadingByAll(t *testing.T) {
	target := witness(t)
	var mu sync.Mutex
	var told []string
	auth := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		_, forwarded, _ := strings.Cut(r.Header.Get("Forwarded"), ";host=")
		forwarded, _, _ = strings.Cut(forwarded, ";")
		host := r.Header.Get("X-Forwarded-Host")
		if strings.Trim(forwarded, `"`) != host {
			host += " or " + forwarded
		}
		told = append(told, r.Header.Get("X-Forwarded-Method")+" "+host+" "+r.Header.Get("X-Forwarded-Uri"))
	})
	for _, w := range wires {
		t.Run(w.name, func(t *testing.T) {
			listen, file := []string{freeAddr(t), freeAddrAt(t, "::1")}, filepath.Join(t.TempDir(), "access.log")
			guard := fmt.Sprintf(`forward_auth: { address: "http://%s/" }, request_headers: { set: { Guarded: "yes" } }`, auth)
			d := start(t, readingConfig(t, guard, w, listen, target)+fmt.Sprintf("access_log: { file: %q }\n", file))
			for _, c := range []struct {
				message
				only, sent, host string
			}{
				{message: message{target: "/admin?x=1"}, sent: "/admin?x=1"},
				{message: message{target: "http://app.test/admin?x=1"}, only: "h1", sent: "/admin?x=1"},
				{message: message{target: "HTTP://APP.test:80/admin"}, only: "h1", sent: "/admin", host: "APP.test:80"},
				{message: message{target: "http://secret.test", host: "app.test"}, only: "h1", sent: "/", host: "secret.test"},
				{message: message{target: "http://secret.test?y", host: "app.test"}, only: "h1", sent: "/?y", host: "secret.test"},
				{message: message{target: "/admin/a%2Fb|c{}^\"`<>\\d"}, sent: "/admin/a%2Fb|c{}^\"`<>\\d"},
				{message: message{target: "/admin/\xc3\xa9%2f\xff?\xe9\""}, sent: "/admin/\xc3\xa9%2f\xff?\xe9\""},
				{message: message{target: "/admin?"}, sent: "/admin?"}, {message: message{target: "/admin?a;b=%zz&c??"}, sent: "/admin?a;b=%zz&c??"},
				{message: message{target: "/open/../admin/%2e/x"}, sent: "/open/../admin/%2e/x"},
				{message: message{target: "//admin//x|%7C"}, sent: "//admin//x%7C%7C"}, // see setTarget
				{message: message{target: "/%61dmin/x"}, sent: "/%61dmin/x"},
				{message: message{target: "/", host: "secret.test."}, sent: "/", host: "secret.test."},
				{message: message{target: "/", host: "Secret.TEST.:81"}, sent: "/", host: "Secret.TEST.:81"},
				{message: message{target: "/admin", host: "App.test"}, sent: "/admin", host: "App.test"},
				{message: message{target: "*", method: "OPTIONS", host: "secret.test"}, sent: "*", host: "secret.test"},
				{message: message{target: "/", method: "OPTIONS", host: "secret.test:8080"}, sent: "/", host: "secret.test:8080"},
			} {
				if c.only == "h1" && w.h2 {
					continue
				}
				if c.method == "" {
					c.method = "GET"
				}
				if c.message.host == "" {
					c.message.host = "app.test"
				}
				if c.host == "" {
					c.host = c.message.host
				}
				for _, addr := range listen {
					mu.Lock()
					told = nil
					mu.Unlock()
					before, _ := os.ReadFile(file)
					status, body := w.send(t, addr, c.message)
					head := c.method + " " + c.sent + " HTTP/1.1\r\nHost: " + c.host + "\r\n"
					if status != "200" || !strings.HasPrefix(body, head) || !strings.Contains(body, "\r\nGuarded: yes\r\n") || !strings.Contains(body, "\r\nX-Forwarded-Host: "+c.host+"\r\n") {
						t.Errorf("%v: %s, the target got %q; want %q", c.message, status, body, head)
						continue
					}
					sent := c.sent
					if strings.HasPrefix(sent, "//") {
						sent = c.target
					}
					mu.Lock()
					spelled := strings.ToLower(strings.Replace(c.host, ".:", ":", 1))
					spelled = strings.TrimSuffix(spelled, ".")
					if want := []string{c.method + " " + spelled + " " + sent}; !slices.Equal(told, want) {
						t.Errorf("%v: the auth server was told %q, want %q", c.message, told, want)
					}
					mu.Unlock()
					var entry struct{ Host, URI string }
					eventually(t, "the access log has it", func() bool {
						all, _ := os.ReadFile(file)
						return len(all) > len(before) && json.Unmarshal(all[len(before):], &entry) == nil
					})
					name, _, _ := strings.Cut(strings.ToLower(c.host), ":")
					if entry.Host != strings.TrimSuffix(name, ".") || entry.URI != strings.ToValidUTF8(sent, "\ufffd") {
						t.Errorf("%v: logged as %q %q, want %q", c.message, entry.Host, entry.URI, sent)
					}
				}
			}
			if n := d.log.Count("request refused"); n != 0 {
				t.Errorf("%d requests were refused", n)
			}
		})
	}
}

// TestNoHost: a target never sees what an upstream is called here, as an HTTP/1.0 client's request without a
// host has none to pass on. A request_headers that sets it is heeded.
func TestNoHost(t *testing.T) {
	h2c := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %q", r.Proto, r.Host) }), Protocols: new(http.Protocols)}
	h2c.Protocols.SetHTTP1(true)
	h2c.Protocols.SetUnencryptedHTTP2(true)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go h2c.Serve(ln)
	t.Cleanup(func() { h2c.Close() })
	plain, both, named := freeAddr(t), freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - { listen: [%q], mode: http, default: { forward: %q } }
  - { listen: [%q], mode: http, default: { forward: %q, upstream: { protocol: h2c } } }
  - { listen: [%q], mode: http, default: { forward: %q, request_headers: { set: { Host: set.test } } } }
`, plain, witness(t), both, ln.Addr(), named, ln.Addr()))
	q := message{target: "/x", noHost: true, version: "1.0"}
	if status, body := wires[0].send(t, plain, q); status != "200" || !strings.HasPrefix(body, "GET /x HTTP/1.1\r\nHost: \r\n") {
		t.Errorf("%s %q", status, body)
	}
	if status, body := wires[0].send(t, both, q); status != "200" || body != `HTTP/1.1 ""` {
		t.Errorf("to a target that speaks HTTP/2: %s %q", status, body)
	}
	if status, body := wires[0].send(t, named, q); status != "200" || body != `HTTP/1.1 "set.test"` {
		t.Errorf("with a host that is set: %s %q", status, body)
	}
}

func (m message) String() string {
	return fmt.Sprintf("%s %q host=%q %q", m.method, m.target, m.host, m.header)
}

// TestOddPathOfOneRoute: how servers read a path is no matter where the host's routes don't look at it, however
// many readings there are.
func TestOddPathOfOneRoute(t *testing.T) {
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: %q
    mode: http
    routes:
      - { host: plain.test, forward: %[2]q }
      - { host: parts.test, path: /part, forward: %[2]q }
      - { host: parts.test, forward: %[2]q }
      - { host: added.test, add_prefix: /x, forward: %[2]q }
`, addr, httpBackend(t, func(http.ResponseWriter, *http.Request) {})))
	for _, path := range []string{"///{%2e\\%2F%80%25", "/" + strings.Repeat("%2f", 4<<10)} {
		for host, want := range map[string]int{"plain.test": 200, "parts.test": 400, "added.test": 400} {
			c := dialTCP(t, addr)
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, host)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			c.Close()
			if err != nil || res.StatusCode != want {
				t.Errorf("%.30s of %s: %v, %v, want %d", path, host, res, err, want)
			}
		}
	}
}
