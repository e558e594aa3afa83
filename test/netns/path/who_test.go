package path

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// echoHeaders answers with the request's headers.
var echoHeaders = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	json.NewEncoder(w).Encode(r.Header)
})

// TestWho: a target hears from home's tailscaled which user a request is from, and from nobody else; allow
// lets that user in by login and a node by its tag, over the tailnet, and nobody who comes by the edge, the
// user himself included.
func TestWho(t *testing.T) {
	s := world(t)
	ln, err := s.Home.Listen("tcp", "127.0.0.1:9100")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: echoHeaders}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	routes := `    routes:
      - { host: [` + lab.Site + `], path: /who/user, forward: "127.0.0.1:9100", allow: ["` + lab.TestUser + `"] }
      - { host: [` + lab.Site + `], path: /who/tag, forward: "127.0.0.1:9100", allow: ["tag:laptop"] }
      - { host: [` + lab.Site + `], path: /who/edge, forward: "127.0.0.1:9100", allow: ["tag:edge"] }
      - { host: [` + lab.Site + `], path: /who, forward: "127.0.0.1:9100" }
`
	const rest = "    default: { forward: tailnet://laptop:8080 }\n"
	believing := func(from string) string { // home's configuration
		return strings.Replace(strings.Replace(homeConfig, rest, routes+rest, 1), `["tag:edge"]`, from, 1)
	}
	s.configure(t, s.home, believing(`["tag:edge"]`))
	site := lab.Site + ":443"
	edge := net.JoinHostPort(s.EdgeA.Node.IP4.String(), "443")
	home := net.JoinHostPort(s.Home.Node.IP4.String(), "443")
	for _, c := range []struct {
		name, path string
		from       *lab.Host
		to         string
		status     int
		user       string
	}{
		{"the user", "/who/user", s.Friend, home, 200, lab.TestUser},
		{"the user where a tag is wanted", "/who/tag", s.Friend, home, 403, ""},
		{"the tag", "/who/tag", s.Laptop, home, 200, ""},
		{"a tag where the user is wanted", "/who/user", s.Laptop, home, 403, ""},
		{"a tag where anybody may", "/who", s.Laptop, home, 200, ""},
		{"the user, by the public way", "/who/user", s.Friend, site, 403, ""},
		{"the user, by the public way, where the edge may", "/who/edge", s.Friend, site, 403, ""},
		{"the user, by the public way, where anybody may", "/who", s.Friend, site, 200, ""},
		// The edge says that it is from the user's address on the tailnet, and home's tailscaled whose that is.
		{"the user, by the edge's address on the tailnet", "/who/user", s.Friend, edge, 200, lab.TestUser},
		{"the user, by that address, where the edge may", "/who/edge", s.Friend, edge, 403, ""},
		{"a tag, by that address", "/who/user", s.Laptop, edge, 403, ""},
		{"the public", "/who/user", s.Client, site, 403, ""},
		{"the public where the edge may", "/who/edge", s.Client, site, 403, ""},
		{"the public where anybody may", "/who", s.Client, site, 200, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := &http.Client{Transport: directTo(s, c.from, c.to), Timeout: patience}
			defer b.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+lab.Site+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Tailscale-User-Login", "forged@example.org")
			req.Header["tailscale_user_login"] = []string{"forged@example.org"}
			res, err := b.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, _ := io.ReadAll(res.Body)
			if res.StatusCode != c.status {
				t.Fatalf("%s: %s", res.Status, body)
			}
			if strings.Contains(string(body), "forged") {
				t.Errorf("the target got %s", body)
			}
			if c.status != 200 {
				return
			}
			var got http.Header
			if err := json.Unmarshal(body, &got); err != nil {
				t.Fatal(err)
			}
			if user := got.Get("Tailscale-User-Login"); user != c.user {
				t.Errorf("the target heard of the user %q, want %q", user, c.user)
			}
		})
	}
	if n := status(t, s.home).Refused["not_allowed"]; n < 8 {
		t.Errorf("%d refusals are counted, want 8", n)
	}

	// A hop of the user's is not the user: whoever comes through it would be.
	t.Run("the user's node as a hop", func(t *testing.T) {
		s.configure(t, s.home, believing(`["tag:edge", friend]`))
		for _, c := range []struct {
			preface, path string
			status        int
		}{{"", "/who/user", 403}, {"", "/who", 200}, {"PROXY UNKNOWN\r\n", "/who/user",
			403}, {"PROXY UNKNOWN\r\n", "/who", 200},
			{"PROXY TCP4 203.0.113.7 192.0.2.80 5000 443\r\n", "/who/user", 403},
			{"PROXY TCP4 203.0.113.7 192.0.2.80 5000 443\r\n", "/who", 200}} {
			raw, err := s.Friend.Dial(t.Context(), "tcp", home)
			if err != nil {
				t.Fatal(err)
			}
			raw.SetDeadline(time.Now().Add(patience))
			io.WriteString(raw, c.preface)
			conn := tls.Client(raw, s.trust())
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", c.path, lab.Site)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			raw.Close()
			if res.StatusCode != c.status || strings.Contains(string(body), "Tailscale-User") {
				t.Errorf("%q, %s: %s %s", c.preface, c.path, res.Status, body)
			}
		}
	})

	// An edge of the user's: whoever comes by it is not the user, the user neither, whether the edge says for
	// whom it speaks or not. Beside tag:edge home names its node, or tells it to say so.
	t.Run("the user's edge", func(t *testing.T) {
		const listen = "198.51.100.98:443"
		config := func(send string) string {
			there := strings.Replace(lab.EdgeConfig, ":443", listen, 1)
			return strings.Replace(there, ", send_proxy: v2", send, 1)
		}
		edge := s.Friend.Tailsplice(t, config(""))
		t.Cleanup(edge.Kill)
		for _, c := range []struct {
			send, from string
			open       int // the status of what anybody may have
		}{
			{"", `["tag:edge", friend]`, 200},
			{"", `["tag:edge", friend], required: true`, 0}, // closed
			{", send_proxy: v2", `["tag:edge", friend]`, 200},
			{", send_proxy: v2", `["tag:edge", friend], required: true`, 200},
			{", send_proxy: v2", `["tag:edge"]`, 0},
		} {
			s.configure(t, edge, config(c.send))
			s.configure(t, s.home, believing(c.from))
			for _, from := range []*lab.Host{s.Client, s.Friend} {
				for path, status := range map[string]int{"/who": c.open, "/who/user": min(c.open, 1) * 403} {
					b := &http.Client{Transport: directTo(s, from, listen), Timeout: patience}
					got, body := 0, []byte{}
					if res, err := b.Get("https://" + lab.Site + path); err == nil {
						got = res.StatusCode
						body, _ = io.ReadAll(res.Body)
						res.Body.Close()
					}
					if got != status || strings.Contains(string(body), "Tailscale-User") {
						t.Errorf("edge%s, accept_proxy from %s, %s asks for %s: %d %s, want %d", c.send, c.from,
							from.Name, path, got, body, status)
					}
				}
			}
		}
	})

	// One hop further on it is still none: home takes it for a client that it may be, the laptop knows
	// better.
	t.Run("the user's node as a hop before the last", func(t *testing.T) {
		ln, err := s.Laptop.Listen("tcp", "127.0.0.1:9101")
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: echoHeaders}
		go srv.Serve(ln)
		t.Cleanup(func() { srv.Close() })
		s.configure(t, s.home, homeConfig)
		for _, c := range []struct {
			hops, path string
			status     int
			user       string
		}{
			{`"tag:home"`, "/last/user", 200, lab.TestUser}, // nobody could know that it is a hop
			{`"tag:home", friend`, "/last/user", 403, ""},
			{`"tag:home", friend`, "/last", 200, ""},
		} {
			routes := `    routes:
      - { host: [` + lab.Site + `], path: /last/user, forward: "127.0.0.1:9101", allow: ["` + lab.TestUser + `"] }
      - { host: [` + lab.Site + `], path: /last, forward: "127.0.0.1:9101" }
`
			cfg := strings.Replace(strings.Replace(laptopConfig, "    routes:\n", routes, 1),
				`from: ["tag:home"]`, "from: ["+c.hops+"]", 1)
			s.configure(t, s.laptop, cfg)
			b := s.browser(s.Friend, "tcp4", false)
			b.Transport, b.Timeout = directTo(s, s.Friend, home), 20*time.Second
			res, err := b.Get("https://" + lab.Site + c.path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			b.CloseIdleConnections()
			var got http.Header
			json.Unmarshal(body, &got)
			if res.StatusCode != c.status || got.Get("Tailscale-User-Login") != c.user {
				t.Errorf("accept_proxy from %s, %s: %s %s", c.hops, c.path, res.Status, body)
			}
		}
	})
}
