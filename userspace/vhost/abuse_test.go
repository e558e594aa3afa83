package vhost

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// counting is an upstream that counts what reaches it.
func counting(t testing.TB) (*Upstream, *atomic.Int64, *sync.Map) {
	var n atomic.Int64
	var targets sync.Map
	return upstream(t, func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		body, _ := io.ReadAll(r.Body)
		targets.Store(r.RequestURI, string(body))
		fmt.Fprintf(w, "%s %q", r.RequestURI, body)
	}), &n, &targets
}

// TestSmuggling sends requests whose end is a matter of opinion. The upstream
// must see none, or the one that this hop sees; never the one hidden in it.
func TestSmuggling(t *testing.T) {
	const hidden = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, request := range map[string]string{
		"both lengths":              "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"both, the other way":       "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n0\r\n\r\n",
		"two lengths":               "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 33\r\n\r\n" + hidden,
		"two lengths in one":        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 33\r\n\r\n" + hidden,
		"a signed length":           "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n" + hidden,
		"a negative length":         "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n" + hidden,
		"chunked twice":             "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"an odd coding":             "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden,
		"identity":                  "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\nTransfer-Encoding: identity\r\n\r\n" + hidden,
		"space before the colon":    "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\nContent-Length: 33\r\n\r\n" + hidden,
		"folded":                    "POST /x HTTP/1.1\r\nHost: a\r\nX: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
		"a bare CR in a value":      "POST /x HTTP/1.1\r\nHost: a\r\nX: y\rTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
		"a huge chunk":              "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + hidden,
		"a chunk without its end":   "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhixx0\r\n\r\n" + hidden,
		"a bare LF in a chunk size": "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x\nhi\r\n0\r\n\r\n",
		"two hosts":                 "GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
		"no host":                   "GET /x HTTP/1.1\r\n\r\n",
		"an underscore":             "POST /x HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.0 and chunked":      "POST /x HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"a version of the future":   "GET /x HTTP/3.0\r\nHost: a\r\n\r\n",
		"a NUL in a value":          "GET /x HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			up, n, targets := counting(t)
			h := newHop(t, up, func(c *config) { c.IdleTimeout = 200 * time.Millisecond }) // after which it closes
			c, br := raw(t, h, false)
			io.WriteString(c, request)
			answer, _ := io.ReadAll(br)
			statuses := strings.Count(string(answer), "HTTP/1.")
			if n.Load() > 1 {
				t.Errorf("%d requests reached the upstream", n.Load())
			}
			if _, ok := targets.Load("/hidden"); ok && !strings.HasPrefix(string(answer), "HTTP/1.1 400") {
				t.Errorf("the hidden request reached the upstream")
			}
			if n.Load() == 0 && !strings.HasPrefix(string(answer), "HTTP/1.1 4") && !strings.HasPrefix(string(answer), "HTTP/1.1 5") {
				t.Errorf("neither served nor refused: %q", answer)
			}
			t.Logf("%d served, %d answers: %.60q", n.Load(), statuses, answer)
		})
	}
}

// TestBothLengths checks that nothing is served that follows a chunked body on its connection. With a length
// beside it who is before this hop may have seen another end, and taken what follows from somebody else.
func TestBothLengths(t *testing.T) {
	const next = "GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
	for _, overTLS := range []bool{false, true} {
		for request, served := range map[string]bool{
			"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":  false,
			"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n0\r\n\r\n": false,
			"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n":   false,
			"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":                       false,
			"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n0\r\n\r\n":                                true,
			"GET /x HTTP/1.1\r\nHost: a\r\n\r\n":                                                               true,
		} {
			for _, hop := range []bool{false, true} {
				up, n, targets := counting(t)
				h := protocol{tls: overTLS}.hop(t, up, func(c *config) {
					c.info = func(i ConnInfo) ConnInfo { i.Trusted = hop; return i }
				})
				answer, _ := speak(t, h, overTLS, request+next)
				want := int64(1)
				if served || hop && !overTLS {
					want = 2
				}
				if _, ok := targets.Load("/next"); ok != (want == 2) || n.Load() != want || strings.Count(answer, "\r\nConnection: close\r\n") != 1 {
					t.Errorf("tls=%t, from a hop: %t, %q: %d served, %q", overTLS, hop, request, n.Load(), answer)
				}
			}
		}
	}
}

