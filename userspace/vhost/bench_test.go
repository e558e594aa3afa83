//go:build unix

package vhost

import (
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// plainProxy is httputil's proxy as it comes, for comparison: what the header
// rules, the pages and the reports cost.
func plainProxy(b *testing.B, up *Upstream, p protocol) *hop {
	b.Helper()
	target := &url.URL{Scheme: "http", Host: up.Key}
	rp := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target); r.SetXForwarded() },
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: upstreamIdlePerHost},
	}
	var ps http.Protocols
	ps.SetHTTP1(true)
	ps.SetHTTP2(true)
	ps.SetUnencryptedHTTP2(true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := &http.Server{Handler: rp, Protocols: &ps, ErrorLog: rp.ErrorLog}
	if p.tls {
		s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{selfsigned.Certificate(b, "example.org")}}
		go s.ServeTLS(l, "", "")
	} else {
		go s.Serve(l)
	}
	b.Cleanup(func() { s.Close() })
	return &hop{addr: l.Addr().String()}
}

// BenchmarkRequests measures requests that are small, and bodies that are not,
// through this package and through a bare ReverseProxy.
func BenchmarkRequests(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20} {
		for _, framing := range []string{"length", "chunked"} {
			payload := strings.Repeat("x", size)
			up := upstream(b, func(w http.ResponseWriter, r *http.Request) {
				if framing == "length" {
					w.Header().Set("Content-Length", fmt.Sprint(size))
					io.WriteString(w, payload)
					return
				}
				for rest := payload; rest != ""; {
					n := min(len(rest), 8<<10)
					io.WriteString(w, rest[:n])
					rest = rest[n:]
				}
				http.NewResponseController(w).Flush()
			})
			for _, p := range protocols {
				for _, kind := range []string{"vhost", "ReverseProxy"} {
					b.Run(fmt.Sprintf("%s/%d KiB %s/%s", p.name, size>>10, framing, kind), func(b *testing.B) {
						var h *hop
						if kind == "vhost" {
							h = p.hop(b, up, func(c *config) { c.OnRequest = func(Request) {}; c.Log = nil })
						} else {
							h = plainProxy(b, up, p)
						}
						c := p.client(b, h)
						c.Transport.(*http.Transport).MaxIdleConnsPerHost = 16
						get(b, c, p.url("/"))
						b.SetBytes(int64(size))
						b.ReportAllocs()
						b.ResetTimer()
						before := cpu()
						load(b, c, p.url("/"))
						// Client, hop and upstream together. Unlike the time, it
						// does not depend on what else this machine does.
						b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
					})
				}
			}
		}
	}
}

// cpu is what this process has taken of all processors so far, in ns.
func cpu() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// load makes b.N requests, eight at a time.
func load(b *testing.B, c *http.Client, url string) {
	var wg sync.WaitGroup
	work := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for range work {
				res, err := c.Get(url)
				if err != nil {
					b.Error(err)
					continue
				}
				if _, err := io.Copy(io.Discard, res.Body); err != nil {
					b.Error(err)
				}
				res.Body.Close()
			}
		})
	}
	for range b.N {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
}

// BenchmarkForwarded measures the header rules alone.
func BenchmarkForwarded(b *testing.B) {
	in := &http.Request{Host: "example.org", TLS: &tls.ConnectionState{}, Header: http.Header{}}
	for k, v := range map[string]string{"Accept": "*/*", "Accept-Encoding": "gzip", "Cookie": "a=b", "Content-Type": "text/plain", "Cache-Control": "no-cache", "User-Agent": "Mozilla/5.0", "X-Forwarded-For": "6.6.6.6"} {
		in.Header.Set(k, v)
	}
	info := ConnInfo{Client: addr("192.0.2.1:1"), ID: "0123456789abcdef"}
	b.ReportAllocs()
	for b.Loop() {
		setForwarded(in, "example.org", in.Header.Clone(), info, true, info.ID)
	}
}
