package server

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// The PROXY headers of one client in all the ways that they are written, and what each says.
const (
	proxiedClient = "198.51.100.7:4321"
	proxiedPath   = "path-1"
)

func tlv(kind byte, value string) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{kind}, uint16(len(value))), value...)
}

// headerV2 is a PROXY header of version 2: command and family, then what is behind its length.
func headerV2(command, family byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), command, family)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(body))), body...)
}

var (
	fromClient4 = []byte{198, 51, 100, 7, 192, 0, 2, 80, 4321 >> 8, 4321 & 0xff, 1, 187}
	fromClient6 = []byte("\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07" +
		"\x20\x01\x0d\xb8\x00\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80\x10\xe1\x01\xbb")
)

var proxiedHeaders = []struct {
	name        string
	header      []byte
	client, dst string // that it names
	path        string // likewise, or ""
}{
	{"v1", []byte("PROXY TCP4 198.51.100.7 192.0.2.80 4321 443\r\n"), proxiedClient, "192.0.2.80:443", ""},
	{"v1 IPv6", []byte("PROXY TCP6 2001:db8::7 2001:db8:80::80 4321 443\r\n"),
		"[2001:db8::7]:4321", "[2001:db8:80::80]:443", ""},
	{"v2", headerV2(0x21, 0x11, fromClient4), proxiedClient, "192.0.2.80:443", ""},
	{"v2 IPv6", headerV2(0x21, 0x21, fromClient6), "[2001:db8::7]:4321", "[2001:db8:80::80]:443", ""},
	{"v2 with TLVs", headerV2(0x21, 0x11, fromClient4, tlv(1, "h2"), tlv(0x30, "eth0"), tlv(2, "other.test"),
		tlv(5, proxiedPath), tlv(4, "\x00\x00\x00")),
		proxiedClient, "192.0.2.80:443", proxiedPath},
}

// heardBy is a target that answers what it heard once the client has ended its stream: the header, and how
// many bytes behind it.
func heardBy(t *testing.T) string {
	return backend(t, func(c net.Conn) {
		defer c.Close()
		h, rest, err := proxyheader.Read(c, nil, 4096, patience)
		if err != nil || h == nil {
			fmt.Fprintf(c, "no header: %v", err)
			return
		}
		b, err := io.ReadAll(c)
		fmt.Fprintf(c, "client %s, to %s, local %v, name %q, path %q, %x, %v", h.Source, h.Destination, h.Local,
			h.ServerName, h.ID, append(rest, b...), err)
	})
}