// TestHeaderFlood checks that headers are bounded in size, and in time.
func TestHeaderFlood(t *testing.T) {
	up, n, _ := counting(t)
	change := func(c *config) { c.HeaderTimeout = 500 * time.Millisecond }
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, up)
		req, _ := http.NewRequest("GET", p.url("/"), nil)
		for i := range 300 {
			req.Header.Set(fmt.Sprintf("X-%d", i), strings.Repeat("a", 1000))
		}
		res, err := p.client(t, h).Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("status %d", res.StatusCode)
			}
		}
		if n.Load() != 0 {
			t.Error("the flood reached the upstream")
		}
		// A cookie jar of a usual size passes.
		res, _ = get(t, p.client(t, h), p.url("/"), func(r *http.Request) { r.Header.Set("Cookie", strings.Repeat("a", 60<<10)) })
		if res.StatusCode != 200 {
			t.Errorf("60 KiB of cookies: %d", res.StatusCode)
		}
		n.Store(0)
	})
	for _, overTLS := range []bool{false, true} {
		t.Run(fmt.Sprintf("slow, tls=%t", overTLS), func(t *testing.T) {
			h := protocol{tls: overTLS}.hop(t, up, change)
			c, br := raw(t, h, overTLS)
			go func() {
				for {
					if _, err := io.WriteString(c, "G"); err != nil {
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
			}()
			if _, err := io.ReadAll(br); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a slow header is waited for without end")
			}
			eventually(t, "ServeConn returns", func() bool { return h.served.Load() == 1 })
		})
	}
	t.Run("slow handshake", func(t *testing.T) {
		h := protocol{tls: true}.hop(t, up, change)
		c, br := raw(t, h, false)
		c.Write([]byte{0x16, 0x03, 0x01, 0x01})
		io.ReadAll(br)
		if err := <-h.serveErr; err == nil {
			t.Error("ServeConn has no error")
		}
	})
	t.Run("idle", func(t *testing.T) {
		h := newHop(t, up, func(c *config) { c.IdleTimeout = 200 * time.Millisecond })
		c, br := raw(t, h, false)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if b, err := io.ReadAll(br); err != nil || !strings.Contains(string(b), "200 OK") {
			t.Errorf("%q, %v", b, err)
		}
	})
}

// framed is an HTTP/2 client that writes frames itself.
func framed(t *testing.T, h *hop) (*http2.Framer, net.Conn, func(stream uint32, path string, end bool)) {
	t.Helper()
	return protocols[3].framed(t, h)
}

func (p protocol) framed(t *testing.T, h *hop) (*http2.Framer, net.Conn, func(stream uint32, path string, end bool)) {
	t.Helper()
	c, _ := raw(t, h, false)
	if p.tls {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: "example.org", NextProtos: []string{"h2"}})
	}
	io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	f.WriteSettings()
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	return f, c, func(stream uint32, path string, end bool) {
		block.Reset()
		for _, kv := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "example.org"}, {":path", path}} {
			enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte(block.String()), EndHeaders: true, EndStream: end})
	}
}

// TestRapidReset opens and resets streams as fast as it can (CVE-2023-44487).
// The upstream's work must stay bounded, and another client must be served.
func TestRapidReset(t *testing.T) {
	var now, most atomic.Int64
	release := make(chan bool)
	h := protocols[3].hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok" {
			return
		}
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-release // an upstream that does not notice
	}))
	defer close(release)
	f, _, open := framed(t, h)
	go func() {
		for { // so that the server is never stuck in writing
			if _, err := f.ReadFrame(); err != nil {
				return
			}
		}
	}()
	for i := range 5000 {
		open(uint32(2*i+1), "/", true)
		if err := f.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel); err != nil {
			break // the server has had enough of it
		}
	}
	if res, _ := get(t, protocols[3].client(t, h), "https://example.org/ok"); res.StatusCode != 200 {
		t.Errorf("another client got %d", res.StatusCode)
	}
	if m := most.Load(); m > 2*maxStreams {
		t.Errorf("%d requests at once at the upstream, allowed are %d streams", m, maxStreams)
	}
	t.Logf("at most %d requests at once", most.Load())
}

