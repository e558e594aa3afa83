package vhost

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// deadline ends what would hang, and nothing that a busy machine does slowly.
const deadline = time.Minute

// infoConn is what a front gives: a connection that knows its client.
type infoConn struct {
	*net.TCPConn
	info ConnInfo
}

func (c infoConn) Info() ConnInfo { return c.info }

// hop is a Server on a loopback port, with what it logs and reports.
type hop struct {
	*Server
	addr string
	log  *logs.Log

	mu       sync.Mutex
	requests []Request
	served   atomic.Int64 // ServeConn calls that have returned
	serveErr chan error
}

// config changes a hop before it starts.
type config struct {
	Options
	info func(ConnInfo) ConnInfo
}

// newHop starts a hop that sends everything to up, unless change says more.
func newHop(t testing.TB, up *Upstream, change ...func(*config)) *hop {
	t.Helper()
	h := &hop{log: &logs.Log{}, serveErr: make(chan error, 1024)}
	c := &config{}
	c.Node = "home"
	c.Log = slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.Route = leading(func(string, string) (*Upstream, error) { return up, nil })
	c.OnRequest = func(q Request) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.requests = append(h.requests, q)
	}
	for _, f := range change {
		f(c)
	}
	h.Server = New(c.Options)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = l.Addr().String()
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			info := ConnInfo{Peer: tcpsock.AddrPortOf(conn.RemoteAddr()), Local: tcpsock.AddrPortOf(conn.LocalAddr()), ID: fmt.Sprintf("id-of-connection-%d", n)}
			info.Client = info.Peer
			if c.info != nil {
				info = c.info(info)
			}
			wg.Go(func() {
				err := h.ServeConn(infoConn{conn.(*net.TCPConn), info}, nil)
				h.served.Add(1)
				select {
				case h.serveErr <- err:
				default:
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		h.Close()
		wg.Wait()
		if t.Failed() && testing.Verbose() {
			t.Log(h.log.String())
		}
	})
	return h
}

// leading makes routes that do nothing but lead to an upstream.
func leading(to func(host, path string) (*Upstream, error)) func(*http.Request, string, string) (*Route, error) {
	return func(_ *http.Request, host, path string) (*Route, error) {
		up, err := to(host, path)
		if up == nil || err != nil {
			return nil, err
		}
		return &Route{Name: "everything", Upstreams: []Choice{{Upstream: up, Weight: 1}}}, nil
	}
}

// last waits for the report of the n-th request.
func (h *hop) request(t testing.TB, n int) Request {
	t.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		h.mu.Lock()
		if len(h.requests) >= n {
			q := h.requests[n-1]
			h.mu.Unlock()
			return q
		}
		h.mu.Unlock()
	}
	t.Fatalf("request %d was never reported", n)
	return Request{}
}

// overTLS makes a hop terminate TLS for names.
func overTLS(t testing.TB, names ...string) func(*config) {
	cert := selfsigned.Certificate(t, names...)
	return func(c *config) {
		c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
	}
}

// upstream starts a real HTTP server and returns the way to it.
func upstream(t testing.TB, h http.HandlerFunc, change ...func(*http.Server)) *Upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	for _, f := range change {
		f(s)
	}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return wayTo(l.Addr().String())
}

// rawUpstream serves each connection with f.
func rawUpstream(t testing.TB, f func(*net.TCPConn, *bufio.Reader)) *Upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(deadline))
				f(c.(*net.TCPConn), bufio.NewReader(c))
			}()
		}
	}()
	return wayTo(l.Addr().String())
}

// readHead reads a request's header as it came over the wire.
func readHead(br *bufio.Reader) string {
	var b strings.Builder
	for {
		line, err := br.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String()
		}
	}
}

func wayTo(addr string) *Upstream {
	return &Upstream{Key: addr, Name: "laptop", Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}}
}

// protocol is a way for a client to speak with a hop.
type protocol struct {
	name string
	tls  bool
	h2   bool
}

var protocols = []protocol{
	{"h1", false, false},
	{"h2c", false, true},
	{"h1 TLS", true, false},
	{"h2 TLS", true, true},
}

// each runs f for each way to speak with a hop.
func each(t *testing.T, f func(t *testing.T, p protocol)) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) { f(t, p) })
	}
}

func (p protocol) hop(t testing.TB, up *Upstream, change ...func(*config)) *hop {
	if p.tls {
		change = append([]func(*config){overTLS(t, "example.org", "*.example.org")}, change...)
	}
	return newHop(t, up, change...)
}

// client is an HTTP client that connects to h whatever the URL says.
func (p protocol) client(t testing.TB, h *hop) *http.Client {
	var ps http.Protocols
	ps.SetHTTP1(!p.h2)
	ps.SetHTTP2(p.h2 && p.tls)
	ps.SetUnencryptedHTTP2(p.h2 && !p.tls)
	tr := &http.Transport{
		Protocols: &ps, DisableCompression: true, ExpectContinueTimeout: deadline,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", h.addr)
		},
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: deadline, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (p protocol) url(path string) string {
	if p.tls {
		return "https://example.org" + path
	}
	return "http://example.org" + path
}

// get makes a request and reads the answer whole.
func get(t testing.TB, c *http.Client, url string, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(req)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// raw opens a connection to h for a client that writes bytes itself.
func raw(t testing.TB, h *hop, overTLS bool) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(deadline))
	t.Cleanup(func() { c.Close() })
	if overTLS {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: "example.org", NextProtos: []string{"http/1.1"}})
	}
	return c, bufio.NewReader(c)
}

// rawDo writes a request and parses the answer.
func rawDo(t testing.TB, h *hop, request string) (*http.Response, string) {
	t.Helper()
	c, br := raw(t, h, false)
	io.WriteString(c, request)
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	body, _ := io.ReadAll(res.Body)
	return res, string(body)
}

// lacking skips a test that needs what this machine has not; under CI that is
// a failure.
func lacking(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this machine lacks %s, which CI must have", what)
	}
	t.Skipf("this machine lacks %s", what)
}

// eventually waits for what happens elsewhere.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %v: %s", deadline, what)
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// Serve accepts connections from l and serves them until l is closed.
func (s *Server) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go s.ServeConn(c, nil)
	}
}