// goroutines is how many there have been.
func goroutines() uint64 {
	s := []metrics.Sample{{Name: "/sched/goroutines-created:goroutines"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// TestProxyHeaderCut: wherever a PROXY header, and what is behind it, is cut, the connection is the client's,
// and each byte behind it arrives once. It takes no goroutine more than one without a header.
func TestProxyHeaderCut(t *testing.T) {
	target := heardBy(t)
	hello := helloFor(t, "a.test")
	config := "listeners:\n"
	addrs := map[string]string{}
	for _, mode := range []string{"sni", "tcp"} {
		for trust, more := range map[string]string{"": "",
			"trusting ": ", accept_proxy: { from: [127.0.0.0/8] }, allow: [198.51.100.7, 2001:db8::/64]",
			"open ":     ", accept_proxy: { from: [127.0.0.0/8] }"} {
			addrs[trust+mode] = freeAddr(t)
			config += fmt.Sprintf("- { name: %s, listen: %q, mode: %s%s, default: { forward: %q, send_proxy: v2 } }\n",
				strings.ReplaceAll(trust+mode, " ", "-"), addrs[trust+mode], mode, more, target)
		}
	}
	d := start(t, config+"limits: { hello_timeout: 5m }\n")
	// visit sends first, and the rest once it has been read, and returns what comes back.
	visit := func(addr string, first, rest []byte, read func() bool) string {
		c := dialTCP(t, addr)
		defer c.Close()
		if len(first) > 0 {
			c.Write(first)
			for deadline := time.Now().Add(patience); !read(); time.Sleep(50 * time.Microsecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d bytes are not taken in: %d wait", len(first), d.partialBytes.Load())
				}
			}
		}
		c.Write(rest)
		c.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		return string(got)
	}
	flows := map[string]float64{} // goroutines that each of them took, on average
	for _, mode := range []string{"sni", "tcp"} {
		name := ""
		if mode == "sni" {
			name = "a.test"
		}
		const times = 50
		visit(addrs[mode], nil, hello, nil)
		before := goroutines()
		for range times {
			visit(addrs[mode], nil, hello, nil)
		}
		eventually(t, "they end", func() bool { return d.limiter.Total() == 0 })
		flows[mode] = float64(goroutines()-before) / times
		for _, h := range proxiedHeaders {
			named := name
			if mode == "tcp" && h.path != "" {
				named = "other.test" // nobody has read another
			}
			stream := slices.Concat(h.header, hello)
			before, n := goroutines(), uint64(0)
			for cut := range stream {
				if mode == "tcp" && cut >= len(h.header) {
					break // behind it nothing is waited for
				}
				if behind := cut - len(h.header); behind > 3 && cut < len(stream)-3 && behind%200 > 0 {
					continue
				}
				n++
				waits := int64(cut)
				if cut >= len(h.header) {
					waits -= int64(len(h.header))
				}
				got := visit(addrs["trusting "+mode], stream[:cut], stream[cut:], func() bool {
					return d.partialBytes.Load() == waits && (waits > 0 || slices.Contains(sourcesOf(d), h.client))
				})
				want := fmt.Sprintf("client %s, to %s, local false, name %q, path ", h.client, h.dst, named)
				path := cmp.Or(h.path, pathIn(got))
				if want += fmt.Sprintf("%q, %x, <nil>", path, hello); got != want || path == "" {
					t.Fatalf("%s to %s, cut at %d of %d + %d: the target says\n%s, want\n%s",
						h.name, mode, cut, len(h.header), len(hello), got, want)
				}
			}
			eventually(t, "they end", func() bool { return d.limiter.Total() == 0 && d.flows.Len() == 0 })
			// The test's own waiting takes some now and then. On the slow path each takes one more at least.
			if took := goroutines() - before; float64(took) > float64(n)*(flows[mode]+0.75) {
				t.Errorf("%s to %s: %d connections took %d goroutines, without a header each takes %.2f",
					h.name, mode, n, took, flows[mode])
			}
		}
	}
	// Where a header names no client, no address that it has in it is passed on. That of a process on this host
	// is where the header says that the connection is its own.
	own := regexp.MustCompile(`client 127\.0\.0\.1:\d+, to ` + addrs["open sni"] + ",")
	for name, header := range map[string][]byte{"v1 UNKNOWN": []byte("PROXY UNKNOWN\r\n"), "PROXY, UNSPEC": headerV2(0x21, 0),
		"PROXY, UNSPEC, with a TLV": headerV2(0x21, 0, tlv(4, "\x00\x00\x00")), "LOCAL, UNSPEC": headerV2(0x20, 0),
		"LOCAL with addresses": headerV2(0x20, 0x11, fromClient4), "LOCAL with nonsense": headerV2(0x20, 0, []byte{1, 2, 3})} {
		who := "client invalid AddrPort, to invalid AddrPort,"
		if strings.HasPrefix(name, "LOCAL") {
			who = "its own,"
		}
		for cut := range header {
			got := visit(addrs["open sni"], header[:cut], slices.Concat(header[cut:], hello),
				func() bool { return d.partialBytes.Load() == int64(cut) })
			got = own.ReplaceAllString(got, "its own,")
			want := fmt.Sprintf(`%s local false, name "a.test", path %q, %x, <nil>`, who, pathIn(got), hello)
			if got != want || pathIn(got) == "" {
				t.Fatalf("%s, cut at %d of %d: the target says\n%s, want\n%s", name, cut, len(header), got, want)
			}
		}
	}
	if n, y := d.partialBytes.Load(), d.limiter.Yielding(); n != 0 || y != 0 {
		t.Errorf("%d bytes and %d connections wait yet", n, y)
	}
	log := d.log.String()
	for _, want := range []string{"client=" + proxiedClient + " downstream=127.0.0.1:", "id=" + proxiedPath} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not have %q", want)
		}
	}
	if r := d.Status().Refused; len(r) > 0 {
		t.Errorf("some were refused: %v", r)
	}
}