// TestEmptyWindow checks that nothing is kept of a request whose small answer the
// client doesn't take: the server does so by itself, for as long as that lasts.
func TestEmptyWindow(t *testing.T) {
	var asked atomic.Pointer[http.Request]
	h := newHop(t, nil, overTLS(t, "example.org"), func(o *config) {
		o.Guard = func(_ http.ResponseWriter, v *Visit) error {
			asked.Store(v.Request)
			return &Refusal{Status: http.StatusForbidden, Title: "No", Err: errors.New("no")}
		}
	})
	f, _, open := framed(t, h)
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	open(1, "/", true)
	// Nobody flushes a page: its header comes once the handler has returned.
	for answered, ended := false, false; !ended; {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch frame := frame.(type) {
		case *http2.HeadersFrame:
			answered = true
			if r := asked.Load(); r.Header != nil || r.URL != nil || r.RequestURI != "" {
				t.Errorf("the server keeps %s and its header", r.RequestURI)
			}
			f.WriteWindowUpdate(1, 1<<16)
		case *http2.DataFrame:
			if !answered {
				t.Error("data before the header")
			}
			ended = frame.StreamEnded()
		}
	}
}

// TestEmptyWindowInCrowd checks that a client with many connections has to take the end of an answer soon:
// the handler has returned, and nothing counts what is left. Others may take their time.
func TestEmptyWindowInCrowd(t *testing.T) {
	const lastWait = time.Second
	up, _, _ := counting(t)
	for _, crowded := range []bool{true, false} {
		h := newHop(t, up, overTLS(t, "example.org"), func(o *config) {
			o.info = func(i ConnInfo) ConnInfo { i.Crowded = crowded; return i }
		})
		h.lastWait = lastWait
		f, c, open := framed(t, h)
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		open(1, "/", true)
		reset := false
		c.SetReadDeadline(time.Now().Add(deadline))
		for asked := false; !reset; {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch frame := frame.(type) {
			case *http2.HeadersFrame:
				if crowded || asked {
					continue
				}
				time.Sleep(3 * lastWait) // the other one takes it, late
				f.WriteWindowUpdate(1, 1<<16)
				asked = true
			case *http2.DataFrame:
				reset = frame.StreamEnded()
				if reset && crowded {
					t.Error("the answer ends as if it had been taken")
				}
			case *http2.RSTStreamFrame:
				reset = true
				if !crowded {
					t.Error("a client with few connections is reset")
				}
			}
		}
	}
}

