package vhost

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestStreamsDown checks that each piece of an answer arrives while the
// upstream holds the next one back, whatever the answer's framing.
func TestStreamsDown(t *testing.T) {
	for name, header := range map[string]http.Header{
		"chunked":            {},
		"known length":       {"Content-Length": {"30"}},
		"server-sent events": {"Content-Type": {"text/event-stream"}},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, p protocol) {
				next := make(chan bool)
				h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
					for k, v := range header {
						w.Header()[k] = v
					}
					http.NewResponseController(w).Flush() // the header alone
					for i := range 3 {
						select {
						case <-next:
						case <-r.Context().Done():
							return
						}
						fmt.Fprintf(w, "data: %d...", i)
						http.NewResponseController(w).Flush()
					}
				}))
				res, err := p.client(t, h).Get(p.url("/"))
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				buf := make([]byte, 10)
				for i := range 3 {
					next <- true // the piece after it is held back
					if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != fmt.Sprintf("data: %d...", i) {
						t.Fatalf("piece %d: %q, %v", i, buf, err)
					}
				}
				if n, err := res.Body.Read(buf); n != 0 || err != io.EOF {
					t.Errorf("end: %d, %v", n, err)
				}
			})
		})
	}
}

// TestStreamsUp checks that each piece of a request's body arrives while the
// client holds the next one back, and that the upstream may answer meanwhile.
func TestStreamsUp(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		got := make(chan string, 1)
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			buf := make([]byte, 5)
			for range 3 {
				if _, err := io.ReadFull(r.Body, buf); err != nil {
					got <- err.Error()
					return
				}
				got <- string(buf)
			}
		}))
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", p.url("/"), pr)
		done := make(chan error, 1)
		go func() {
			res, err := p.client(t, h).Do(req)
			if err == nil {
				res.Body.Close()
			}
			done <- err
		}()
		for i := range 3 {
			want := fmt.Sprintf("up %d.", i)
			io.WriteString(pw, want)
			select {
			case s := <-got:
				if s != want {
					t.Fatalf("got %q, want %q", s, want)
				}
			case <-time.After(deadline):
				t.Fatalf("piece %d is held back", i)
			}
		}
		pw.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestTrailers checks trailers both ways, announced and not.
func TestTrailers(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/empty" {
				w.Header().Set(http.TrailerPrefix+"Late", "no body")
				return
			}
			w.Header().Set("Trailer", "Sum")
			io.Copy(w, r.Body)
			w.Header().Set("Sum", "up was "+r.Trailer.Get("Up"))
			w.Header().Set(http.TrailerPrefix+"Late", "not announced")
		}))
		c := p.client(t, h)
		req, _ := http.NewRequest("POST", p.url("/"), io.MultiReader(strings.NewReader("some "), strings.NewReader("body")))
		req.Trailer = http.Header{"Up": nil}
		req.Body = &onEOF{req.Body, func() { req.Trailer.Set("Up", "high") }}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(body) != "some body" {
			t.Errorf("body %q, %v", body, err)
		}
		if got := res.Trailer.Get("Sum"); got != "up was high" {
			t.Errorf("announced trailer %q", got)
		}
		if got := res.Trailer.Get("Late"); got != "not announced" {
			t.Errorf("unannounced trailer %q", got)
		}
		if res, _ := get(t, c, p.url("/empty")); res.Trailer.Get("Late") != "no body" {
			t.Errorf("trailer without a body: %v", res.Trailer)
		}
	})
	t.Run("up, not announced, h1", func(t *testing.T) {
		h := newHop(t, upstream(t, echoHeader))
		_, body := rawDo(t, h, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 42\r\n\r\n")
		if !strings.Contains(body, "trailer X-Sum: 42") {
			t.Errorf("got:\n%s", body)
		}
	})
	t.Run("up, with a name that is none, h1", func(t *testing.T) {
		h := newHop(t, upstream(t, echoHeader))
		for _, name := range []string{"X Sum", "X\xe9", "X(", ""} {
			res, body := rawDo(t, h, "POST / HTTP/1.1\r\nHost: a\r\nTrailer: "+name+"\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
			if res.StatusCode != 200 || strings.Contains(body, "trailer ") {
				t.Errorf("%q: %d %s", name, res.StatusCode, body)
			}
		}
	})
	t.Run("up, h2 with a length", func(t *testing.T) {
		p := protocols[1]
		h := p.hop(t, upstream(t, echoHeader))
		req, _ := http.NewRequest("POST", p.url("/"), strings.NewReader("four"))
		req.Trailer = http.Header{"Up": {"high"}}
		res, err := p.client(t, h).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); !strings.Contains(string(body), "trailer Up: high") {
			t.Errorf("got:\n%s", body)
		}
	})
}