// sourcesOf are those that connections count for, as the address and port of the test's clients.
func sourcesOf(d *daemon) (all []string) {
	sources := d.limiter.Sources()
	if sources[netip.MustParsePrefix("198.51.100.7/32")] > 0 {
		all = append(all, proxiedClient)
	}
	if sources[netip.MustParsePrefix("2001:db8::/64")] > 0 {
		all = append(all, "[2001:db8::7]:4321")
	}
	return all
}

var pathWord = regexp.MustCompile(`path "([0-9a-f]{32})"`)

func pathIn(s string) string {
	if m := pathWord.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}

// TestBothPaths: whoever comes with whatever, it is the same on the fast path as on the slow one: what the
// peer gets, what the target hears, what is counted and what the log says; also where tailscaled must be
// asked at each step.
func TestBothPaths(t *testing.T) {
	ts := startTailscaled(t)
	target := heardBy(t)
	_, port, _ := net.SplitHostPort(target)
	config := func() string {
		return fmt.Sprintf(`
listeners:
  - { name: sni, listen: %q, mode: sni, accept_proxy: { from: ["tag:home", edge, 192.0.2.0/24, 100.64.0.64/26] }, routes: [
      { sni: [a.test], forward: %[5]q, send_proxy: v2 },
      { sni: [mine.test], forward: %[5]q, send_proxy: v2, allow: ["me@vsq.cz", edge, 198.51.100.0/24] },
      { sni: [named.test], forward: %[6]q, send_proxy: v2 },
      { sni: [no.test], reject: true } ] }
  - { name: required, listen: %[2]q, mode: sni, accept_proxy: { from: ["tag:home", edge, 192.0.2.0/24], required: true }, allow: ["me@vsq.cz", 198.51.100.0/24], default: { forward: %[5]q, send_proxy: v2 } }
  - { name: tcp, listen: %[3]q, mode: tcp, accept_proxy: { from: ["tag:home", edge, 192.0.2.0/24] }, default: { forward: %[5]q, send_proxy: v2, allow: ["me@vsq.cz", 198.51.100.0/24] } }
  - { name: bare, listen: %[4]q, mode: tcp, allow: ["me@vsq.cz", 198.51.100.0/24], default: { forward: %[5]q, send_proxy: v2 } }
`, freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t), target, "localhost:"+port)
	}
	known := start(t, config())
	alone := startTailscaled(t)
	alone.noBus = true
	asking := start(t, config())
	for _, n := range ts.nodes { // so that all are known that can be
		for _, a := range n.addrs {
			known.tailnet.WhoIs(t.Context(), netip.MustParseAddr(a))
		}
	}
	eventually(t, "the tailnet is followed", func() bool {
		known.tailnet.WhoIs(t.Context(), netip.MustParseAddr("100.64.0.3"))
		_, err := known.tailnet.Known(netip.MustParseAddr("100.64.0.3"))
		return err == nil
	})

	peers := []string{"192.0.2.9:9", "203.0.113.9:9", "198.51.100.9:9", "100.64.0.3:9", "[fd7a:115c:a1e0::4]:9",
		"100.64.0.5:9", "100.64.0.99:9"}
	prefaces := [][]byte{nil, proxiedHeaders[0].header, []byte("PROXY TCP4 203.0.113.7 192.0.2.80 4321 443\r\n"),
		[]byte("PROXY UNKNOWN\r\n"), proxiedHeaders[4].header, headerV2(0x20, 0), headerV2(0x21, 0), headerV2(0x20, 0x11, fromClient4), from("100.64.0.5:1"), from("[fd7a:115c:a1e0::6]:1"),
		from("100.64.0.4:1"), from("100.64.0.98:1"), from("192.0.2.10:1"),
		slices.Concat(from("198.51.100.7:1"), from("198.51.100.8:1")), // the second is data
		headerV2(0x21, 0x11, fromClient4, tlv(4, strings.Repeat("x", proxyheader.MaxBytes))),
		headerV2(0x21, 0x11, fromClient4[:7]), []byte("PROXY TCP4 198.51.100.7 192.0.2.80 4321 99999\r\n"),
		[]byte("PROXY " + strings.Repeat("x", 110)),
		[]byte("PROXY TCP4 198.51"), []byte("PRO"), proxiedHeaders[4].header[:20]} // the last three are parts
	payloads := [][]byte{nil, helloFor(t, "a.test"), helloFor(t, "mine.test"), helloFor(t, "no.test"),
		helloFor(t, "named.test"), []byte("GET / HTTP/1.0\r\n\r\n")}

	// answer is all that can be seen of a connection.
	answer := func(d *daemon, slow bool, listener, peer string, sent []byte, reset bool) string {
		d.limited.mu.Lock()
		clear(d.limited.last) // each is told
		d.limited.mu.Unlock()
		logged, refused := len(d.log.String()), d.Status().Refused
		c := d.comeBy(t, listener, peer, slow)
		c.Write(sent)
		var got []byte
		if reset {
			c.SetLinger(0)
		} else {
			c.CloseWrite()
			got, _ = io.ReadAll(c)
		}
		c.Close()
		for deadline := time.Now().Add(patience); d.limiter.Total() > 0 || d.flows.Len() > 0; time.Sleep(50 * time.Microsecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s from %s, %q: it does not end", listener, peer, sent)
			}
		}
		for reason, n := range d.Status().Refused {
			if more := n - refused[reason]; more > 0 {
				got = fmt.Appendf(got, "\nrefused as %s: %d", reason, more)
			}
		}
		got = fmt.Appendf(got, "\n%s", d.log.String()[logged:])
		return string(variable.ReplaceAll(got, nil))
	}
	n := 0
	for _, listener := range []string{"sni", "required", "tcp", "bare"} {
		for _, peer := range peers {
			for i, preface := range prefaces {
				for j, payload := range payloads {
					if listener != "sni" && (i+j)%3 > 0 {
						continue
					}
					sent, broken := slices.Concat(preface, payload), payload == nil && i >= len(prefaces)-3
					for _, reset := range []bool{false, true} {
						if reset && !broken {
							continue // what is relayed until then is a matter of time
						}
						want := answer(known, true, listener, peer, sent, reset)
						for how, d := range map[string]*daemon{"all are known": known, "tailscaled is asked": asking} {
							n++
							if got := answer(d, false, listener, peer, sent, reset); got != want {
								t.Fatalf("%s from %s, %.60q and %.20q, reset %v, %s: on the fast path\n%s\non the slow one\n%s",
									listener, peer, preface, payload, reset, how, got, want)
							}
						}
					}
				}
			}
		}
	}
	t.Logf("%d connections", n)
	// Nor does a hop count for itself, who might be a client yet.
	c := asking.come(t, "sni", "100.64.0.3:9")
	if s := asking.limiter.Sources(); len(s) > 0 {
		t.Errorf("who is not known yet counts for %v", s)
	}
	c.Close()
}

