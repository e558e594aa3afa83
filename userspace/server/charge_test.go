package server

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// crowdedTarget is an HTTP server that keeps requests, but for those to /ok, until
// it is let go. It counts connections too, since each request needs its own.
type crowdedTarget struct {
	addr         string
	now, most    atomic.Int64 // requests kept
	open, opened atomic.Int64 // connections, at a time and most of them
	letGo        chan struct{}
	once         sync.Once
}

func (u *crowdedTarget) release() { u.once.Do(func() { close(u.letGo) }) }

func raise(most *atomic.Int64, n int64) {
	for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
	}
}

func newCrowdedTarget(t *testing.T) *crowdedTarget {
	t.Helper()
	u := &crowdedTarget{letGo: make(chan struct{})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u.addr = ln.Addr().String()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok" {
			return
		}
		raise(&u.most, u.now.Add(1))
		defer u.now.Add(-1)
		select {
		case <-u.letGo:
		case <-r.Context().Done():
		}
	}), ConnState: func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			raise(&u.opened, u.open.Add(1))
		case http.StateClosed:
			u.open.Add(-1)
		}
	}}
	go srv.Serve(ln)
	t.Cleanup(func() { u.release(); srv.Close() })
	return u
}

// flooder opens streams of HTTP/2 on one connection, as many as the server lets it.
type flooder struct {
	t      *testing.T
	scheme string
	header []string
	vary   func(stream int64) string // one more header line of each; nil: none
	next   uint32                    // stream
	left   uint32                    // the first that is not reset

	opened  int64
	status  [600]atomic.Int64
	retry   atomic.Int64 // answers with Retry-After
	framer  *http2.Framer
	writing sync.Mutex
}

// flood opens up to n streams on a new connection to addr.
func flood(t *testing.T, addr string, tlsConfig *tls.Config, preface []byte, n int, header ...string) *flooder {
	t.Helper()
	var c net.Conn = dialTCP(t, addr)
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	c.Write(preface)
	f := &flooder{t: t, scheme: "http", header: header, next: 1, left: 1}
	if tlsConfig != nil {
		f.scheme, tlsConfig = "https", tlsConfig.Clone()
		tlsConfig.NextProtos = []string{"h2"}
		c = tls.Client(c, tlsConfig)
	}
	io.WriteString(c, http2.ClientPreface)
	f.framer = http2.NewFramer(c, c)
	f.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // none of a body is read
	frame, err := f.framer.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	settings, ok := frame.(*http2.SettingsFrame)
	if !ok {
		t.Fatalf("first frame: %v", frame)
	}
	if most, ok := settings.Value(http2.SettingMaxConcurrentStreams); ok {
		n = min(n, int(most))
	}
	f.framer.WriteSettingsAck()
	go f.read()
	f.open(n)
	return f
}

// open opens n more streams.
func (f *flooder) open(n int) {
	f.t.Helper()
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	enc.SetMaxDynamicTableSize(0) // each block is by an encoder of its own
	f.writing.Lock()
	defer f.writing.Unlock()
	for range n {
		block.Reset()
		for _, kv := range [][2]string{{":method", "GET"}, {":scheme", f.scheme}, {":authority", "a.test"}, {":path", "/"}} {
			enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
		}
		lines := f.header
		if f.vary != nil {
			lines = append(slices.Clone(lines), f.vary(f.opened))
		}
		for _, line := range lines {
			name, value, _ := strings.Cut(line, ": ")
			enc.WriteField(hpack.HeaderField{Name: strings.ToLower(name), Value: value})
		}
		err := f.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: f.next, BlockFragment: []byte(block.String()), EndHeaders: true, EndStream: true})
		if err != nil {
			f.t.Fatal(err)
		}
		f.next += 2
		f.opened++
	}
}

// reset resets all streams.
func (f *flooder) reset() {
	f.t.Helper()
	f.writing.Lock()
	defer f.writing.Unlock()
	for ; f.left < f.next; f.left += 2 {
		if err := f.framer.WriteRSTStream(f.left, http2.ErrCodeCancel); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *flooder) read() {
	for {
		frame, err := f.framer.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			status := 0
			fmt.Sscan(frame.PseudoValue("status"), &status)
			for _, field := range frame.RegularFields() {
				if field.Name == "retry-after" {
					f.retry.Add(1)
				}
			}
			f.status[status%600].Add(1)
		case *http2.PingFrame:
			f.writing.Lock()
			f.framer.WritePing(true, frame.Data)
			f.writing.Unlock()
		}
	}
}

