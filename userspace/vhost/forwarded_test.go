package vhost

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// echoHeader answers with the header that arrived, one line a value.
func echoHeader(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	var out []string
	for k, vs := range r.Header {
		for _, v := range vs {
			out = append(out, k+": "+v)
		}
	}
	for k, vs := range r.Trailer {
		for _, v := range vs {
			out = append(out, "trailer "+k+": "+v)
		}
	}
	slices.Sort(out)
	io.WriteString(w, "Host: "+r.Host+"\n"+strings.Join(out, "\n")+"\n")
}

func parseEcho(body string) http.Header {
	h := http.Header{}
	for line := range strings.SplitSeq(body, "\n") {
		if k, v, ok := strings.Cut(line, ": "); ok {
			h.Add(k, v)
		}
	}
	return h
}

// forged is everything that a stranger may hope to be believed in.
var forged = http.Header{
	"X-Forwarded-For":          {"6.6.6.6", "7.7.7.7"},
	"X-Forwarded-Proto":        {"gopher"},
	"X-Forwarded-Host":         {"evil.example"},
	"X-Forwarded-Port":         {"666"},
	"X-Forwarded-Server":       {"evil"},
	"X-Forwarded-User":         {"root"},
	"X-Forwarded-Client-Cert":  {"evil"},
	"Forwarded":                {"for=6.6.6.6;host=evil.example"},
	"X-Real-Ip":                {"6.6.6.6"},
	"X-Client-Ip":              {"6.6.6.6"},
	"Client-Ip":                {"6.6.6.6"},
	"True-Client-Ip":           {"6.6.6.6"},
	"Cf-Connecting-Ip":         {"6.6.6.6"},
	"Cf-Connecting-Ipv6":       {"6.6.6.6"},
	"Cf-Visitor":               {"gopher"},
	"Fly-Client-Ip":            {"6.6.6.6"},
	"Fly-Forwarded-Proto":      {"gopher"},
	"Fastly-Client-Ip":         {"6.6.6.6"},
	"Fastly-Ssl":               {"666"},
	"Proxy-Client-Ip":          {"6.6.6.6"},
	"Wl-Proxy-Client-Ip":       {"6.6.6.6"},
	"X-Cluster-Client-Ip":      {"6.6.6.6"},
	"X-Appengine-User-Ip":      {"6.6.6.6"},
	"X-Azure-Clientip":         {"6.6.6.6"},
	"X-Envoy-External-Address": {"6.6.6.6"},
	"X-Vercel-Forwarded-For":   {"6.6.6.6"},
	"X-Original-Forwarded-For": {"6.6.6.6"},
	"Forwarded-For":            {"6.6.6.6"},
	"Forwarded-For-Ip":         {"6.6.6.6"},
	"X-Remote-Addr":            {"6.6.6.6"},
	"X-Remote-Ip":              {"6.6.6.6"},
	"X-Originating-Ip":         {"6.6.6.6"},
	"Front-End-Https":          {"evil"},
	"Front_end_https":          {"evil"},
	"X-Url-Scheme":             {"gopher"},
	"X-Scheme":                 {"gopher"},
	"X-Arr-Ssl":                {"evil"},
	"X-Host":                   {"evil.example"},
	"X-Http-Host-Override":     {"evil.example"},
	"X-Original-Host":          {"evil.example"},
	"X-Original-Proto":         {"gopher"},
	"X-Rewrite-Url":            {"/admin"},
	"Proxy":                    {"http://evil.example"},
	"X-Original-Url":           {"/admin"},
	"X_forwarded_for":          {"6.6.6.6"},
	"X-Forwarded_for":          {"6.6.6.6"},
	"Tailscale-User-Login":     {"root@evil.example"},
	"X-Tailsplice-Id":          {"forged-id-forged-id"},
	"X-Tailsplice-Path":        {"forged"},
	"Connection":               {"X-Forwarded-For, Forwarded, X-Forwarded-Proto, X-Forwarded-Host, X-Tailsplice-Id, X-Tailsplice-Path"},
}

