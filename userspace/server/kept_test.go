package server

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// TestKeptUpstreamOfAHop: a connection that speaks for a client is not used for who is known as a hop by now,
// and speaks for nobody.
func TestKeptUpstreamOfAHop(t *testing.T) {
	sources := make(chan string, 10)
	app := backend(t, func(c net.Conn) {
		defer c.Close()
		h, rest, err := proxyheader.Read(c, nil, 4096, patience)
		if err != nil || h == nil {
			t.Errorf("no PROXY header: %v", err)
			return
		}
		requests := bufio.NewReader(io.MultiReader(bytes.NewReader(rest), c)) // the first may have come with the header
		for {
			if _, err := http.ReadRequest(requests); err != nil {
				return
			}
			sources <- h.Source.String()
			io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	addr := freeAddr(t)
	config := func(from string) string {
		return fmt.Sprintf(`listeners: [{ name: web, listen: %q, mode: http, accept_proxy: { from: [%s] }, default: { forward: %q, send_proxy: v2 } }]`, addr, from, app)
	}
	d := start(t, config("192.0.2.1"))
	conn := d.come(t, "web", "203.0.113.7:1")
	c := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
	ask := func() string {
		t.Helper()
		res, err := c.Get("http://app.test/")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		select {
		case s := <-sources:
			return s
		case <-time.After(patience):
			t.Fatal("nothing arrived")
			return ""
		}
	}
	if got := ask(); got != "203.0.113.7:1" {
		t.Errorf("a client is told as %s", got)
	}
	if err := d.Reload(parse(t, config("192.0.2.1, 203.0.113.7"))); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "invalid AddrPort" {
		t.Errorf("a hop is told as %s", got)
	}
}