// floods adds up what floods were answered.
func floods(all []*flooder, what func(*flooder) int64) (sum int64) {
	for _, f := range all {
		sum += what(f)
	}
	return sum
}

func openings(f *flooder) int64 { return f.opened }
func refused(f *flooder) int64  { return f.status[429].Load() }

func told(f *flooder) int64   { return f.retry.Load() }
func served(f *flooder) int64 { return f.status[200].Load() }

// floodDaemon has an http and an https listener on both families, in front of up;
// action is what else their default has to say, and more what the configuration has.
func floodDaemon(t *testing.T, up, more string, action ...string) (d *daemon, plain, secure [2]string, pool *x509.CertPool) {
	t.Helper()
	cert, pool := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	plain, secure = [2]string{freeAddr(t), freeAddrAt(t, "::1")}, [2]string{freeAddr(t), freeAddrAt(t, "::1")}
	d = start(t, fmt.Sprintf(`
listeners:
  - { name: plain, listen: [%q, %q], mode: http, default: { forward: %q%s } }
  - { name: secure, listen: [%q, %q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: %q%s } }
%s`, plain[0], plain[1], up, strings.Join(action, ""), secure[0], secure[1], certFile, keyFile, up, strings.Join(action, ""), more))
	return d, plain, secure, pool
}

// TestResetStreamsCount: who opens streams and resets them has no more requests in a second than a source may
// have under way.
func TestResetStreamsCount(t *testing.T) {
	const perSource, rounds = 10, 20 // of which the frames are read within some seconds
	var came atomic.Int64
	up := httpBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		came.Add(1)
		<-r.Context().Done()
	})
	d, plain, secure, pool := floodDaemon(t, up, fmt.Sprintf("limits: { requests_per_source: %d }", perSource))
	for i, at := range append(plain[:], secure[:]...) {
		var tlsConfig *tls.Config
		if i >= len(plain) {
			tlsConfig = &tls.Config{RootCAs: pool, ServerName: "a.test"}
		}
		before := came.Load()
		began := time.Now()
		f := flood(t, at, tlsConfig, nil, perSource)
		for range rounds {
			time.Sleep(20 * time.Millisecond) // some reach the target, if any do
			f.reset()
			f.open(perSource)
		}
		f.reset()
		most := perSource * int64(time.Since(began)/time.Second+2)
		if n := came.Load() - before; n > most || n == 0 {
			t.Errorf("%s: %d of %d requests came to the target, want at most %d", at, n, perSource*(rounds+1), most)
		}
		eventually(t, "those that were reset count no more", func() bool { return d.requests.Total() == 0 })
	}
}

// TestOneSourceFloods: 20 connections of one source open 250 streams each, of
// which the target sees what a source may have under way. The rest is refused,
// counted, and said in few lines; a client elsewhere is served meanwhile, and
// the source again when its requests have ended.
func TestOneSourceFloods(t *testing.T) {
	const perSource = 256
	for _, v := range []struct {
		name   string
		secure bool
		family int // of the flood; the good client comes by the other one
	}{
		{"HTTP/2 without TLS", false, 0}, {"HTTP/2 without TLS over IPv6", false, 1},
		{"HTTP/2 with TLS", true, 0}, {"HTTP/2 with TLS over IPv6", true, 1},
	} {
		t.Run(v.name, func(t *testing.T) {
			up := newCrowdedTarget(t)
			d, plain, secure, pool := floodDaemon(t, up.addr, "")
			at, tlsConfig := plain, (*tls.Config)(nil)
			if v.secure {
				at, tlsConfig = secure, &tls.Config{RootCAs: pool, ServerName: "a.test"}
			}
			var all []*flooder
			for range 20 {
				all = append(all, flood(t, at[v.family], tlsConfig, nil, 250))
			}
			want := floods(all, openings) - perSource
			if want <= 0 {
				t.Fatal("the flood is none")
			}
			eventually(t, "all but what a source may have are refused, and these are at the target", func() bool {
				return floods(all, refused) == want && up.now.Load() == perSource
			})
			if floods(all, told) != want {
				t.Errorf("%d of %d refusals say when to come again", floods(all, told), want)
			}
			if up.most.Load() != perSource || up.opened.Load() > perSource {
				t.Errorf("the target saw %d requests and %d connections at once, a source may have %d requests", up.most.Load(), up.opened.Load(), perSource)
			}
			for range 20 {
				if res, _ := ask(t, plain[1-v.family], "GET", "a.test", "/ok", nil); res.StatusCode != 200 {
					t.Fatalf("a client elsewhere got %d", res.StatusCode)
				}
			}
			if n := d.refused("requests_over_limit"); n != want {
				t.Errorf("%d are counted as refused, want %d", n, want)
			}
			eventually(t, "status tells of the requests under way", func() bool { return d.Status().Requests == perSource })
			if n := d.log.Count("status=429"); n > 0 || d.log.Count("requests_per_source") == 0 {
				t.Errorf("%d refused requests have a line each, and %d lines say why", n, d.log.Count("requests_per_source"))
			}
			up.release()
			eventually(t, "those under way are answered", func() bool { return floods(all, served) == perSource })
			eventually(t, "nothing is charged any more", func() bool { return d.requests.Total() == 0 })
			if res, _ := ask(t, plain[v.family], "GET", "a.test", "/ok", nil); res.StatusCode != 200 {
				t.Errorf("the source, when its requests have ended, got %d", res.StatusCode)
			}
		})
	}
}