type onEOF struct {
	io.ReadCloser
	f func()
}

func (o *onEOF) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if err == io.EOF {
		o.f()
	}
	return n, err
}

// TestExpect checks that the upstream decides about Expect: 100-continue: the
// client sends its body only once the upstream has asked for it. (net/http's
// HTTP/2 server hides Expect from handlers, so there this hop decides.)
func TestExpect(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		asks := make(chan bool)
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/no" {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
				return
			}
			<-asks
			io.Copy(w, r.Body) // says 100 Continue
		}))
		c := p.client(t, h)
		var sent atomic.Int64
		do := func(path string) (*http.Response, error) {
			body := &onEOF{io.NopCloser(strings.NewReader("the body")), func() { sent.Add(1) }}
			req, _ := http.NewRequest("PUT", p.url(path), body)
			req.ContentLength = 8
			req.Header.Set("Expect", "100-continue")
			return c.Do(req)
		}
		res, err := do("/no")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusRequestEntityTooLarge || !p.h2 && sent.Load() != 0 {
			t.Errorf("status %d, body sent %d times; want 413 and never", res.StatusCode, sent.Load())
		}
		go func() {
			time.Sleep(200 * time.Millisecond)
			if !p.h2 && sent.Load() != 0 {
				t.Error("the hop asked for the body before the upstream did")
			}
			asks <- true
		}()
		res, err = do("/yes")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(body) != "the body" {
			t.Errorf("body %q", body)
		}
	})
}

// TestEarlyHints checks that informational answers pass.
func TestEarlyHints(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			io.WriteString(w, "page")
		}), func(c *config) { c.HSTS = func() string { return "max-age=7" } })
		hints := ""
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = fmt.Sprint(code, h.Get("Link"), len(h))
			return nil
		}})
		res, body := get(t, p.client(t, h), p.url("/"), func(r *http.Request) { *r = *r.WithContext(ctx) })
		if v := res.Header["Strict-Transport-Security"]; (len(v) == 1 && v[0] == "max-age=7") != p.tls {
			t.Errorf("the page after the hints has HSTS %q", v)
		}
		if hints != "103</style.css>; rel=preload1" || body != "page" || res.StatusCode != 200 {
			t.Errorf("hints %q, then %d %q", hints, res.StatusCode, body)
		}
		if got := h.request(t, 1); got.Status != 200 || got.BytesOut != 4 {
			t.Errorf("reported %d, %d bytes", got.Status, got.BytesOut)
		}
	})
}

// TestLarge sends large bodies both ways at once and compares sums.
func TestLarge(t *testing.T) {
	const size = 12 << 20
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			io.Copy(w, r.Body)
		}))
		up, down := sha256.New(), sha256.New()
		src := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), up)
		req, _ := http.NewRequest("POST", p.url("/"), src)
		res, err := p.client(t, h).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		n, err := io.Copy(down, res.Body)
		if err != nil || n != size || !bytes.Equal(up.Sum(nil), down.Sum(nil)) {
			t.Errorf("%d bytes came back, %v; equal: %v", n, err, bytes.Equal(up.Sum(nil), down.Sum(nil)))
		}
		if q := h.request(t, 1); q.BytesIn != size || q.BytesOut != size {
			t.Errorf("reported %d up, %d down", q.BytesIn, q.BytesOut)
		}
	})
}

