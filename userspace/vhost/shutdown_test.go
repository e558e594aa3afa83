package vhost

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// shutDown begins a Shutdown of h, and returns when it takes no more connections. It has to end well.
func shutDown(t *testing.T, h *hop) (ended func()) {
	t.Helper()
	down := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		down <- h.Shutdown(ctx)
	}()
	eventually(t, "Shutdown has begun", h.isEnding.Load)
	return func() {
		t.Helper()
		if err := <-down; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	}
}

// unhurried is a hop that waits for requests for as long as a slow machine takes.
func (p protocol) unhurried(t *testing.T, up *Upstream, change ...func(*config)) *hop {
	h := p.hop(t, up, append(change, func(c *config) { c.HeaderTimeout = deadline })...)
	h.firstCall, h.lastCall = deadline, deadline
	return h
}

// TestShutdownFirst: a connection on which no request has come gets the answer to its first, and that is its
// last.
func TestShutdownFirst(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.unhurried(t, upstream(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
		client := p.client(t, h)
		tr := client.Transport.(*http.Transport)
		var ended func()
		dial := func(protos []string) func(ctx context.Context, _, _ string) (net.Conn, error) {
			return func(ctx context.Context, _, _ string) (net.Conn, error) {
				c, err := net.Dial("tcp", h.addr)
				if err == nil && protos != nil {
					c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: protos})
					err = c.(*tls.Conn).HandshakeContext(ctx)
				}
				eventually(t, "the connection has come", func() bool {
					h.Server.mu.Lock()
					defer h.Server.mu.Unlock()
					return len(h.conns) == 1
				})
				ended = shutDown(t, h)
				return c, err
			}
		}
		tr.DialContext = dial(nil)
		if p.h2 {
			tr.DialTLSContext = dial([]string{"h2"})
		} else {
			tr.DialTLSContext = dial([]string{"http/1.1"})
		}
		if res, body := get(t, client, p.url("/")); body != "hello" || !p.h2 && !res.Close {
			t.Errorf("%q, and close is %v", body, res.Close)
		}
		ended()
	})
}

// TestShutdownKept: a connection that is kept gets one more answer, also where its head is only begun, or the
// answer before has promised that more would come.
func TestShutdownKept(t *testing.T) {
	const request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
	for _, c := range []struct {
		name     string
		lastCall time.Duration
		before   string // it is sent before Shutdown
		release  bool   // the first answer ends behind it
	}{
		{"idle", deadline, "", false},
		{"begun", 0, request[:10], false},
		{"promised", deadline, "", true},
	} {
		for _, p := range protocols {
			if p.h2 {
				continue
			}
			t.Run(c.name+" "+p.name, func(t *testing.T) {
				release := make(chan bool)
				h := p.unhurried(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
					fmt.Fprint(w, "hel")
					http.NewResponseController(w).Flush()
					<-release
					fmt.Fprint(w, "lo")
				}))
				h.lastCall = c.lastCall
				conn, br := raw(t, h, p.tls)
				answer := func() (res *http.Response, end func()) {
					t.Helper()
					res, err := http.ReadResponse(br, nil)
					if err != nil {
						t.Fatal(err)
					}
					return res, func() {
						t.Helper()
						if b, err := io.ReadAll(res.Body); string(b) != "hello" || err != nil {
							t.Errorf("%q, %v", b, err)
						}
					}
				}
				io.WriteString(conn, request)
				first, end := answer()
				if first.Close {
					t.Error("the first answer says that it is the last")
				}
				if !c.release {
					close(release)
					end()
					eventually(t, "it is idle", func() bool { return h.only(t).awaits.Load() != 0 })
				}
				io.WriteString(conn, c.before)
				if c.before != "" {
					eventually(t, "the head has begun", func() bool { return h.only(t).heard.Load() != 0 })
				}
				ended := shutDown(t, h)
				if c.release {
					close(release)
					end()
				}
				io.WriteString(conn, strings.TrimPrefix(request, c.before))
				last, end := answer()
				end()
				if !last.Close {
					t.Error("the last answer does not say so")
				}
				ended()
			})
		}
	}
}

// only is the one connection of h.
func (h *hop) only(t *testing.T) *conn {
	t.Helper()
	h.Server.mu.Lock()
	defer h.Server.mu.Unlock()
	for c := range h.conns {
		return c
	}
	t.Fatal("there is no connection")
	return nil
}

// TestShutdownIdle: who says nothing more is not waited for.
func TestShutdownIdle(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
		h.firstCall, h.lastCall = 0, 0
		get(t, p.client(t, h), p.url("/"))
		silent, br := raw(t, h, p.tls)
		if p.tls {
			if err := silent.(*tls.Conn).Handshake(); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "both have come", func() bool {
			h.Server.mu.Lock()
			defer h.Server.mu.Unlock()
			return len(h.conns) == 2
		})
		shutDown(t, h)()
		if b, err := io.ReadAll(bufio.NewReader(br)); len(b) > 0 || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	})
}

