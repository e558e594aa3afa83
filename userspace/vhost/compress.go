package vhost

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// compressFrom is the length from which gzip is worth its header and the CPU.
const compressFrom = 1024

// compressible are the types that shrink: no images, archives, films, nor event streams, which can't wait.
var compressible = []string{"text/", "application/json", "application/javascript", "application/xml", "application/wasm", "application/manifest+json", "image/svg+xml", "application/xhtml+xml", "application/ld+json", "application/rss+xml", "application/atom+xml"}

// compress makes res's body one of gzip, if the client takes that and it helps.
func compress(res *http.Response) {
	h := res.Header
	kind, _, _ := strings.Cut(strings.ToLower(h.Get("Content-Type")), ";")
	fits := func(prefix string) bool { return strings.HasPrefix(kind, prefix) }
	switch {
	case !slices.ContainsFunc(compressible, fits) || strings.TrimSpace(kind) == "text/event-stream",
		res.StatusCode < 200 || res.StatusCode == http.StatusNoContent || res.StatusCode == http.StatusPartialContent || res.StatusCode == http.StatusNotModified,
		h.Get("Content-Encoding") != "" || h.Get("Content-Range") != "",
		strings.Contains(strings.ToLower(h.Get("Cache-Control")), "no-transform"),
		hasDigest(h) || hasDigest(res.Trailer), // of the bytes as they are
		res.ContentLength >= 0 && res.ContentLength < compressFrom && res.Request.Method != http.MethodHead:
		return
	}
	h.Add("Vary", "Accept-Encoding")
	if !takesGzip(res.Request.Header["Accept-Encoding"]) {
		return
	}
	h.Set("Content-Encoding", "gzip")
	h.Del("Content-Length")
	h.Del("Accept-Ranges")
	if tag := h.Get("Etag"); strings.HasPrefix(tag, `"`) {
		h.Set("Etag", "W/"+tag) // other bytes than the ones that it stood for
	}
	if res.Request.Method == http.MethodHead {
		return
	}
	z := &zipped{src: res.Body, eager: res.ContentLength < 0, buf: make([]byte, copyBuffer)}
	z.zip = writers.Get().(*gzip.Writer)
	z.zip.Reset(&z.out)
	res.Body, res.ContentLength = z, -1
}

// hasDigest says whether one of the headers has a digest of the body (RFC 9530, RFC 3230, RFC 2616 14.15).
func hasDigest(h http.Header) bool {
	return slices.ContainsFunc([]string{"Content-Digest", "Repr-Digest", "Digest", "Content-Md5"},
		func(name string) bool { return h[name] != nil })
}

// takesGzip reads Accept-Encoding (RFC 9110 12.5.3).
func takesGzip(lines []string) bool {
	any := false
	for _, v := range splitList(lines) {
		coding, params, _ := strings.Cut(v, ";")
		weight := 1.0
		if q, ok := strings.CutPrefix(strings.TrimSpace(strings.ToLower(params)), "q="); ok {
			if f, err := strconv.ParseFloat(q, 64); err == nil {
				weight = f
			}
		}
		switch strings.ToLower(strings.TrimSpace(coding)) {
		case "gzip", "x-gzip":
			return weight > 0
		case "*":
			any = weight > 0
		}
	}
	return any
}

var writers = sync.Pool{New: func() any { return gzip.NewWriter(nil) }}

// zipped is a body, compressed as it is read.
type zipped struct {
	src   io.ReadCloser
	zip   *gzip.Writer // nil once it has been given back
	out   bytes.Buffer
	buf   []byte
	eager bool // the body may be a stream: hold nothing back
	err   error
}

func (z *zipped) Read(p []byte) (int, error) {
	for z.out.Len() == 0 && z.err == nil {
		n, err := z.src.Read(z.buf)
		if n > 0 {
			z.zip.Write(z.buf[:n])
			if z.eager {
				z.zip.Flush()
			}
		}
		if err == io.EOF {
			z.zip.Close()
		}
		if z.err = err; err != nil {
			writers.Put(z.zip)
			z.zip = nil
		}
	}
	if z.out.Len() > 0 {
		return z.out.Read(p)
	}
	return 0, z.err
}

// Close may come while Read is at work, so the writer is left to it.
func (z *zipped) Close() error { return z.src.Close() }
