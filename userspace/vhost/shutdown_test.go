package vhost

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
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