// TestForgedHeaders sends everything to a hop which does not believe it, for
// each reason not to believe, and by each protocol.
func TestForgedHeaders(t *testing.T) {
	up := upstream(t, echoHeader)
	client := addr("[2001:db8::5]:4711")
	for name, info := range map[string]func(ConnInfo) ConnInfo{
		"a stranger":                           nil,
		"an edge's client, by PROXY":           func(i ConnInfo) ConnInfo { i.Trusted, i.Client = true, client; return i },
		"a stranger, though PROXY says a name": func(i ConnInfo) ConnInfo { i.Trusted, i.Client, i.ServerName = true, client, "example.org"; return i },
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, p protocol) {
				h := p.hop(t, up, func(c *config) { c.info = info })
				_, body := get(t, p.client(t, h), p.url("/"), func(r *http.Request) {
					for k, v := range forged {
						if k != "Connection" || !p.h2 { // HTTP/2 has no such header
							r.Header[k] = v
						}
					}
				})
				for _, evil := range []string{"6.6.6.6", "7.7.7.7", "evil", "root", "666", "gopher", "/admin", "forged"} {
					if strings.Contains(body, evil) {
						t.Errorf("%q got through:\n%s", evil, body)
					}
				}
				q := h.request(t, 1)
				ip, forIP := q.Conn.Client.Addr().String(), q.Conn.Client.Addr().String()
				if q.Conn.Client.Addr().Is6() {
					forIP = `"[` + ip + `]"`
				}
				proto := "http"
				if p.tls || q.Conn.ServerName != "" {
					proto = "https"
				}
				got := parseEcho(body)
				for k, want := range map[string]string{
					"X-Forwarded-For": ip, "X-Forwarded-Proto": proto, "X-Forwarded-Host": "example.org",
					"Forwarded": "for=" + forIP + ";host=example.org;proto=" + proto, "X-Tailsplice-Id": q.Conn.ID, "Host": "example.org",
				} {
					if len(got[k]) != 1 || got[k][0] != want {
						t.Errorf("%s = %q, want %q", k, got[k], want)
					}
				}
			})
		})
	}
}

// TestForgedMatch checks that routes are chosen by what is believed of a request, too.
func TestForgedMatch(t *testing.T) {
	up := upstream(t, echoHeader)
	for _, trusted := range []bool{false, true} {
		each(t, func(t *testing.T, p protocol) {
			h := p.hop(t, up, func(c *config) {
				c.info = func(i ConnInfo) ConnInfo { i.Trusted = trusted; return i }
				c.Route = func(r *http.Request, _, path string) (*Route, error) {
					for _, name := range []string{"X-Forwarded-Proto", "Client-Cert", "Tailscale-User-Login"} {
						m := Match{Headers: map[string]string{name: "*"}}
						if ok, _ := m.Takes(r, path); ok {
							return nil, ErrRejected
						}
					}
					return &Route{Upstreams: []Choice{{Upstream: up, Weight: 1}}}, nil
				}
			})
			for name, value := range map[string]string{"X-Forwarded-Proto": "https", "X_Forwarded_Proto": "https", "Client-Cert": ":bWU=:", "Tailscale-User-Login": "me@vsq.cz"} {
				res, _ := get(t, p.client(t, h), p.url("/"), func(r *http.Request) { r.Header[name] = []string{value} })
				believed := trusted && !p.tls && !strings.Contains(name, "_") && name != "Tailscale-User-Login"
				if matched := res.StatusCode == http.StatusForbidden; matched != believed {
					t.Errorf("%s, trusted %v: a route by it is taken: %v, want %v", name, trusted, matched, believed)
				}
			}
		})
	}
}

