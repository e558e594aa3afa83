package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// TestProxyChain: two hops keep the client's address, the name and the path's id.
func TestProxyChain(t *testing.T) {
	cert, pool := certificate(t, "a.test")
	headers := make(chan *proxyheader.Header, 1)
	last := backend(t, func(c net.Conn) {
		h, rest, err := proxyheader.Read(c, nil, 4096, patience)
		if err != nil {
			t.Error(err)
		}
		headers <- h
		tc := tls.Server(&stream{TCPConn: c.(*net.TCPConn), conn: new(conn), ahead: rest}, &tls.Config{Certificates: []tls.Certificate{cert}})
		defer c.Close()
		fmt.Fprintln(tc, "last")
	})
	edge, home := freeAddr(t), freeAddr(t)
	dh := start(t, fmt.Sprintf(`
node: home
listeners: [ { name: web, listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.0/8] }, default: { forward: %q, send_proxy: v2 } } ]
`, home, last))
	de := start(t, fmt.Sprintf(`
node: edge
listeners: [ { name: web, listen: [%q], mode: sni, default: { forward: %q, send_proxy: v2 } } ]
`, edge, home))
	got, err := dialTLS(edge, &tls.Config{ServerName: "a.test", RootCAs: pool, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil || got != "last\n" {
		t.Fatalf("%q, %v", got, err)
	}
	h := <-headers
	if h.ServerName != "a.test" || h.ALPN != "h2" || len(h.ID) != 32 {
		t.Errorf("header %+v: want the name, the protocol and an id", h)
	}
	if h.Destination.String() != edge {
		t.Errorf("destination %v: want what the client connected to, %s", h.Destination, edge)
	}
	want := "id=" + h.ID
	for _, d := range []*daemon{de, dh} {
		eventually(t, "the id is in each hop's log", func() bool {
			return strings.Contains(d.log.String(), want) && strings.Contains(d.log.String(), "client="+h.Source.String())
		})
	}
}

// TestProxyUnknown: somebody whom the hop before can't name is unknown to the next one too, and is not that hop.
func TestProxyUnknown(t *testing.T) {
	headers := make(chan *proxyheader.Header, 1)
	last := backend(t, func(c net.Conn) {
		defer c.Close()
		h, _, err := proxyheader.Read(c, nil, 4096, patience)
		if err != nil {
			t.Error(err)
		}
		headers <- h
		io.WriteString(c, "HTTP/1.0 204 No Content\r\n\r\n")
	})
	tcp, web := freeAddr(t), freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - { listen: [%q], mode: tcp, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
  - { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q, send_proxy: v2 } }
`, tcp, last, web, last))
	for _, addr := range []string{tcp, web} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "PROXY UNKNOWN\r\nGET / HTTP/1.0\r\nHost: a.test\r\n\r\n")
		if h := <-headers; h == nil || h.Source.IsValid() || h.Local {
			t.Errorf("the target heard %+v", h)
		}
	}
}

// TestProxyFromStranger: the header closes the connection and the log says
// who; without a header the same peer is a client like any other.
func TestProxyFromStranger(t *testing.T) {
	up := backend(t, echo)
	cert, pool := certificate(t, "a.test")
	tlsUp := tlsBackend(t, "up", cert)
	tcp, sni := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: tcp, listen: [%q], mode: tcp, accept_proxy: { from: [192.0.2.0/24, "tag:edge"] }, default: { forward: %q } }
  - { name: sni, listen: [%q], mode: sni, accept_proxy: { from: [192.0.2.0/24] }, default: { forward: %q } }
`, tcp, up, sni, tlsUp))
	forged := proxyheader.Header{Source: tcpsock.AddrPortOf(&net.TCPAddr{IP: net.IPv4(203, 0, 113, 9), Port: 1}), Destination: tcpsock.AddrPortOf(&net.TCPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 443})}.Append(nil)
	for i, addr := range []string{tcp, sni} {
		if c, err := net.Dial("tcp", addr); err == nil { // it may be closed that early
			c.Write(forged)
			c.Write([]byte("hello"))
			if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("%s: a stranger's header was answered", addr)
			}
			c.Close()
		}
		eventually(t, "counted", func() bool { return d.refused("proxy_from_stranger") == int64(i+1) })
	}
	if !strings.Contains(d.log.String(), "127.0.0.1") {
		t.Error("the log does not say who the stranger was")
	}
	if got, err := dialTLS(sni, &tls.Config{ServerName: "a.test", RootCAs: pool}); got != "up\n" {
		t.Errorf("without a header: %q, %v", got, err)
	}
	// A listener without accept_proxy takes such bytes as data.
	plain := freeAddr(t)
	start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, plain, up))
	c := dialTCP(t, plain)
	c.Write(forged)
	back := make([]byte, len(forged))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != string(forged) {
		t.Errorf("plain listener: %v", err)
	}
}

// TestForwardedBehindProxyHeader: a hop that sends a PROXY header passes on what
// its client wrote, so forwarding headers are the hop's word only without one.
func TestForwardedBehindProxyHeader(t *testing.T) {
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-For")) })
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.0/8] }, default: { forward: %q } } ]`, addr, up))
	for _, c := range []struct{ name, header, want string }{
		{"none", "", "6.6.6.6, 127.0.0.1"},
		{"a client", "PROXY TCP4 203.0.113.9 192.0.2.1 1234 443\r\n", "203.0.113.9"},
		{"a client that is not known", "PROXY UNKNOWN\r\n", "unknown"},
		{"the hop itself", string(proxyheader.Header{Local: true}.Append(nil)), "6.6.6.6, 127.0.0.1"},
	} {
		conn := dialTCP(t, addr)
		io.WriteString(conn, c.header+"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if b, _ := io.ReadAll(res.Body); string(b) != c.want {
			t.Errorf("%s: X-Forwarded-For is %q, want %q", c.name, b, c.want)
		}
	}
}

// TestHTTPChain: the last of three http hops knows the client that the first one saw.
func TestHTTPChain(t *testing.T) {
	up := httpBackend(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-For")) })
	to := up
	for range 3 { // from the last hop to the first
		addr := freeAddr(t)
		start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: http, accept_proxy: { from: [127.0.0.0/8] }, allow: [203.0.113.9], default: { forward: %q } } ]`, addr, to))
		to = addr
	}
	for client, want := range map[string]int{"203.0.113.9": 200, "203.0.113.10": 403} {
		conn := dialTCP(t, to)
		io.WriteString(conn, "PROXY TCP4 "+client+" 192.0.2.1 1234 443\r\nGET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != want {
			b, _ := io.ReadAll(res.Body)
			t.Errorf("%s: %s, want %d: %s", client, res.Status, want, b)
		}
	}
}
