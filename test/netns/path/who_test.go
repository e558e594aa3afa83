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
// lets that user in by login and a node by its tag, over the tailnet, and nobody who comes by the edge.
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
      - { host: [` + lab.Site + `], path: /who, forward: "127.0.0.1:9100" }
`
	s.configure(t, s.home, strings.Replace(homeConfig, "    default: { forward: tailnet://laptop:8080 }\n",
		routes+"    default: { forward: tailnet://laptop:8080 }\n", 1))
	home := net.JoinHostPort(s.Home.Node.IP4.String(), "443")
	for _, c := range []struct {
		name, path string
		from       *lab.Host
		byEdge     bool
		status     int
		user       string
	}{
		{"the user", "/who/user", s.Friend, false, 200, lab.TestUser},
		{"the user where a tag is wanted", "/who/tag", s.Friend, false, 403, ""},
		{"the tag", "/who/tag", s.Laptop, false, 200, ""},
		{"a tag where the user is wanted", "/who/user", s.Laptop, false, 403, ""},
		{"a tag where anybody may", "/who", s.Laptop, false, 200, ""},
		{"the public", "/who/user", s.Client, true, 403, ""},
		{"the public where anybody may", "/who", s.Client, true, 200, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := s.browser(c.from, "tcp4", false)
			if !c.byEdge {
				b.Transport = directTo(s, c.from, home)
			}
			b.Timeout = patience
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
	if n := status(t, s.home).Refused["not_allowed"]; n < 3 {
		t.Errorf("%d refusals are counted, want 3", n)
	}

	// A hop of the user's is not the user: whoever comes through it would be.
	t.Run("the user's node as a hop", func(t *testing.T) {
		s.configure(t, s.home, strings.Replace(strings.Replace(homeConfig, "    default: { forward: tailnet://laptop:8080 }\n", routes+"    default: { forward: tailnet://laptop:8080 }\n", 1),
			`from: ["tag:edge"]`, `from: ["tag:edge", friend]`, 1))
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
