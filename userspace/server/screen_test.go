package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// comeFrom connects from an address of this host, and says after a PROXY header for client, if that is not
// "", what came back of an echo: nil, or how the connection ended.
func comeFrom(t *testing.T, addr, from, client string) error {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if client != "" {
		var src, dst netip.AddrPort
		src, dst = netip.AddrPortFrom(netip.MustParseAddr(client), 4711), netip.MustParseAddrPort("203.0.113.9:443")
		if src.Addr().Is6() {
			dst = netip.MustParseAddrPort("[2001:db8:ffff::9]:443")
		}
		h := proxyheader.Header{Source: src, Destination: dst}
		c.Write(h.Append(nil))
	}
	io.WriteString(c, "hello")
	_, err = io.ReadFull(c, make([]byte, 5))
	return err
}

// silent connects from an address, and says how a connection ended on which nothing was sent.
func silent(t *testing.T, addr, from string) error {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

// TestDeny: who is denied is reset before it has said anything, on listeners of every mode.
func TestDeny(t *testing.T) {
	cert, _ := certificate(t, "app.test")
	certFile, key := writePair(t, cert)
	for _, mode := range []string{"tcp", "sni", "http", "https"} {
		t.Run(mode, func(t *testing.T) {
			addr, more := freeAddr(t), ""
			if mode == "https" {
				more = fmt.Sprintf("certificates: [{ files: { cert: %q, key: %q } }], ", certFile, key)
			}
			d := start(t, fmt.Sprintf(`listeners: [{ name: web, listen: %q, mode: %s, %s
  deny: [127.0.0.2, 127.0.1.0/24], default: { forward: %q } }]
limits: { hello_timeout: 5m }`, addr, mode, more, backend(t, echo)))
			for _, from := range []string{"127.0.0.2", "127.0.1.7"} {
				if err := silent(t, addr, from); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("from %s: %v, want a reset", from, err)
				}
			}
			if n := d.refused(denied); n != 2 {
				t.Errorf("denied: %d, want 2", n)
			}
			if !strings.Contains(d.log.String(), "deny names 127.0.0.2") {
				t.Error("the log doesn't say who")
			}
			if mode == "tcp" {
				if err := comeFrom(t, addr, "127.0.0.1", ""); err != nil {
					t.Errorf("somebody else: %v", err)
				}
			}
			if n := d.refused(denied); n != 2 {
				t.Errorf("denied: %d, want 2", n)
			}
		})
	}
}

// TestDenyBehindProxy: behind a proxy it is the address in the header, and on http listeners that in the
// request.
func TestDenyBehindProxy(t *testing.T) {
	file := filepath.Join(t.TempDir(), "deny.txt")
	if err := os.WriteFile(file, []byte("198.51.100.0/24 # x\n2001:db8::/32\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tcp, web := freeAddr(t), freeAddr(t)
	back := backend(t, echo)
	target := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {})
	d := start(t, fmt.Sprintf(`listeners:
  - { name: tcp, listen: %q, mode: tcp, accept_proxy: { from: 127.0.0.1 }, deny: [{ file: %q }],
      default: { forward: %q } }
  - { name: web, listen: %q, mode: http, accept_proxy: { from: 127.0.0.1 }, deny: [{ file: %q }],
      default: { forward: %q } }
`, tcp, file, back, web, file, target))
	d.mu.Lock()
	n := len(d.denyFiles)
	d.mu.Unlock()
	if n != 1 {
		t.Errorf("%d files are followed, want one that both share", n)
	}
	for client, want := range map[string]bool{"198.51.100.7": false, "2001:db8::7": false,
		"192.0.2.7": true, "2001:db9::7": true} {
		if err := comeFrom(t, tcp, "127.0.0.1", client); (err == nil) != want {
			t.Errorf("%s in a PROXY header: %v", client, err)
		}
	}
	if n := d.refused(denied); n != 2 {
		t.Errorf("denied: %d, want 2", n)
	}
	for client, want := range map[string]int{"198.51.100.7": http.StatusForbidden, "192.0.2.7": http.StatusOK} {
		req, _ := http.NewRequest("GET", "http://"+web+"/", nil)
		req.Header.Set("X-Forwarded-For", client)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s in X-Forwarded-For: %s, want %d", client, res.Status, want)
		}
	}
	if n := d.refused(denied); n != 3 {
		t.Errorf("denied: %d, want 3", n)
	}

	// The file is followed, a mistake in it changes nothing, and neither does a reload with it.
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("192.0.2.7\n")
	eventually(t, "the file is read again", func() bool {
		return comeFrom(t, tcp, "127.0.0.1", "192.0.2.7") != nil
	})
	if err := comeFrom(t, tcp, "127.0.0.1", "198.51.100.7"); err != nil {
		t.Errorf("who is no longer in the file: %v", err)
	}
	write("192.0.2.8\n192.0.2.0/8\n")
	eventually(t, "the mistake is logged", func() bool {
		return strings.Contains(d.log.String(), file+`:2:1: \"192.0.2.0/8\": it has bits set behind its length`)
	})
	if !d.has(PartDeny, file, ":2:1: ") || !d.Ready().Ready {
		t.Errorf("the problems: %v", d.Problems())
	}
	yaml := fmt.Sprintf("listeners:\n  - { name: tcp, listen: %q, mode: tcp,\n      accept_proxy: { from: 127.0.0.1 },\n"+
		"      deny: [192.0.2.9, { file: %q }], default: { forward: %q } }\n", tcp, file, back)
	place := "test.yaml:4:33: deny: "
	if err := d.Reload(parse(t, yaml)); err == nil || !strings.Contains(err.Error(), place+file+":2:1: ") {
		t.Errorf("a reload with a bad file: %v", err)
	}
	for client, want := range map[string]bool{"192.0.2.7": false, "192.0.2.8": true, "192.0.2.9": true} {
		if err := comeFrom(t, tcp, "127.0.0.1", client); (err == nil) != want {
			t.Errorf("%s after the mistake: %v", client, err)
		}
	}
	write("192.0.2.8\n")
	if err := d.Reload(parse(t, yaml)); err != nil {
		t.Fatal(err)
	}
	for client, want := range map[string]bool{"192.0.2.7": true, "192.0.2.8": false, "192.0.2.9": false} {
		if err := comeFrom(t, tcp, "127.0.0.1", client); (err == nil) != want {
			t.Errorf("%s after the reload: %v", client, err)
		}
	}
	write("")
	if err := d.Reload(parse(t, yaml)); err != nil {
		t.Fatal(err)
	}
	if err := comeFrom(t, tcp, "127.0.0.1", "192.0.2.8"); err == nil || !d.has(PartDeny, file, "stay in force") {
		t.Errorf("after a reload with the file emptied: %v, %v", err, d.Problems())
	}
	os.Remove(file)
	if err := d.Reload(parse(t, yaml)); err == nil || !strings.Contains(err.Error(), place+"stat "+file) {
		t.Errorf("a reload without the file: %v", err)
	}
}