// variable is what differs between two connections that are alike.
var variable = regexp.MustCompile(`time=\S+|to 127\.0\.0\.1:[0-9]+|id=[0-9a-f]{32}|path "[0-9a-f]{32}"|` +
	`(duration|downstream_rtt|upstream_rtt)=\S+|read tcp \S+: |level=\w+ msg="(half|less than half) of the memory .*`)

// TestHalfProxyHeadersWait: connections whose PROXY header does not come whole have no goroutine; those whose
// header has come wait for the hello in the same way, and count for their client. Whom tailscaled has named
// it is not asked about.
func TestHalfProxyHeadersWait(t *testing.T) {
	const clients = 60
	ts := startTailscaled(t)
	hello := helloFor(t, "a.test")
	up := backend(t, echo)
	cert, _ := certificate(t, "a.test")
	certFile, keyFile := writePair(t, cert)
	https := fmt.Sprintf("certificates: [ { files: { cert: %q, key: %q } } ], ", certFile, keyFile)
	client, user := proxiedHeaders[0].header, from("100.64.0.5:1")
	for _, v := range []struct {
		name, mode, more string
		header, hello    []byte
	}{
		{"nothing", "sni", "", nil, nil},
		{"half a header", "sni", "", client[:20], nil},
		{"half a header", "tcp", "", user[:20], nil},
		{"half a header", "https", https, client[:20], nil},
		{"a header", "sni", "", client, nil},
		{"a header, half a hello", "sni", "", client, hello[:len(hello)/2]},
		{"a header of a user, half a hello", "sni", "allow: [\"me@vsq.cz\"], ", user, hello[:len(hello)/2]},
		{"a header of a user, half a hello", "https", https, user, hello[:len(hello)/2]},
	} {
		t.Run(v.name+", "+v.mode, func(t *testing.T) {
			d := start(t, fmt.Sprintf(`
listeners: [ { name: web, listen: [%q], mode: %s, %saccept_proxy: { from: ["tag:home"] }, default: { forward: %q } } ]
limits: { hello_timeout: 5m }`, freeAddr(t), v.mode, v.more, up))
			eventually(t, "who they are is known", func() bool {
				for _, a := range []string{"100.64.0.4", "100.64.0.5"} {
					d.tailnet.WhoIs(t.Context(), netip.MustParseAddr(a))
					if _, err := d.tailnet.Known(netip.MustParseAddr(a)); err != nil {
						return false
					}
				}
				return true
			})
			asked := ts.times("100.64.0.4") + ts.times("100.64.0.5")
			before := runtime.NumGoroutine()
			var conns []*net.TCPConn
			for range clients {
				c := d.come(t, "web", "100.64.0.4:1")
				c.Write(slices.Concat(v.header, v.hello))
				conns = append(conns, c)
			}
			_, n, _ := proxyheader.Parse(v.header, 0)
			whole, waits := n > 0, len(v.header)-n+len(v.hello)
			eventually(t, "all wait", func() bool {
				sources := slices.Collect(maps.Values(d.limiter.Sources()))
				return d.limiter.Yielding() == clients && d.partialBytes.Load() == int64(clients*waits) &&
					(!whole && len(sources) == 0 || whole && len(sources) == 1 && sources[0] == clients)
			})
			if n := runtime.NumGoroutine() - before; n > clients/5 {
				t.Errorf("%d goroutines for %d connections that wait", n, clients)
			}
			if n := ts.times("100.64.0.4") + ts.times("100.64.0.5") - asked; n > 0 {
				t.Errorf("tailscaled was asked %d times who they are", n)
			}
			for _, c := range conns {
				c.Close()
			}
			eventually(t, "they end", func() bool { return d.limiter.Total() == 0 })
			if n, y := d.partialBytes.Load(), d.limiter.Yielding(); n != 0 || y != 0 {
				t.Errorf("%d bytes and %d connections wait yet", n, y)
			}
		})
	}
}