// TestBodilessAnswers checks what must not be touched: HEAD, 304, 204, an empty
// type, encodings, redirects.
func TestBodilessAnswers(t *testing.T) {
	h1 := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/304":
			w.Header().Set("ETag", `"x"`)
			w.WriteHeader(http.StatusNotModified)
		case "/204":
			w.WriteHeader(http.StatusNoContent)
		case "/302":
			w.Header().Set("Location", "/elsewhere?a=b;c")
			w.WriteHeader(http.StatusFound)
		case "/untyped":
			w.Header()["Content-Type"] = nil
			io.WriteString(w, "<html>guess me")
		case "/gzip":
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("X-Accept", r.Header.Get("Accept-Encoding"))
			io.WriteString(w, "not really")
		default:
			w.Header().Set("Content-Length", "12345")
			w.Header().Set("X-Method", r.Method)
		}
	}
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, h1))
		c := p.client(t, h)
		res, body := get(t, c, p.url("/"), func(r *http.Request) { r.Method = "HEAD" })
		if res.ContentLength != 12345 || body != "" || res.Header.Get("X-Method") != "HEAD" {
			t.Errorf("HEAD: %d, %v", res.ContentLength, res.Header)
		}
		if res, _ := get(t, c, p.url("/304"), func(r *http.Request) { r.Header.Set("If-None-Match", `"x"`) }); res.StatusCode != 304 || res.Header.Get("ETag") != `"x"` {
			t.Errorf("304: %d %v", res.StatusCode, res.Header)
		}
		if res, _ := get(t, c, p.url("/204")); res.StatusCode != 204 || res.Header.Get("Content-Length") != "" {
			t.Errorf("204: %d %v", res.StatusCode, res.Header)
		}
		if res, _ := get(t, c, p.url("/302")); res.StatusCode != 302 || res.Header.Get("Location") != "/elsewhere?a=b;c" {
			t.Errorf("302: %d %v", res.StatusCode, res.Header)
		}
		if res, body := get(t, c, p.url("/untyped")); res.Header.Get("Content-Type") != "" || body != "<html>guess me" {
			t.Errorf("a type was guessed: %v", res.Header)
		}
		if res, body := get(t, c, p.url("/gzip")); res.Header.Get("Content-Encoding") != "gzip" || body != "not really" || res.Header.Get("X-Accept") != "" {
			t.Errorf("encoding: %v %q", res.Header, body)
		}
	})
}

// TestUpstreamCutsOff checks that an answer which breaks off upstream breaks
// off downstream, and does not look whole.
func TestUpstreamCutsOff(t *testing.T) {
	for name, head := range map[string]string{
		"chunked":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"known length": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
		"reset":        "HTTP/1.1 200 OK\r\n\r\nhello",
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, p protocol) {
				cut := make(chan bool)
				h := p.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
					readHead(br)
					io.WriteString(c, head)
					<-cut
					if name == "reset" {
						c.SetLinger(0)
					}
				}))
				res, err := p.client(t, h).Get(p.url("/"))
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				b := make([]byte, 5)
				if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != "hello" {
					t.Fatalf("%q, %v", b, err)
				}
				close(cut)
				if rest, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("the answer ended well after %q", rest)
				}
				if q := h.request(t, 1); !errors.Is(q.Err, errCutOff) || q.Status != 200 || q.BytesOut != 5 {
					t.Errorf("reported %d, %d bytes, %v", q.Status, q.BytesOut, q.Err)
				}
			})
		})
	}
}

// TestUpstreamDiesDuringUpload checks that a client in the middle of a body, with
// nothing to send for a while, hears of an upstream that has died.
func TestUpstreamDiesDuringUpload(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			io.ReadFull(br, make([]byte, len("4\r\npart\r\n")))
			c.SetLinger(0)
		}), func(c *config) { c.StallTimeout = 10 * deadline })
		var res *http.Response
		var err error
		if p.h2 {
			pr, pw := io.Pipe()
			defer pw.Close()
			go io.WriteString(pw, "part")
			req, _ := http.NewRequest("POST", p.url("/"), pr)
			res, err = p.client(t, h).Do(req)
		} else { // Go's own client waits for the pipe
			c, br := raw(t, h, p.tls)
			io.WriteString(c, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n")
			res, err = http.ReadResponse(br, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if b, _ := io.ReadAll(res.Body); !strings.Contains(string(b), "laptop closed the connection") {
			t.Errorf("%q", b)
		}
		if res.StatusCode != http.StatusBadGateway {
			t.Errorf("status %d", res.StatusCode)
		}
		if q := h.request(t, 1); q.Status != http.StatusBadGateway || q.BytesIn != 4 {
			t.Errorf("reported %d, %d bytes, %v", q.Status, q.BytesIn, q.Err)
		}
	})
}