// TestDenyManyPrefixes: a daemon that runs takes a file of 200,000 prefixes in, up to the last of them.
func TestDenyManyPrefixes(t *testing.T) {
	const prefixes = 200_000
	file, addr := filepath.Join(t.TempDir(), "deny.txt"), freeAddr(t)
	if err := os.WriteFile(file, []byte("# none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := start(t, fmt.Sprintf(`listeners: [ { listen: %q, mode: tcp, deny: [ { file: %q } ], default: { forward: %q } } ]`,
		addr, file, backend(t, echo)))
	if err := comeFrom(t, addr, "127.0.0.2", ""); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for i := range prefixes - 1 {
		fmt.Fprintf(&text, "10.%d.%d.%d/32\n", i>>16, i>>8&0xff, i&0xff)
	}
	text.WriteString("127.0.0.2\n")
	if err := os.WriteFile(file+".new", []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	eventually(t, "whom the last line names is denied", func() bool { return comeFrom(t, addr, "127.0.0.2", "") != nil })
	if err := comeFrom(t, addr, "127.0.0.1", ""); err != nil {
		t.Errorf("whom no line names: %v", err)
	}
	if n := d.log.Count(fmt.Sprintf("prefixes=%d", prefixes)); n != 1 {
		t.Errorf("the log says %d times that all are read", n)
	}
}

// TestDenyFileUnread: where a file of denied prefixes can't be read when the daemon starts, who uses it lets in
// nobody until it can, and the others serve. An upgrade, and a reload with another such file, are refused.
func TestDenyFileUnread(t *testing.T) {
	for what, first := range map[string]string{"missing": "", "a wrong line": "192.0.2.1\n192.0.2.0/8\n"} {
		t.Run(what, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "deny.txt")
			write := func(text string) {
				t.Helper()
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if first != "" {
				write(first)
			}
			shut, open, back := freeAddr(t), freeAddr(t), backend(t, echo)
			yaml := fmt.Sprintf(`listeners:
  - { name: shut, listen: %q, mode: tcp, accept_proxy: { from: 127.0.0.3 }, deny: [{ file: %q }], default: { forward: %q } }
  - { name: open, listen: %q, mode: tcp, deny: [192.0.2.1], default: { forward: %q } }
`, shut, file, back, open, back)
			d := start(t, yaml)
			for _, client := range []string{"", "198.51.100.7"} { // the hop itself, and whom it speaks for
				if err := comeFrom(t, shut, "127.0.0.3", client); err == nil {
					t.Errorf("%q comes in while nobody knows who is denied", client)
				}
			}
			if n := d.refused(denied); n != 2 || !strings.Contains(d.log.String(), "deny may name 127.0.0.3: "+file) {
				t.Errorf("denied: %d, want 2", n)
			}
			if err := comeFrom(t, open, "127.0.0.1", ""); err != nil {
				t.Errorf("the other listener: %v", err)
			}
			if !d.has(PartDeny, file, "everybody is denied until it can be read: ") || len(d.Problems()) != 1 || d.Ready().Ready {
				t.Errorf("the problems: %q, ready: %v", d.Problems(), d.Ready().Ready)
			}
			if err := d.Reload(parse(t, yaml)); err != nil {
				t.Errorf("a reload while the daemon does without it: %v", err)
			}
			if err := d.Reload(parse(t, strings.Replace(yaml, "[192.0.2.1]", "[{ file: /none.txt }]", 1))); err == nil {
				t.Error("a reload with another file that is missing")
			}
			o := discard()
			o.Replaces = true
			if srv, err := New(parse(t, yaml), o); err == nil || !strings.Contains(err.Error(), "test.yaml:2:") {
				t.Errorf("an upgrade: %v", err)
				if err == nil {
					srv.Close()
				}
			}

			write("")
			eventually(t, "it has become empty", func() bool { return d.has(PartDeny, file, "has no prefix") })
			if err := comeFrom(t, shut, "127.0.0.3", "192.0.2.9"); err == nil || d.Ready().Ready {
				t.Error("an empty file lets everybody in")
			}
			write("198.51.100.0/24\n")
			eventually(t, "the file is read", func() bool { return len(d.Problems()) == 0 })
			if err := comeFrom(t, shut, "127.0.0.3", "192.0.2.9"); err != nil || !d.Ready().Ready {
				t.Errorf("whom the file does not name: %v; ready: %v", err, d.Ready().Ready)
			}
			if err := comeFrom(t, shut, "127.0.0.3", "198.51.100.7"); err == nil {
				t.Error("whom the file names comes in")
			}
			if n := d.log.Count("everybody is denied"); n != 4 { // at the start, at each reload, and when it is empty
				t.Errorf("the log says %d times that everybody is denied, want 4", n)
			}
		})
	}
}