// TestUnreadConnection checks that a client of HTTP/2 which reads nothing at all is cut soon: the server
// keeps up to 10,000 frames for it, answers to its PINGs. One of HTTP/1 is only slow to take its answer.
func TestUnreadConnection(t *testing.T) {
	const stall = 2 * time.Second
	endless := func(gone chan<- struct{}) *Upstream {
		return upstream(t, func(w http.ResponseWriter, r *http.Request) {
			for piece := make([]byte, 64<<10); ; {
				if _, err := w.Write(piece); err != nil {
					close(gone)
					return
				}
			}
		})
	}
	gone1, gone2 := make(chan struct{}), make(chan struct{})
	h1, h2 := newHop(t, endless(gone1)), newHop(t, endless(gone2), overTLS(t, "example.org"))
	h1.http2Stall, h2.http2Stall = stall, stall
	c, err := net.Dial("tcp", h1.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
	f, _, open := framed(t, h2)
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	f.WriteWindowUpdate(0, 1<<30)
	open(1, "/", true)
	select {
	case <-gone2:
	case <-time.After(deadline):
		t.Fatalf("not cut in %v", deadline)
	}
	time.Sleep(stall)
	select {
	case <-gone1:
		t.Error("a client of HTTP/1 is cut as soon")
	default:
	}
}

// TestStreamLimit checks that the limit on streams is announced: a client gets
// fewer than a hop that carries many, and fewer still where it has many
// connections.
func TestStreamLimit(t *testing.T) {
	elsewhere := netip.MustParseAddrPort("192.0.2.1:1")
	for _, c := range []struct {
		name string
		info func(ConnInfo) ConnInfo
		want uint32
	}{
		{"client", nil, clientStreams},
		{"hop", func(i ConnInfo) ConnInfo {
			i.Trusted, i.Unknown = true, &UnsaidError{Hop: i.Peer.Addr(), Itself: true}
			return i
		}, maxStreams},
		{"client behind a hop", func(i ConnInfo) ConnInfo { i.Trusted, i.Client = true, elsewhere; return i }, clientStreams},
		{"client with many connections", func(i ConnInfo) ConnInfo { i.Crowded = true; return i }, crowdStreams},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHop(t, nil, overTLS(t, "example.org"), func(o *config) { o.info = c.info })
			f, _, _ := framed(t, h)
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			s, ok := frame.(*http2.SettingsFrame)
			if !ok {
				t.Fatalf("first frame: %v", frame)
			}
			if v, ok := s.Value(http2.SettingMaxConcurrentStreams); !ok || v != c.want {
				t.Errorf("%d streams, %t: want %d", v, ok, c.want)
			}
		})
	}
}

// TestManyIdle checks that connections which say nothing don't keep a normal
// request from being served.
func TestManyIdle(t *testing.T) {
	up, _, _ := counting(t)
	h := newHop(t, up, func(c *config) { c.HeaderTimeout = 10 * deadline }) // until then they stay
	for range 500 {
		raw(t, h, false)
	}
	if res, _ := get(t, protocols[0].client(t, h), "http://a/"); res.StatusCode != 200 {
		t.Errorf("status %d", res.StatusCode)
	}
}

// TestMalformedHTTP2 sends headers that HTTP/2 has no place for (RFC 9113 8.2.2),
// and forms that a hop to HTTP/1.1 could take for another request.
func TestMalformedHTTP2(t *testing.T) {
	up, n, targets := counting(t)
	h := protocols[3].hop(t, up)
	for _, bad := range [][2]string{
		{"connection", "x-forwarded-for"}, {"connection", "keep-alive"}, {"proxy-connection", "keep-alive"}, {"keep-alive", "1"}, {"upgrade", "h2c"},
		{"transfer-encoding", "chunked"}, {"te", "gzip"}, {"content-length", "5"}, {"x", "a\r\nGET /hidden HTTP/1.1"}, {"x", "a\x00b"}, {"X-Upper", "a"}, {"x y", "a"}, {":status", "200"}, {":path", "/twice"}, {"host", "other.example"},
	} {
		f, _, _ := framed(t, h)
		var block strings.Builder
		enc := hpack.NewEncoder(&block)
		for _, kv := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "example.org"}, {":path", "/"}, bad} {
			enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte(block.String()), EndHeaders: true, EndStream: true})
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		status := ""
		for status == "" {
			frame, err := f.ReadFrame()
			if err != nil {
				status = "closed"
			}
			switch frame := frame.(type) {
			case *http2.MetaHeadersFrame:
				status = frame.PseudoValue("status")
			case *http2.RSTStreamFrame, *http2.GoAwayFrame:
				status = "reset"
			}
		}
		refused := status == "400" || status == "reset" || status == "closed"
		switch bad[0] {
		case "content-length": // beside the end of the stream, which counts
			sent, _ := targets.Load("/")
			refused = status == "200" && n.Swap(0) == 1 && sent == ""
		}
		if !refused || n.Load() != 0 {
			t.Errorf("%q: %s, %d requests reached the upstream", bad, status, n.Swap(0))
		}
	}
}