// TestClientLeaves checks that a client that goes away ends what the upstream
// does for it: before the answer, in the middle of it, and while it uploads.
func TestClientLeaves(t *testing.T) {
	for _, when := range []string{"/before", "/during", "/upload"} {
		t.Run(when, func(t *testing.T) {
			each(t, func(t *testing.T, p protocol) {
				started, ended := make(chan bool, 1), make(chan error, 1)
				h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
					switch r.URL.Path {
					case "/during":
						io.WriteString(w, "hello")
						http.NewResponseController(w).Flush()
					case "/upload":
						started <- true
						_, err := io.Copy(io.Discard, r.Body)
						ended <- err
						return
					}
					started <- true
					<-r.Context().Done()
					ended <- r.Context().Err()
				}))
				ctx, leave := context.WithCancel(t.Context())
				var body io.Reader
				if when == "/upload" {
					pr, pw := io.Pipe()
					defer context.AfterFunc(ctx, func() { pw.CloseWithError(io.ErrClosedPipe) })() // or the client waits for it
					body = pr
					go io.WriteString(pw, "a part of it")
				}
				req, _ := http.NewRequestWithContext(ctx, "POST", p.url(when), body)
				midway, gone := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(gone)
					res, err := p.client(t, h).Do(req)
					if err == nil {
						io.ReadFull(res.Body, make([]byte, len("hello")))
						close(midway)
						io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
				}()
				<-started
				if when == "/during" {
					<-midway
				}
				leave()
				select {
				case err := <-ended:
					if err == nil {
						t.Error("the upstream saw a whole request")
					}
				case <-time.After(deadline):
					t.Fatal("the upstream works on")
				}
				<-gone
				q := h.request(t, 1)
				if !errors.Is(q.Err, errClientLeft) {
					t.Errorf("reported %d, %v", q.Status, q.Err)
				}
				if when != "/during" && q.Status != statusClientLeft {
					t.Errorf("status %d", q.Status)
				}
			})
		})
	}
}

// TestEarlyAnswer checks that an upstream may answer before it has read a large
// body, and that the client sees the answer.
func TestEarlyAnswer(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			io.WriteString(w, "who are you")
		}))
		req, _ := http.NewRequest("POST", p.url("/"), io.LimitReader(rand.NewChaCha8([32]byte{}), 200<<10))
		res, err := p.client(t, h).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); res.StatusCode != 401 || string(body) != "who are you" {
			t.Errorf("%d %q", res.StatusCode, body)
		}
	})
}

// TestEndOfBodyAfterAnswer ends a request's body after the answer, when the transport still waits for it:
// nothing panics, and the connection, whose answer has said so, ends.
func TestEndOfBodyAfterAnswer(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly"
	for name, form := range map[string]struct{ head, rest string }{
		"chunked":          {"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", "0\r\n\r\n"},
		"with a length":    {"Content-Length: 5\r\n\r\nhi", "you"},
		"before the first": {"Content-Length: 5\r\n\r\n", "hello"},
	} {
		h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			readHead(br)
			io.WriteString(c, answer)
			io.Copy(io.Discard, br)
		}))
		c, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(deadline))
		io.WriteString(c, "POST /x HTTP/1.1\r\nHost: a\r\n"+form.head)
		br := bufio.NewReader(c)
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		if res.StatusCode != 200 || string(body) != "early" || !res.Close {
			t.Errorf("%s: %s %q, Connection: close: %v", name, res.Status, body, res.Close)
		}
		h.request(t, 1)
		io.WriteString(c, form.rest+"GET /y HTTP/1.1\r\nHost: a\r\n\r\n")
		if left, _ := io.ReadAll(br); len(left) > 0 {
			t.Errorf("%s: %q follows the last answer", name, left)
		}
		if said := h.log.String(); strings.Contains(said, "panic") {
			t.Errorf("%s: %s", name, said)
		}
	}
}

