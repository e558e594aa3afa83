package vhost

import (
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
		{"/%61pi/x%2Fy", "/api", "", "/x/y", "/api"},
		{"/api/../api/x", "/api", "", "/x", "/api"},
		{"//api//x", "/api", "", "/x", "/api"},
		{"/api/../x", "", "/v2", "/v2/x", ""},
		{"/../../x", "", "/v2", "/v2/x", ""},
		{"/%2e%2e/x", "", "/v2", "/v2/x", ""},
		{"/api/%2e%2e/%2e%2e/api/x", "/api", "/v2", "/v2/x", "/api"},
		{"/a b", "", "/v 2", "/v%202/a%20b", ""},
	} {
		r, err := http.NewRequest("GET", "http://a"+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.strip != "" {
			stripPrefix(r, c.strip)
		}
		if c.add != "" {
			addPrefix(r.URL, c.add)
		}
		if got := r.URL.EscapedPath(); got != c.want || r.Header.Get("X-Forwarded-Prefix") != c.prefix {
			t.Errorf("%q without %q with %q: %q, prefix %q; want %q", c.path, c.strip, c.add, got, r.Header.Get("X-Forwarded-Prefix"), c.want)
		}
	}
}
