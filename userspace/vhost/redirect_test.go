package vhost

import (
	"net/http"
	"testing"
)

// TestRedirect checks where requests are sent.
func TestRedirect(t *testing.T) {
	for _, c := range []struct {
		to, request, host string
		code              int
		want              string
	}{
		{"https", "/a%2Fb?c=d", "example.org:8080", 308, "https://example.org/a%2Fb?c=d"},
		{"https", "/a%2Fb|c{}\"?d%2f|", "example.org", 308, "https://example.org/a%2Fb|c{}\"?d%2f|"},
		{"https", "http://example.org?q", "a", 308, "https://example.org/?q"},
		{"https", "/", "[2001:db8::1]:80", 307, "https://[2001:db8::1]/"},
		{"https://new.example", "/a?b", "example.org", 301, "https://new.example/a?b"},
		{"https://new.example/there", "/a?b", "example.org", 302, "https://new.example/there"},
		{"https://new.example?q", "/a?b", "example.org", 303, "https://new.example?q"},
		{"https://new.example", "//evil.example/x", "example.org", 308, "https://new.example//evil.example/x"},
		{"https", "/\\evil.example", "example.org", 308, "https://example.org/%5Cevil.example"},
		{"https", "/", "", 400, ""},
	} {
		h := newHop(t, nil, func(o *config) {
			o.Route = func(*http.Request, string, string) (*Route, error) {
				return &Route{Redirect: &Redirect{To: c.to, Code: c.code}}, nil
			}
		})
		res, body := rawDo(t, h, "GET "+c.request+" HTTP/1.1\r\nHost: "+c.host+"\r\n\r\n")
		if got := res.Header.Get("Location"); res.StatusCode != c.code || got != c.want {
			t.Errorf("%s at %q to %s: %d %q %s, want %d %q", c.request, c.host, c.to, res.StatusCode, got, body, c.code, c.want)
		}
	}
}
