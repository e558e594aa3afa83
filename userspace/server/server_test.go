package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

// TestReload: a flow goes on over a change of routes, and a config that can't
// be used changes nothing.
func TestReload(t *testing.T) {
	one := backend(t, func(c net.Conn) { io.WriteString(c, "1"); echo(c) })
	two := backend(t, func(c net.Conn) { io.WriteString(c, "2"); echo(c) })
	addr, more := freeAddr(t), freeAddr(t)
	yaml := func(listen, up string) string {
		return fmt.Sprintf(`listeners: [ { name: a, listen: %s, mode: tcp, default: { forward: %q } } ]`, listen, up)
	}
	first := func(addr string) string {
		c := dialTCP(t, addr)
		b := make([]byte, 1)
		io.ReadFull(c, b)
		return string(b)
	}
	d := start(t, yaml(`["`+addr+`"]`, one))
	old := dialTCP(t, addr)
	io.ReadFull(old, make([]byte, 1))

	if err := d.Reload(parse(t, yaml(`["`+addr+`", "`+more+`"]`, two))); err != nil {
		t.Fatal(err)
	}
	if a, b := first(addr), first(more); a != "2" || b != "2" {
		t.Errorf("after the reload: %q and %q answer, want 2 and 2", a, b)
	}
	busy := backend(t, echo)
	err := d.Reload(parse(t, yaml(`["`+addr+`", "`+busy+`"]`, one)))
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a port in use: %v", err)
	}
	if got := first(addr); got != "2" {
		t.Errorf("after a refused reload %q answers: want 2 as before", got)
	}
	if err := d.Reload(parse(t, yaml(`["`+addr+`"]`, one))); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("tcp", more); err == nil {
		t.Error("a removed address still listens")
	}
	io.WriteString(old, "still there")
	b := make([]byte, 11)
	if _, err := io.ReadFull(old, b); err != nil || string(b) != "still there" {
		t.Errorf("the flow from before: %q, %v", b, err)
	}
}

// TestDrainSilent: who has said nothing yet, or not enough, keeps no daemon from ending.
func TestDrainSilent(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	for _, c := range []struct{ name, listener, send string }{
		{"no hello", `mode: sni`, ""},
		{"half a hello", `mode: sni`, string(helloFor(t, "a.test")[:20])},
		{"no PROXY header", `mode: sni, accept_proxy: { from: [127.0.0.0/8] }`, ""},
		{"no PROXY header to tcp", `mode: tcp, accept_proxy: { from: [127.0.0.0/8] }`, ""},
		{"no handshake", fmt.Sprintf("mode: https, certificates: [ { files: { cert: %q, key: %q } } ]", certFile, keyFile), ""},
		{"half a request", "mode: http", "GET / HT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf("listeners: [ { listen: [%q], %s, default: { forward: \"127.0.0.1:9\" } } ]\nlimits: { hello_timeout: 10m }", addr, c.listener))
			conn := dialTCP(t, addr)
			io.WriteString(conn, c.send)
			eventually(t, "it is accepted", func() bool { return d.limiter.Total() == 1 })
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			done := make(chan error)
			go func() { done <- d.Drain(ctx) }()
			select {
			case err := <-done:
				// The server of HTTP ends its connections itself, and may be quicker than the count.
				if http := strings.HasPrefix(c.listener, "mode: http"); !http && (err == nil || !strings.Contains(err.Error(), "cut before their end: 1")) {
					t.Errorf("got %v", err)
				}
			case <-time.After(patience):
				t.Error("the daemon doesn't end")
			}
		})
	}
}

func TestDrain(t *testing.T) {
	up := backend(t, echo)
	for _, c := range []struct {
		name string
		ends bool
	}{{"flows end", true}, {"deadline cuts", false}} {
		t.Run(c.name, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, up))
			conn := dialTCP(t, addr)
			conn.Write([]byte("x"))
			io.ReadFull(conn, make([]byte, 1))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error)
			go func() { done <- d.Drain(ctx) }()
			eventually(t, "no new connections", func() bool {
				c, err := net.Dial("tcp", addr)
				if err == nil {
					c.Close() // or it would be one more flow to wait for
				}
				return err != nil
			})
			conn.Write([]byte("y"))
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Errorf("a flow does not go on while draining: %v", err)
			}
			if c.ends {
				conn.Close()
			} else {
				cancel()
			}
			if err := <-done; (err == nil) != c.ends {
				t.Errorf("drain: %v", err)
			}
			if n := d.flows.Len(); n != 0 {
				t.Errorf("%d flows left", n)
			}
		})
	}
}

func TestMissingDatapathIsRefused(t *testing.T) {
	_, err := New(parse(t, fmt.Sprintf(`
datapath: sockmap
listeners: [ { listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]
`, freeAddr(t))), Options{Log: slog.New(slog.DiscardHandler), Missing: map[string]string{"sockmap": "kernel 4.19 is too old"}})
	if err == nil || !strings.Contains(err.Error(), "kernel 4.19 is too old") {
		t.Errorf("got %v", err)
	}
}