// TestOtherPath checks that a target hears of the path that was guarded alone, also from a hop that is
// believed.
func TestOtherPath(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, echoHeader), func(c *config) { c.info = func(i ConnInfo) ConnInfo { i.Trusted = true; return i } })
		_, body := get(t, p.client(t, h), p.url("/"), func(r *http.Request) {
			for _, name := range []string{"X-Original-Url", "X-Original-Uri", "X-Original-Method", "X-Rewrite-Url", "X_Original_Url"} {
				r.Header[name] = []string{"/admin"}
			}
		})
		if strings.Contains(body, "/admin") {
			t.Errorf("another path got through:\n%s", body)
		}
	})
}

// TestTrustedTLS checks that trust in a peer does not extend to what came in
// TLS: the peer may be an edge that passes it on unread.
func TestTrustedTLS(t *testing.T) {
	p := protocol{"h1 TLS", true, false}
	h := p.hop(t, upstream(t, echoHeader), func(c *config) { c.info = func(i ConnInfo) ConnInfo { i.Trusted = true; return i } })
	_, body := get(t, p.client(t, h), p.url("/"), func(r *http.Request) { r.Header.Set("X-Forwarded-For", "6.6.6.6") })
	if strings.Contains(body, "6.6.6.6") {
		t.Errorf("believed:\n%s", body)
	}
}