// TestNewConnectionsPerSource: the rate is that of the peer, and behind a proxy that of each client, not the
// proxy's.
func TestNewConnectionsPerSource(t *testing.T) {
	direct, behind := freeAddr(t), freeAddr(t)
	yaml := fmt.Sprintf(`listeners:
  - { name: direct, listen: %q, mode: tcp, default: { forward: %q } }
  - { name: behind, listen: %q, mode: tcp, accept_proxy: { from: 127.0.0.1 }, default: { forward: %[2]q } }
`, direct, backend(t, echo), behind)
	d := start(t, yaml+"limits: { new_connections_per_source: { rate: 1/h, burst: 3 } }")
	count := func(addr, from, client string) (in int) {
		for range 6 {
			if comeFrom(t, addr, from, client) == nil {
				in++
			}
		}
		return in
	}
	for _, c := range []struct {
		addr, from, client string
		want               int
	}{
		{direct, "127.0.0.1", "", 3},
		{direct, "127.0.0.2", "", 3},
		{direct, "127.0.0.1", "", 0},
		{behind, "127.0.0.1", "192.0.2.1", 3},
		{behind, "127.0.0.1", "2001:db8::1", 3},
		{behind, "127.0.0.1", "2001:db8::2", 0}, // of the same /64
		{behind, "127.0.0.1", "2001:db8:0:1::1", 3},
	} {
		if in := count(c.addr, c.from, c.client); in != c.want {
			t.Errorf("from %s for %q: %d of 6 were let in, want %d", c.from, c.client, in, c.want)
		}
	}
	if n := d.refused(overRate); n != 27 {
		t.Errorf("over_rate: %d, want 27", n)
	}
	const why = "127.0.0.1 may open one every 1h0m0s, and 3 at once (limits.new_connections_per_source)"
	if !strings.Contains(d.log.String(), why) {
		t.Error("the log doesn't say why")
	}
	// A stranger who sends a PROXY header is counted by its own address.
	for range 4 {
		comeFrom(t, behind, "127.0.0.3", "192.0.2.77")
	}
	if n, s := d.refused(overRate), d.refused(proxyFromStranger); n != 28 || s != 3 {
		t.Errorf("over_rate: %d, want 28; %s: %d, want 3", n, proxyFromStranger, s)
	}
	if err := d.Reload(parse(t, yaml)); err != nil {
		t.Fatal(err)
	}
	if in := count(direct, "127.0.0.1", ""); in != 6 {
		t.Errorf("without the bound %d of 6 were let in", in)
	}
}
