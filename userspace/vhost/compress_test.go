package vhost

import (
	"compress/gzip"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestCompress goes through what is compressed, and what is left as it came.
func TestCompress(t *testing.T) {
	type header = map[string]string
	text := header{"Content-Type": "text/html; charset=utf-8"}
	with := func(more ...string) header {
		h := header{"Content-Type": "text/html"}
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = more[i+1]
		}
		return h
	}
	for _, c := range []struct {
		name   string
		method string
		accept string
		status int
		length int64
		header header
		zipped bool
		vary   bool
	}{
		{"text", "GET", "gzip", 200, 5000, text, true, true},
		{"of unknown length", "GET", "gzip", 200, -1, text, true, true},
		{"an error's page", "GET", "gzip", 404, 5000, text, true, true},
		{"json", "POST", "br, GZIP;q=0.5", 200, 5000, header{"Content-Type": "application/json"}, true, true},
		{"for anything", "GET", "*", 200, 5000, text, true, true},
		{"for HEAD as for GET", "HEAD", "gzip", 200, -1, text, true, true},
		{"not asked for", "GET", "", 200, 5000, text, false, true},
		{"not by name", "GET", "br", 200, 5000, text, false, true},
		{"refused", "GET", "gzip;q=0, *", 200, 5000, text, false, true},
		{"small", "GET", "gzip", 200, 100, text, false, false},
		{"a picture", "GET", "gzip", 200, 5000, header{"Content-Type": "image/png"}, false, false},
		{"without a type", "GET", "gzip", 200, 5000, nil, false, false},
		{"events", "GET", "gzip", 200, -1, header{"Content-Type": "text/event-stream"}, false, false},
		{"compressed already", "GET", "gzip", 200, 5000, with("Content-Encoding", "br"), false, false},
		{"a part", "GET", "gzip", 206, 5000, text, false, false},
		{"a part of unknown status", "GET", "gzip", 200, 5000, with("Content-Range", "bytes 0-1/2"), false, false},
		{"not to be changed", "GET", "gzip", 200, 5000, with("Cache-Control", "public, No-Transform"), false, false},
		{"with a digest", "GET", "gzip", 200, 5000, with("Repr-Digest", "sha-256=:YWJj:"), false, false},
		{"with one of the content", "GET", "gzip", 200, -1, with("Content-Digest", "sha-256=:YWJj:"), false, false},
		{"with an old one", "GET", "gzip", 200, 5000, with("Digest", "SHA-256=YWJj"), false, false},
		{"with a very old one", "HEAD", "gzip", 200, 5000, with("Content-MD5", "YWJj"), false, false},
		{"not modified", "GET", "gzip", 304, -1, text, false, false},
		{"no content", "GET", "gzip", 204, -1, text, false, false},
	} {
		const body = "all work and no play makes "
		res := &http.Response{StatusCode: c.status, ContentLength: c.length, Header: http.Header{"Etag": {`"1"`}, "Accept-Ranges": {"bytes"}, "Content-Length": {"5000"}},
			Body: io.NopCloser(strings.NewReader(body)), Request: &http.Request{Method: c.method, Header: http.Header{}}}
		if c.accept != "" {
			res.Request.Header["Accept-Encoding"] = []string{c.accept}
		}
		for k, v := range c.header {
			res.Header.Set(k, v)
		}
		before := res.Header.Get("Content-Encoding")
		compress(res)
		h := res.Header
		if zipped := h.Get("Content-Encoding") == "gzip"; zipped != c.zipped || (h.Get("Vary") == "Accept-Encoding") != c.vary {
			t.Errorf("%s: compressed %t, vary %q", c.name, zipped, h.Get("Vary"))
			continue
		}
		if !c.zipped {
			if h.Get("Content-Encoding") != before || h.Get("Etag") != `"1"` || h.Get("Content-Length") != "5000" || res.ContentLength != c.length {
				t.Errorf("%s: changed to %v", c.name, h)
			}
			continue
		}
		if h.Get("Etag") != `W/"1"` || h.Get("Accept-Ranges") != "" || h.Get("Content-Length") != "" || res.ContentLength != -1 {
			t.Errorf("%s: %v, length %d", c.name, h, res.ContentLength)
		}
		if c.method == "HEAD" {
			continue
		}
		z, err := gzip.NewReader(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(z); string(got) != body || err != nil {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}