// TestTrustedHop checks what is kept and added when the hop before is believed.
func TestTrustedHop(t *testing.T) {
	h := newHop(t, upstream(t, echoHeader), func(c *config) { c.info = func(i ConnInfo) ConnInfo { i.Trusted = true; return i } })
	plain := protocols[0]
	for name, tc := range map[string]struct{ send, want http.Header }{
		"the hop's own": {
			http.Header{"X-Forwarded-For": {"2001:db8::5"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"www.example.org"},
				"Forwarded": {`for="[2001:db8::5]";host=www.example.org;proto=https`}, "X-Tailsplice-Id": {"0123456789abcdef"}, "X-Tailsplice-Path": {"edge-a, gate"}, "Tailscale-User-Login": {"eva@example.org"}},
			http.Header{"X-Forwarded-For": {"2001:db8::5, 127.0.0.1"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"www.example.org"},
				"Forwarded": {`for="[2001:db8::5]";host=www.example.org;proto=https, for=127.0.0.1;host=example.org;proto=http`}, "X-Tailsplice-Id": {"0123456789abcdef"}, "X-Tailsplice-Path": {"edge-a, gate, home"}},
		},
		"somebody": {
			http.Header{"X-Forwarded-For": {"unknown"}},
			http.Header{"X-Forwarded-For": {"unknown, unknown"}, "Forwarded": {"for=unknown;host=example.org;proto=http, for=unknown;host=example.org;proto=http"}},
		},
		"several lines": {
			http.Header{"X-Forwarded-For": {"192.0.2.1", "192.0.2.2 ,192.0.2.3"}},
			http.Header{"X-Forwarded-For": {"192.0.2.1, 192.0.2.2, 192.0.2.3, 127.0.0.1"}, "Forwarded": {"for=192.0.2.1;host=example.org;proto=http, for=192.0.2.2, for=192.0.2.3, for=127.0.0.1;host=example.org;proto=http"}},
		},
		"nothing": {
			http.Header{},
			http.Header{"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Proto": {"http"}, "X-Forwarded-Host": {"example.org"}, "Forwarded": {"for=127.0.0.1;host=example.org;proto=http"}, "X-Tailsplice-Path": {"home"}},
		},
		"names that are none": {
			http.Header{"X-Tailsplice-Path": {"edge-a, <script>"}},
			http.Header{"X-Tailsplice-Path": {"home"}},
		},
		"too many names": {
			http.Header{"X-Tailsplice-Path": {strings.Repeat("edge, ", 9)}},
			http.Header{"X-Tailsplice-Path": {"home"}},
		},
		"an odd protocol, and an id that is none": {
			http.Header{"X-Forwarded-Proto": {"javascript"}, "X-Tailsplice-Id": {"<script>alert(1)</script>"}},
			http.Header{"X-Forwarded-Proto": {"http"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, body := get(t, plain.client(t, h), plain.url("/"), func(r *http.Request) { r.Header = tc.send })
			got := parseEcho(body)
			for k, want := range tc.want {
				if !slices.Equal(got[k], want) {
					t.Errorf("%s = %q, want %q", k, got[k], want)
				}
			}
			if strings.Contains(body, "script") {
				t.Errorf("got through:\n%s", body)
			}
		})
	}
}

// TestAnonymous checks that the client of a hop which can't say who it is does
// not become that hop for the next one.
func TestAnonymous(t *testing.T) {
	h := newHop(t, upstream(t, echoHeader), func(c *config) {
		c.info = func(i ConnInfo) ConnInfo { i.Unknown = &UnsaidError{Hop: i.Peer.Addr()}; return i }
	})
	_, body := get(t, protocols[0].client(t, h), protocols[0].url("/"))
	if got := parseEcho(body); got.Get("X-Forwarded-For") != "unknown" || got.Get("Forwarded") != "for=unknown;host=example.org;proto=http" {
		t.Errorf("got:\n%s", body)
	}
}

// TestForwardedQuoting checks the syntax of RFC 7239 for odd values.
func TestForwardedQuoting(t *testing.T) {
	for want, got := range map[string]string{
		`for=192.0.2.1;host=example.org;proto=http`:              element(netip.MustParseAddr("192.0.2.1"), "example.org", "http"),
		`for="[2001:db8::1]";host="example.org:8443";proto=http`: element(netip.MustParseAddr("2001:db8::1"), "example.org:8443", "http"),
		`for=unknown;host="[::1]:80";proto=https`:                element(netip.Addr{}, "[::1]:80", "https"),
		`for=unknown;host="a\"b\\c";proto=https`:                 element(netip.Addr{}, `a"b\c`, "https"),
		`for=unknown;proto=http`:                                 element(netip.Addr{}, "", "http"),
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// TestForgedTrailer checks that trailers are no way around: some servers merge
// them into the header.
func TestForgedTrailer(t *testing.T) {
	h := newHop(t, upstream(t, echoHeader))
	_, body := rawDo(t, h, "POST / HTTP/1.1\r\nHost: example.org\r\nTrailer: X-Forwarded-For, X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nX-Sum: 42\r\n\r\n")
	if strings.Contains(body, "6.6.6.6") {
		t.Errorf("got through:\n%s", body)
	}
	if !strings.Contains(body, "trailer X-Sum: 42") {
		t.Errorf("the honest trailer is missing:\n%s", body)
	}
}

// TestUnixPeer checks a connection without addresses.
func TestUnixPeer(t *testing.T) {
	s := New(Options{Node: "home", Route: leading(func(string, string) (*Upstream, error) { return upstream(t, echoHeader), nil })})
	defer s.Close()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go s.Serve(l)
	c := &http.Client{Timeout: deadline, Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.DialTimeout("unix", l.Addr().String(), deadline)
	}}}
	defer c.CloseIdleConnections()
	_, body := get(t, c, "http://example.org/")
	if got := parseEcho(body); got.Get("Forwarded") != "for=unknown;host=example.org;proto=http" || got.Get("X-Forwarded-For") != "" {
		t.Errorf("got:\n%s", body)
	}
}

// hopsIn trusts those in a network to speak for others.
type hopsIn netip.Prefix

func (h hopsIn) Hop(a netip.Addr) (bool, error) { return netip.Prefix(h).Contains(a), nil }

// nobodyKnows is a tailscaled that doesn't answer.
type nobodyKnows struct{}

func (nobodyKnows) Hop(netip.Addr) (bool, error) { return false, errors.New("no answer") }

// TestClientOf: the log names whom a believed hop speaks for, and nobody else's word counts.
func TestClientOf(t *testing.T) {
	hop, visitor := netip.MustParseAddrPort("100.64.0.2:40000"), netip.MustParseAddrPort("203.0.113.7:50000")
	hops := hopsIn(netip.MustParsePrefix("100.64.0.0/10"))
	for _, c := range []struct {
		name string
		info ConnInfo
		xff  []string
		want string // "?" at its end: nobody knows whether that is the client
	}{
		{"a stranger", ConnInfo{Client: visitor, Peer: visitor}, []string{"6.6.6.6"}, "203.0.113.7:50000"},
		{"a believed hop", ConnInfo{Client: hop, Peer: hop, Trusted: true}, []string{"203.0.113.7"}, "203.0.113.7:0"},
		{"what it passed on", ConnInfo{Client: hop, Peer: hop, Trusted: true}, []string{"6.6.6.6", "2001:db8::7"}, "[2001:db8::7]:0"},
		{"no header", ConnInfo{Client: hop, Peer: hop, Trusted: true}, nil, "100.64.0.2:40000"},
		{"nonsense", ConnInfo{Client: hop, Peer: hop, Trusted: true}, []string{"unknown"}, "100.64.0.2:40000?"},
		{"a chain of hops", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, []string{"6.6.6.6, 203.0.113.7, 100.64.0.3", "100.64.0.4"}, "203.0.113.7:0"},
		{"a hop itself", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, []string{"100.64.0.3, 100.64.0.4"}, "100.64.0.3:0?"},
		{"a hop that speaks for nobody it knows", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, []string{"unknown, 100.64.0.4"}, "100.64.0.2:40000?"},
		{"a stranger among them", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, []string{"203.0.113.7, 192.0.2.1, 100.64.0.4"}, "192.0.2.1:0"},
		{"too long a chain", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, []string{"203.0.113.7" + strings.Repeat(", 100.64.0.4", 1000)}, "100.64.0.4:0?"},
		{"a hop without a header", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: hops}, nil, "100.64.0.2:40000?"},
		{"a hop by PROXY", ConnInfo{Client: netip.MustParseAddrPort("100.64.0.3:1"), Peer: hop, Trusted: true, Hops: hops}, []string{"203.0.113.7"}, "100.64.0.3:1?"},
		{"a hop that may be one", ConnInfo{Client: hop, Peer: hop, Trusted: true, Hops: nobodyKnows{}}, []string{"203.0.113.7, 100.64.0.3"}, "100.64.0.3:0?"},
		{"a PROXY header", ConnInfo{Client: visitor, Peer: hop, Trusted: true}, []string{"6.6.6.6"}, "203.0.113.7:50000"},
	} {
		r := &http.Request{Header: http.Header{"X-Forwarded-For": c.xff}}
		client, unknown := clientOf(r, c.info)
		got := client.String()
		if unknown != nil {
			got += "?"
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestRequestID passes on what fits on a line of a log, and makes an id where a
// client sends something else, or nothing: another one for each request.
func TestRequestID(t *testing.T) {
	h := newHop(t, upstream(t, echoHeader))
	c := protocols[0].client(t, h)
	seen := map[string]bool{}
	for _, sent := range [][]string{nil, {""}, {"mine"}, {strings.Repeat("x", 128)}, {strings.Repeat("x", 129)}, {"a b"}, {"é"}, {"one", "two"}, nil} {
		_, body := get(t, c, "http://a/", func(r *http.Request) { r.Header["X-Request-Id"] = sent })
		got := parseEcho(body)["X-Request-Id"]
		if len(got) != 1 {
			t.Fatalf("sent %q, the upstream gets %q", sent, got)
		}
		if len(sent) == 1 && (sent[0] == "mine" || len(sent[0]) == 128) {
			if got[0] != sent[0] {
				t.Errorf("sent %q, the upstream gets %q", sent, got)
			}
			continue
		}
		if !strings.HasPrefix(got[0], "id-of-connection-0-") || seen[got[0]] {
			t.Errorf("sent %q, the upstream gets %q", sent, got)
		}
		seen[got[0]] = true
	}
}