// TestRequestLimits has HTTP/1.1 reach the limits: of a source, and of all.
func TestRequestLimits(t *testing.T) {
	for _, v := range []struct {
		name, limits, reason string
		status, allowed      int
		secure               bool
	}{
		{"source", "limits: { requests_per_source: 3 }", "limits.requests_per_source", 429, 3, false},
		{"source with TLS", "limits: { requests_per_source: 3 }", "limits.requests_per_source", 429, 3, true},
		{"all", "limits: { requests: 3 }", "limits.requests)", 503, 3, false},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel() // it waits as long as a request may for its turn
			for family := range 2 {
				up := newCrowdedTarget(t)
				limits := v.limits
				if v.status == 503 { // so that it is not the source's
					limits = strings.Replace(limits, "requests: 3", "requests: 3, requests_per_source: 100", 1)
				}
				d, plain, secure, pool := floodDaemon(t, up.addr, limits)
				get := func(path string) (*http.Response, error) {
					c := net.Conn(dialTCP(t, plain[family]))
					if v.secure {
						c.Close()
						c = tls.Client(dialTCP(t, secure[family]), &tls.Config{RootCAs: pool, ServerName: "a.test"})
					}
					c.SetDeadline(time.Now().Add(time.Minute))
					fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a.test\r\n\r\n", path)
					return http.ReadResponse(bufio.NewReader(c), nil)
				}
				answers := make(chan int, v.allowed)
				for range v.allowed {
					go func() {
						res, err := get("/")
						if err != nil {
							t.Error(err)
							answers <- 0
							return
						}
						answers <- res.StatusCode
					}()
				}
				eventually(t, "the target has the requests", func() bool { return up.now.Load() == int64(v.allowed) })
				res, err := get("/ok")
				if err != nil {
					t.Fatal(err)
				}
				if res.StatusCode != v.status || res.Header.Get("Retry-After") == "" {
					t.Errorf("one more got %d, Retry-After %q: want %d", res.StatusCode, res.Header.Get("Retry-After"), v.status)
				}
				if d.refused("requests_over_limit") != 1 || d.log.Count(v.reason) != 1 {
					t.Errorf("%d counted, and %d lines name %s", d.refused("requests_over_limit"), d.log.Count(v.reason), v.reason)
				}
				up.release()
				for range v.allowed {
					if status := <-answers; status != 200 {
						t.Errorf("one that was let in got %d", status)
					}
				}
				eventually(t, "there is room again", func() bool { res, err := get("/ok"); return err == nil && res.StatusCode == 200 })
			}
		})
	}
}

// TestUpgradeIsUnderWay: an upgraded connection is a request until it ends.
func TestUpgradeIsUnderWay(t *testing.T) {
	up := backend(t, func(c net.Conn) {
		defer c.Close()
		http.ReadRequest(bufio.NewReader(c))
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		io.Copy(io.Discard, c)
	})
	d, plain, _, _ := floodDaemon(t, up, "limits: { requests_per_source: 1 }")
	upgrade := func() (net.Conn, int) {
		c := dialTCP(t, plain[0])
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c, res.StatusCode
	}
	first, status := upgrade()
	if status != 101 || d.requests.Total() != 1 {
		t.Errorf("%d, %d requests under way", status, d.requests.Total())
	}
	if _, status := upgrade(); status != 429 {
		t.Errorf("a second one got %d", status)
	}
	first.Close()
	eventually(t, "another may come when it has ended", func() bool { _, status := upgrade(); return status == 101 })
}

