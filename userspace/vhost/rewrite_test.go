package vhost

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
)

// TestPrefixes takes prefixes off paths and puts others before them, however a
// client writes the path: it never leaves the prefix that is put before.
func TestPrefixes(t *testing.T) {
	for _, c := range []struct {
		path, strip, add string
		want, prefix     string
	}{
		{"/api/x", "/api", "", "/x", "/api"},
		{"/api/x", "/api/", "", "/x", "/api"},
		{"/api", "/api", "", "/", "/api"},
		{"/api/", "/api", "", "/", "/api"},
		{"/api/x%2Fy%20z", "/api", "", "/x%2Fy%20z", "/api"},
		{"/api/x/", "/api", "/v2/", "/v2/x/", "/api"},
		{"/api", "/api", "/v2", "/v2/", "/api"},
		{"/x", "", "/v2", "/v2/x", ""},
		{"/%61pi/x%2Fy", "/api", "", "/x%2Fy", "/api"},
		{"/api//x%2Fy|z", "/api", "", "/x%2Fy|z", "/api"},
		{"/api/./x%2Fy", "/api", "/v2", "/v2/x%2Fy", "/api"},
		{"/api%2Fx%2Fy", "/api", "", "/x%2Fy", "/api"},
		{"/x%2F..%2F..%2Fy", "", "/v2", "/v2/y", ""},
		{"/api/../api/x", "/api", "", "/x", "/api"},
		{"//api//x", "/api", "", "/x", "/api"},
		{"/api/../x", "", "/v2", "/v2/x", ""},
		{"/../../x", "", "/v2", "/v2/x", ""},
		{"/%2e%2e/x", "", "/v2", "/v2/x", ""},
		{"/api/%2e%2e/%2e%2e/api/x", "/api", "/v2", "/v2/x", "/api"},
		{"/a%20b", "", "/v 2", "/v%202/a%20b", ""},
	} {
		out := make(chan [2]string, 1)
		up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			out <- [2]string{r.RequestURI, r.Header.Get("X-Forwarded-Prefix")}
			io.WriteString(c, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		})
		h := newHop(t, nil, func(o *config) {
			o.Route = func(*http.Request, string, string) (*Route, error) {
				return &Route{StripPrefix: c.strip, AddPrefix: c.add, Upstreams: []Choice{{Upstream: up, Weight: 1}}}, nil
			}
		})
		if res, body := rawDo(t, h, "GET "+c.path+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); res.StatusCode != 204 {
			t.Errorf("%q: %d %s", c.path, res.StatusCode, body)
			continue
		}
		if got := <-out; got != [2]string{c.want, c.prefix} {
			t.Errorf("%q without %q with %q: %q; want %q, prefix %q", c.path, c.strip, c.add, got, c.want, c.prefix)
		}
	}
}