// TestStall checks that bodies which move slowly are left alone for longer than
// the stall timeout, and that those which don't move end.
func TestStall(t *testing.T) {
	const stall = 400 * time.Millisecond
	each(t, func(t *testing.T, p protocol) {
		t.Parallel() // it mostly waits
		// A busy machine may be the one that pauses: then longer times show whether the hop is to blame.
		for stall := stall; ; stall *= 3 {
			err := slowly(t, p, stall)
			if err == nil {
				break
			}
			if stall > 10*time.Second {
				t.Fatalf("a body that moves slowly: %v", err)
			}
		}
	})
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) }), func(c *config) { c.StallTimeout = stall })
		pr, pw := io.Pipe()
		defer pw.Close() // it stands still until there is an answer
		go io.WriteString(pw, "piece")
		req, _ := http.NewRequest("POST", p.url("/"), pr)
		res, err := p.client(t, h).Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode != http.StatusRequestTimeout {
				t.Errorf("a body that stands still: %d", res.StatusCode)
			}
		}
		if q := h.request(t, 1); q.Status != http.StatusRequestTimeout || !errors.Is(q.Err, os.ErrDeadlineExceeded) {
			t.Errorf("reported %d, %v", q.Status, q.Err)
		}
	})
	t.Run("a reader that stops", func(t *testing.T) {
		ended := make(chan bool, 1)
		h := newHop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			defer func() { ended <- true }()
			io.Copy(w, rand.NewChaCha8([32]byte{}))
		}), func(c *config) { c.StallTimeout = stall })
		c, _ := raw(t, h, false)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		select {
		case <-ended:
		case <-time.After(deadline):
			t.Error("the upstream is held up for ever")
		}
	})
	t.Run("an answer with long pauses", func(t *testing.T) {
		h := newHop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			for range 3 {
				io.WriteString(w, "event")
				http.NewResponseController(w).Flush()
				time.Sleep(2 * stall)
			}
		}), func(c *config) { c.StallTimeout = stall })
		if _, body := get(t, protocols[0].client(t, h), "http://a/"); body != "eventeventevent" {
			t.Errorf("got %q", body)
		}
	})
}

// slowly sends a body that takes three times as long as a stall may, to an
// upstream that thinks as long.
func slowly(t *testing.T, p protocol, stall time.Duration) error {
	var seen atomic.Int64
	h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		seen.Store(n)
		if err != nil {
			return
		}
		time.Sleep(3 * stall) // thinking is not stalling
		io.WriteString(w, "thanks")
	}), func(c *config) { c.StallTimeout = stall })
	pr, pw := io.Pipe()
	go func() {
		defer pw.Close()
		for range 12 {
			if _, err := io.WriteString(pw, "piece"); err != nil {
				return
			}
			time.Sleep(stall / 4)
		}
	}()
	req, _ := http.NewRequest("POST", p.url("/"), pr)
	c := p.client(t, h)
	c.Timeout += 10 * stall
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); string(body) != "thanks" || err != nil || seen.Load() != 60 {
		return fmt.Errorf("%d %q, %v, upstream saw %d bytes", res.StatusCode, body, err, seen.Load())
	}
	return nil
}

// TestManyAtOnce sends many requests at once through one hop.
func TestManyAtOnce(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			io.WriteString(w, r.URL.Path+" ")
			w.Write(body)
		}))
		c := p.client(t, h)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				body := strings.Repeat(fmt.Sprint(i, ","), 1+i*50)
				res, err := c.Post(p.url(fmt.Sprint("/", i)), "text/plain", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				defer res.Body.Close()
				if got, err := io.ReadAll(res.Body); err != nil || string(got) != fmt.Sprint("/", i, " ")+body {
					t.Errorf("request %d: %d bytes, %v", i, len(got), err)
				}
			})
		}
		wg.Wait()
	})
}
