package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
)

// halfway is a connection whose first write stops in the middle until goOn is closed.
type halfway struct {
	net.Conn
	isBegun bool
	half    chan struct{} // closed when the first half is written
	goOn    chan struct{}
}

func (c *halfway) Write(b []byte) (int, error) {
	if c.isBegun {
		return c.Conn.Write(b)
	}
	c.isBegun = true
	n, err := c.Conn.Write(b[:len(b)/2])
	close(c.half)
	<-c.goOn
	if err != nil {
		return n, err
	}
	m, err := c.Conn.Write(b[n:])
	return n + m, err
}

// TestSettle: a connection of requests that has come before another process took over, and is in the middle of its
// hello, gets its answer, and is waited for. Connections that are kept are told at once that they are not.
func TestSettle(t *testing.T) {
	cert, pool := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer up.Close()
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: web, listen: [%q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: %q } }
`, addr, certFile, keyFile, up.Listener.Addr()))
	d.mu.Lock()
	web := d.listeners["web"]
	d.mu.Unlock()
	c := &halfway{Conn: dialTCP(t, addr), half: make(chan struct{}), goOn: make(chan struct{})}
	answer := make(chan error, 1)
	go func() {
		tc := tls.Client(c, &tls.Config{ServerName: "a.test", RootCAs: pool})
		defer tc.Close()
		if _, err := fmt.Fprint(tc, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"); err != nil {
			answer <- err
			return
		}
		res, err := http.ReadResponse(bufio.NewReader(tc), nil)
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s", res.Status)
		}
		answer <- err
	}()
	kept := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{ServerName: "a.test", RootCAs: pool}}}
	defer kept.CloseIdleConnections()
	isLast := func() bool {
		res, err := kept.Get("https://" + addr)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res.Close
	}
	if isLast() {
		t.Fatal("a connection is not kept")
	}
	<-c.half
	eventually(t, "it is accepted", func() bool { return web.arriving.Load() == 1 })
	d.Leave()
	ended := make(chan error, 1)
	go func() { ended <- d.Drain(t.Context()) }()
	select {
	case err := <-ended:
		t.Fatalf("nothing is waited for: %v", err)
	default:
	}
	eventually(t, "an answer is the last of its connection, while another connection arrives", isLast)
	close(c.goOn)
	if err := <-answer; err != nil {
		t.Errorf("a connection in its handshake gets no answer: %v", err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := web.arriving.Load(); n != 0 {
		t.Errorf("%d connections are said to arrive, and all have ended", n)
	}
}