// TestShutdownGoAway: a connection of HTTP/2 is told to go at once, and its answers come whole, though others
// are still waited for.
func TestShutdownGoAway(t *testing.T) {
	for _, p := range protocols {
		if !p.h2 {
			continue
		}
		for _, c := range []struct {
			name  string
			first bool // a request was answered before Shutdown
		}{{"idle", true}, {"silent", false}, {"answering", true}, {"in a head", true}, {"in the first head", false}} {
			t.Run(c.name+" "+p.name, func(t *testing.T) {
				t.Parallel()
				release := make(chan bool)
				h := p.unhurried(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/slow" {
						<-release
					}
				}))
				h.firstCall = 0
				slow, _ := raw(t, h, false)
				if !p.tls { // else it is in a handshake
					io.WriteString(slow, "GET")
				}
				eventually(t, "who is waited for has come", func() bool {
					h.Server.mu.Lock()
					defer h.Server.mu.Unlock()
					for c := range h.conns {
						return p.tls || c.heard.Load() != 0
					}
					return false
				})
				f, wire, open := p.framed(t, h)
				answered := func(stream uint32) {
					t.Helper()
					for {
						switch frame, err := f.ReadFrame(); frame := frame.(type) {
						case nil:
							t.Fatal(err)
						case *http2.SettingsFrame:
							if !frame.IsAck() {
								f.WriteSettingsAck()
							}
						case *http2.GoAwayFrame:
							if stream != 0 || frame.ErrCode != http2.ErrCodeNo {
								t.Fatal(frame)
							}
							return
						case *http2.HeadersFrame:
							if frame.StreamID != stream {
								t.Fatal(frame)
							}
							if frame.StreamEnded() {
								return
							}
						case *http2.DataFrame:
							if frame.StreamEnded() {
								return
							}
						}
					}
				}
				const goAway = 0
				var of *conn
				eventually(t, "net/http has it", func() bool {
					h.Server.mu.Lock()
					defer h.Server.mu.Unlock()
					for c := range h.conns {
						if c.isHTTP2.Load() {
							of = c
						}
					}
					return of != nil
				})
				if c.first {
					open(1, "/", true)
					answered(1)
				}
				var block bytes.Buffer
				for _, kv := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "example.org"}, {":path", "/"}} {
					hpack.NewEncoder(&block).WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
				}
				isBegun := strings.HasSuffix(c.name, "head")
				switch {
				case isBegun:
					f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block.Bytes()[:5], EndStream: true})
					eventually(t, "it is read", func() bool { return queued(of.Conn) == 0 })
				case c.name == "answering":
					open(3, "/slow", true)
					h.awaitExchange(t, of)
				}
				ended := shutDown(t, h)
				if isBegun {
					eventually(t, "it was called", of.isTold.Load)
					eventually(t, "it has heard that", func() bool {
						of.readMu.Lock()
						defer of.readMu.Unlock()
						return !of.isCalled
					})
					f.WriteContinuation(3, true, block.Bytes()[5:])
				}
				answered(goAway)
				switch {
				case isBegun:
					answered(3)
				case c.name == "answering":
					close(release)
					answered(3)
				}
				for {
					frame, err := f.ReadFrame()
					if err == io.EOF {
						break
					}
					if h, isHead := frame.(*http2.HeadersFrame); isHead || err != nil {
						t.Fatalf("at the end: %v, %v", h, err)
					}
				}
				if n := h.served.Load(); n > 1 {
					t.Errorf("%d have ended", n)
				}
				wire.Close()
				slow.Close()
				ended()
			})
		}
	}
}

// awaitExchange waits for a handler to run on c.
func (h *hop) awaitExchange(t *testing.T, c *conn) {
	t.Helper()
	eventually(t, "the handler runs", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.exchanges) > 0
	})
}

// slowConn gives what it has read when it may, from when it is slow.
type slowConn struct {
	*net.TCPConn
	isSlow    *atomic.Bool
	has, give chan bool
}

func (c slowConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if n > 0 && c.isSlow.Swap(false) {
		c.has <- true
		<-c.give
	}
	return n, err
}

// TestShutdownRead: a request is answered that was read when its connection was found idle, and was known to
// nobody yet.
func TestShutdownRead(t *testing.T) {
	for _, p := range protocols {
		if p.h2 {
			continue
		}
		t.Run(p.name, func(t *testing.T) {
			h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
			h.lastCall = 0
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			h.addr = ln.Addr().String()
			conn, br := raw(t, h, p.tls)
			near, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c := slowConn{near.(*net.TCPConn), new(atomic.Bool), make(chan bool), make(chan bool)}
			go h.ServeConn(c, nil)
			request := func() {
				t.Helper()
				if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
			}
			answer := func() {
				t.Helper()
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				if b, err := io.ReadAll(res.Body); string(b) != "hello" || err != nil {
					t.Errorf("%q, %v", b, err)
				}
			}
			request()
			answer()
			of := h.only(t)
			eventually(t, "it is idle", func() bool { return of.awaits.Load() != 0 })
			c.isSlow.Store(true)
			request()
			<-c.has
			ended := shutDown(t, h)
			eventually(t, "it was found idle", func() bool {
				of.readMu.Lock()
				defer of.readMu.Unlock()
				return of.isCalled
			})
			close(c.give)
			answer()
			ended()
		})
	}
}