// TestProxyHeaderTimes: a PROXY header has its time from the connection on, and what is behind it from the
// header on.
func TestProxyHeaderTimes(t *testing.T) {
	const timeout = time.Second
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.1] }, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: %v }`, addr, timeout))
	for try := range 20 {
		begun := time.Now()
		c := dialTCP(t, addr)
		if try == 0 {
			c.Write(proxiedHeaders[0].header[:20])
			n, err := c.Read(make([]byte, 1))
			if err == nil || err == io.EOF || time.Since(begun) < timeout || d.refused("proxy_timeout") != 1 {
				t.Errorf("half a header: %d bytes, %v, after %v; %v", n, err, time.Since(begun), d.Status().Refused)
			}
			continue
		}
		time.Sleep(timeout / 2)
		sent := time.Now()
		c.Write(proxiedHeaders[0].header)
		if n, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("nothing behind the header: %d bytes, %v", n, err)
		}
		if d.refused("hello_timeout") == 0 {
			continue // this machine slept for too long
		}
		if took := time.Since(sent); took < timeout {
			t.Errorf("it was waited %v for what is behind a header, and %v for the header", took, sent.Sub(begun))
		}
		if !strings.Contains(d.log.String(), "client="+proxiedClient) {
			t.Error("the log does not say whose it was")
		}
		return
	}
	t.Error("no header came in time")
}

// TestTrickledProxyHeader: bytes that keep coming buy no time, nor does a header that is never whole.
func TestTrickledProxyHeader(t *testing.T) {
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.1] }, default: { forward: "127.0.0.1:9" } } ]
limits: { hello_timeout: 100ms }`, addr))
	c := dialTCP(t, addr)
	c.Write(headerV2(0x21, 0x11, make([]byte, 4000))[:16])
	for sent := 0; d.refused("proxy_timeout") == 0; sent++ {
		if sent == 3900 {
			t.Fatal("still read")
		}
		c.Write([]byte{0})
		time.Sleep(5 * time.Millisecond)
	}
}