// TestRequestsBehindAHop: requests are charged to the client that a trusted hop
// names, and one that names none is not limited as if it were one client. What
// a stranger writes about himself counts for nothing.
func TestRequestsBehindAHop(t *testing.T) {
	const perSource = 4
	for _, v := range []struct {
		name        string
		hop         bool
		preface     []byte
		header      string
		atTarget    int64
		other       []byte // of another client, by the same way
		otherHeader string
		otherGets   int
	}{
		{"X-Forwarded-For", true, nil, "X-Forwarded-For: 203.0.113.1", perSource, nil, "X-Forwarded-For: 203.0.113.2", 200},
		{"X-Forwarded-For, the same source", true, nil, "X-Forwarded-For: 2001:db8::1", perSource, nil, "X-Forwarded-For: 2001:db8::2", 429},
		{"X-Forwarded-For, another /64", true, nil, "X-Forwarded-For: 2001:db8::1", perSource, nil, "X-Forwarded-For: 2001:db8:0:1::2", 200},
		{"PROXY header", true, from("203.0.113.1:1000"), "A: b", perSource, from("203.0.113.2:1000"), "A: b", 200},
		{"PROXY header over IPv6", true, from("[2001:db8::1]:1000"), "A: b", perSource, from("[2001:db8:0:1::1]:1000"), "A: b", 200},
		{"PROXY header, the client writes another", true, from("203.0.113.1:1000"), "X-Forwarded-For: 203.0.113.7", perSource, from("203.0.113.1:1001"), "X-Forwarded-For: 203.0.113.8", 429},
		{"a hop that says nothing", true, nil, "A: b", 20, nil, "A: b", 200},
		{"PROXY header without an address", true, from(""), "A: b", 20, from(""), "A: b", 200},
		{"a stranger", false, nil, "X-Forwarded-For: 203.0.113.1", perSource, nil, "X-Forwarded-For: 203.0.113.2", 429},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel() // it waits as long as a request may for its turn
			up := newCrowdedTarget(t)
			addr, trust := freeAddr(t), "192.0.2.0/24"
			if v.hop {
				trust = "127.0.0.1"
			}
			d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: http, accept_proxy: { from: [%q] }, default: { forward: %q } } ]
limits: { requests_per_source: %d }
`, addr, trust, up.addr, perSource))
			f := flood(t, addr, nil, v.preface, 20, v.header)
			eventually(t, "what may is at the target, and the rest refused", func() bool {
				return up.now.Load() == v.atTarget && f.status[429].Load() == f.opened-v.atTarget
			})
			if res, _ := ask(t, addr, "GET", "a.test", "/ok", v.other, v.otherHeader); res.StatusCode != v.otherGets {
				t.Errorf("one more, of %q: got %d, want %d", v.otherHeader, res.StatusCode, v.otherGets)
			}
			up.release()
			eventually(t, "nothing is charged any more", func() bool { return d.requests.Total() == 0 })
		})
	}
}

// TestPagesAtOnce: 20 people behind one address load a page of six parts at the same time. That is more than
// their source may have under way: some wait for their turn, and nobody is refused.
func TestPagesAtOnce(t *testing.T) {
	const people, parts, perSource = 20, 6, 32
	up := httpBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(20 * time.Millisecond)
		io.WriteString(w, "part")
	})
	d, plain, _, _ := floodDaemon(t, up, fmt.Sprintf("limits: { requests_per_source: %d }", perSource))
	url := "http://" + plain[0] + "/"
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	var clients []*http.Client
	var statuses sync.Map
	get := func(c *http.Client) {
		res, err := c.Get(url)
		if err != nil {
			t.Error(err)
			return
		}
		res.Body.Close()
		n, _ := statuses.LoadOrStore(res.StatusCode, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	var all sync.WaitGroup
	for range people {
		transport := &http.Transport{Protocols: protocols}
		t.Cleanup(transport.CloseIdleConnections)
		clients = append(clients, &http.Client{Transport: transport, Timeout: patience})
		get(clients[len(clients)-1]) // so that it is connected
	}
	for _, c := range clients {
		for range parts {
			all.Go(func() { get(c) })
		}
	}
	all.Wait()
	statuses.Range(func(status, n any) bool {
		if status != http.StatusOK {
			t.Errorf("%d requests got %v", n.(*atomic.Int64).Load(), status)
		}
		return true
	})
	eventually(t, "nothing is charged any more", func() bool { return d.requests.Total() == 0 })
}