// TestOldestProxyHeaderGoes: who waits for a PROXY header, or behind one for a hello, gives its place to a
// newcomer.
func TestOldestProxyHeaderGoes(t *testing.T) {
	header, hello := proxiedHeaders[0].header, helloFor(t, "a.test")
	for name, first := range map[string][]byte{"half a header": header[:9], "a header": header,
		"a header and half a hello": slices.Concat(header, hello[:99])} {
		for _, limits := range []string{"connections: 4", ""} {
			t.Run(name+" "+limits, func(t *testing.T) {
				addr := freeAddr(t)
				d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q } } ]
limits: { hello_timeout: 5m, %s }`, addr, backend(t, echo), limits))
				if limits == "" {
					d.mostWaiting.Store(4)
				}
				var waiting []*net.TCPConn
				for i := range 4 {
					c := dialTCP(t, addr)
					c.Write(first)
					waiting = append(waiting, c)
					eventually(t, "it waits", func() bool {
						s := slices.Collect(maps.Values(d.limiter.Sources()))
						return d.limiter.Yielding() == i+1 && (len(first) < len(header) || len(s) == 1 && s[0] == i+1)
					})
				}
				good := dialTCP(t, addr)
				good.Write(slices.Concat(header, hello))
				if _, err := io.ReadFull(good, make([]byte, len(hello))); err != nil {
					t.Fatalf("a good client: %v", err)
				}
				if _, err := waiting[0].Read(make([]byte, 1)); err == nil || err == io.EOF {
					t.Errorf("the oldest has not been reset: %v", err)
				}
				for i, c := range waiting[1:] {
					c.Write(slices.Concat(header, hello)[len(first):])
					got := make([]byte, len(hello))
					if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, hello) {
						t.Errorf("number %d of those that waited: %v", i+2, err)
					}
				}
				if n := d.refused("hello_displaced"); n != 1 {
					t.Errorf("%d are counted, want 1", n)
				}
			})
		}
	}
}

// TestProxyHeaderLimits: connections count for the client that their header names, once it is there.
func TestProxyHeaderLimits(t *testing.T) {
	hello := helloFor(t, "a.test")
	for _, mode := range []string{"sni", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			addr := freeAddr(t)
			d := start(t, fmt.Sprintf(`
listeners: [ { listen: [%q], mode: %s, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q } } ]
limits: { connections_per_source: 2 }`, addr, mode, backend(t, echo)))
			visit := func(client string) error {
				c := dialTCP(t, addr)
				c.Write(slices.Concat(from(client), hello))
				_, err := io.ReadFull(c, make([]byte, len(hello)))
				return err
			}
			for i, v := range []struct {
				client string
				ok     bool
			}{{"198.51.100.7:1", true}, {"198.51.100.7:2", true}, {"198.51.100.7:3", false}, {"198.51.100.8:1", true},
				{"[2001:db8::7]:1", true}, {"[2001:db8::8]:1", true}, {"[2001:db8::9]:1", false}} {
				if err := visit(v.client); (err == nil) != v.ok {
					t.Errorf("number %d, %s: %v", i+1, v.client, err)
				}
			}
			if n := d.refused("over_limit"); n != 2 {
				t.Errorf("%d are refused, want 2", n)
			}
			if s := fmt.Sprint(d.limiter.Sources()); s != "map[198.51.100.7/32:2 198.51.100.8/32:1 2001:db8::/64:2]" {
				t.Errorf("they count for %s", s)
			}
			if !strings.Contains(d.log.String(), "too many connections from one source: 198.51.100.7 has 2") {
				t.Error("the log does not say whose")
			}
		})
	}
}

// TestKnownIdentities: who was named by tailscaled once comes in without another question, and does not any
// more once tailscaled says something else, is gone, or can't say: on the fast path as well.
func TestKnownIdentities(t *testing.T) {
	ts := startTailscaled(t)
	target, hello := heardBy(t), helloFor(t, "a.test")
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: sni, listen: %q, mode: sni, accept_proxy: { from: ["tag:home"], required: true }, allow: ["me@vsq.cz"], default: { forward: %[3]q, send_proxy: v2 } }
  - { name: tcp, listen: %[2]q, mode: tcp, accept_proxy: { from: ["tag:home"] }, default: { forward: %[3]q, send_proxy: v2, allow: ["me@vsq.cz"] } }`, freeAddr(t), freeAddr(t), target))
	const hop, user = "100.64.0.4", "100.64.0.5"
	visitBy := func(slow bool) (outcome string) {
		for _, listener := range []string{"sni", "tcp"} {
			refused := d.Status().Refused
			c := d.comeBy(t, listener, hop+":1", slow)
			c.Write(slices.Concat(from(user+":1"), hello))
			c.CloseWrite()
			got, _ := io.ReadAll(c)
			eventually(t, "it ends", func() bool { return d.limiter.Total() == 0 })
			this := "in"
			for reason, n := range d.Status().Refused {
				if n > refused[reason] {
					this = reason
				}
			}
			if heard := bytes.HasPrefix(got, []byte("client "+user)); heard != (this == "in") {
				t.Errorf("%s: %s, and the target heard %q", listener, this, got)
			}
			if outcome != "" && outcome != this {
				outcome += ", " + this
			} else {
				outcome = this
			}
		}
		return outcome
	}
	visit := func() string { return visitBy(false) }
	known := func(addr string) bool { _, err := d.tailnet.Known(netip.MustParseAddr(addr)); return err == nil }
	expect := func(when, want string) {
		t.Helper()
		if got := visit(); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	comesIn := func(when string) {
		t.Helper()
		eventually(t, when+": they come in, and are known", func() bool { return visit() == "in" && known(hop) && known(user) })
		const times = 20
		asked := ts.times(hop) + ts.times(user)
		for _, slow := range []bool{false, true} {
			before := d.slowPaths.Load()
			for range times {
				if got := visitBy(slow); got != "in" {
					t.Errorf("%s, known, slow path %v: %s", when, slow, got)
				}
			}
			if n := d.slowPaths.Load() - before; slow && n != 2*times || !slow && n > times/10 {
				t.Errorf("%s, known, slow path %v: %d of %d connections took it", when, slow, n, 2*times)
			}
		}
		if n := ts.times(hop) + ts.times(user) - asked; n > 0 {
			t.Errorf("%s: tailscaled was asked %d times about whom it had named", when, n)
		}
	}
	// changes is what happens to the netmap; nobody may be known then by what was said before.
	changes := func(change func()) {
		t.Helper()
		ts.change(change)
		eventually(t, "the change is heard of", func() bool { return !known(hop) && !known(user) })
	}
	home, phone := ts.nodes["home"], ts.nodes["phone"]
	restore := func() {
		ts.nodes["home"], ts.nodes["phone"], ts.state = home, phone, "Running"
		delete(ts.nodes, "other")
	}

	comesIn("at first")
	changes(func() { ts.nodes["home"] = node{"friend@vsq.cz", nil, home.addrs} })
	expect("the hop has lost its tag", proxyFromStranger)
	eventually(t, "that is known", func() bool { visit(); return known(hop) })
	expect("the hop has lost its tag, which is known", proxyFromStranger)
	changes(restore)
	comesIn("it has it again")
	changes(func() { ts.nodes["phone"] = node{"friend@vsq.cz", nil, phone.addrs} })
	expect("the client's device has another owner", notAllowed)
	eventually(t, "that is known", func() bool { visit(); return known(user) })
	expect("the client's device has another owner, who is known", notAllowed)
	changes(restore)
	comesIn("it has its owner again")
	changes(func() { delete(ts.nodes, "home") })
	expect("the hop is gone", proxyFromStranger)
	changes(func() {
		restore()
		delete(ts.nodes, "home")
		ts.nodes["other"] = node{"", []string{"tag:other"}, home.addrs}
	})
	expect("another node has its address", proxyFromStranger)
	changes(func() { restore(); ts.state = "NeedsLogin" })
	eventually(t, "that is known", func() bool { return visit() == notIdentified })
	expect("this machine is logged out", notIdentified)
	changes(restore)
	comesIn("it is logged in again")
	ts.stop()
	eventually(t, "tailscaled is missed", func() bool { return !known(hop) && !known(user) })
	expect("tailscaled is gone", notIdentified)
	ts.nodes["home"] = node{"friend@vsq.cz", nil, home.addrs}
	ts.start()
	for range 50 { // until it is followed, and then
		if got := visit(); got != proxyFromStranger && got != notIdentified {
			t.Fatalf("tailscaled is back, the tag is not: %s", got)
		}
	}
	eventually(t, "it is known who they are", func() bool { return visit() == proxyFromStranger })
	changes(restore)
	ts.mu.Lock()
	ts.slow = 200 * time.Millisecond
	ts.mu.Unlock()
	eventually(t, "tailscaled is slow, and they come in", func() bool { return visit() == "in" })
}
