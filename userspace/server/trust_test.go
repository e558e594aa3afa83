package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/proxyheader"
)

// protocol is a way to ask for something.
type protocol struct {
	name    string
	tls, h2 bool
}

var protocols = []protocol{{"h1", false, false}, {"h2c", false, true}, {"h1 TLS", true, false}, {"h2 TLS", true, true}}

func (p protocol) mode() string {
	if p.tls {
		return "https"
	}
	return "http"
}

// client asks by p on one connection, which dial makes, as long as that is kept.
func (p protocol) client(t *testing.T, pool *x509.CertPool, dial func() net.Conn) *http.Client {
	var speaks http.Protocols
	speaks.SetHTTP1(!p.h2)
	speaks.SetHTTP2(p.h2 && p.tls)
	speaks.SetUnencryptedHTTP2(p.h2 && !p.tls)
	tr := &http.Transport{Protocols: &speaks, TLSClientConfig: &tls.Config{RootCAs: pool}, DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(), nil }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// get asks for a path of app.test. header has NAME: VALUE lines.
func (p protocol) get(t *testing.T, c *http.Client, path string, header ...string) (*http.Response, http.Header, string) {
	t.Helper()
	scheme := "http"
	if p.tls {
		scheme = "https"
	}
	req, err := http.NewRequest("GET", scheme+"://app.test"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		req.Header.Add(name, value)
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
	var got http.Header // that the target got
	json.Unmarshal(body, &got)
	return res, got, string(body)
}

// certificateYAML is the certificates section of a listener, for app.test where it is https.
func (p protocol) certificateYAML(t *testing.T) (string, *x509.CertPool) {
	if !p.tls {
		return "", nil
	}
	cert, pool := certificate(t, "app.test")
	file, key := writePair(t, cert)
	return fmt.Sprintf("certificates: [{ files: { cert: %q, key: %q } }], ", file, key), pool
}

// TestHopIsNoClient: strangers come to home through an edge that leaves the PROXY header out and belongs to a
// user. That user may come in at the laptop, the strangers may not, by whatever way home tells the laptop
// whom it saw.
func TestHopIsNoClient(t *testing.T) {
	startTailscaled(t)
	app := headers(t)
	for _, p := range protocols {
		for _, next := range []string{"", ", send_proxy: v2"} {
			for _, homeKnows := range []string{"home", "edge"} { // whom home believes

				t.Run(p.name+next+", home knows "+homeKnows, func(t *testing.T) {
					laptopAddr := freeAddr(t)
					laptop := start(t, fmt.Sprintf(`
node: laptop
listeners: [{ name: web, listen: %q, mode: http, accept_proxy: { from: [127.0.0.1, edge] }, routes: [
  { host: app.test, path: /open, forward: %[2]q },
  { host: app.test, path: /tag, forward: %[2]q, allow: ["tag:home", home, edge, 100.64.0.3, "fd7a:115c:a1e0::3"] },
  { host: app.test, forward: %[2]q, allow: ["me@vsq.cz"] }] }]`, laptopAddr, app))
					certs, pool := p.certificateYAML(t)
					home := start(t, fmt.Sprintf(`
node: home
listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [%s] }, default: { forward: %q%s } }]`, freeAddr(t), p.mode(), certs, homeKnows, laptopAddr, next))
					for _, c := range []struct {
						name, from, path string
						status           int
						user             string
					}{
						{"the user", "100.64.0.5:1", "/", 200, "me@vsq.cz"},
						{"the user", "[fd7a:115c:a1e0::5]:1", "/", 200, "me@vsq.cz"},
						{"somebody else", "100.64.0.6:1", "/", 403, ""},
						{"somebody through the user's edge", "100.64.0.3:1", "/", 403, ""},
						{"somebody through the user's edge", "[fd7a:115c:a1e0::3]:1", "/", 403, ""},
						{"the edge by its name or address", "100.64.0.3:1", "/tag", 403, ""},
						{"the edge by its name or address", "[fd7a:115c:a1e0::3]:1", "/tag", 403, ""},
						{"somebody where all may", "100.64.0.3:1", "/open", 200, ""},
						{"somebody where all may", "[fd7a:115c:a1e0::3]:1", "/open", 200, ""},
					} {
						client := p.client(t, pool, func() net.Conn { return home.come(t, "web", c.from) })
						res, got, body := p.get(t, client, c.path)
						if res.StatusCode != c.status || got.Get("Tailscale-User-Login") != c.user {
							t.Errorf("%s, from %s for %s: %d %s", c.name, c.from, c.path, res.StatusCode, body)
						}
						if xff := got.Get("X-Forwarded-For"); c.path == "/open" && !strings.HasSuffix(xff, "unknown") {
							t.Errorf("%s, from %s: the target hears of the client %q", c.name, c.from, xff)
						}
						if homeKnows == "edge" && strings.Contains(body, "100.64.0.3") {
							t.Errorf("home tells on the address of a hop: %s", body)
						}
					}
					if n := laptop.refused(notAllowed); n != 5 {
						t.Errorf("%d refusals are counted", n)
					}
					if !strings.Contains(laptop.log.String(), "forwards for a client and does not say for whom") {
						t.Error("the log does not say why")
					}
				})
			}
		}
	}
}

// TestWhoIsClient goes through what a hop may say, and not say, of a client.
func TestWhoIsClient(t *testing.T) {
	startTailscaled(t)
	app := headers(t)
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			certs, pool := p.certificateYAML(t)
			d := start(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [home, edge, 192.0.2.0/24, "fe80::/10"] }, routes: [
  { host: app.test, path: /open, forward: %[4]q },
  { host: app.test, forward: %[4]q, allow: ["me@vsq.cz", edge, "tag:home", "192.0.2.0/24", "fe80::/10", 198.51.100.7] }] }]`, freeAddr(t), p.mode(), certs, app))
			local := string(proxyheader.Header{Local: true}.Append(nil))
			unspec := "\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x00"
			for _, c := range []struct {
				name, peer, preface, xff string
				ok                       bool
				told                     string // in X-Forwarded-For, at its end
			}{
				{"a user", "100.64.0.5:1", "", "", true, "100.64.0.5"},
				{"a user, forging", "100.64.0.5:1", "", "100.64.0.6", true, "100.64.0.5"},
				{"a hop that says nothing", "100.64.0.3:1", "", "", false, "unknown"},
				{"a hop that says nothing, IPv6", "[fd7a:115c:a1e0::3]:1", "", "", false, "unknown"},
				{"a hop with a tag that says nothing", "100.64.0.4:1", "", "", false, "unknown"},
				{"a hop by its network that says nothing", "192.0.2.9:1", "", "", false, "unknown"},
				{"a hop on the same link that says nothing", "[fe80::1%lo]:1", "", "", false, "unknown"},
				{"a hop that speaks for itself", "100.64.0.3:1", local, "", false, "unknown"},
				{"a hop by PROXY UNKNOWN", "100.64.0.3:1", "PROXY UNKNOWN\r\n", "", false, "unknown"},
				{"a hop by PROXY without addresses", "100.64.0.3:1", unspec, "", false, "unknown"},
				{"a hop of a hop by PROXY", "100.64.0.4:1", string(from("100.64.0.3:1")), "", false, "unknown"},
				{"a hop of a hop by PROXY, IPv6", "100.64.0.4:1", string(from("[fd7a:115c:a1e0::3]:1")), "", false, "unknown"},
				{"a hop of itself by PROXY", "100.64.0.3:1", string(from("100.64.0.3:1")), "", false, "unknown"},
				{"a user by PROXY", "100.64.0.3:1", string(from("100.64.0.5:1")), "", true, "100.64.0.5"},
				{"a user by PROXY, forging", "100.64.0.3:1", string(from("100.64.0.5:1")), "100.64.0.6", true, "100.64.0.5"},
				{"a stranger by PROXY, forging", "100.64.0.3:1", string(from("203.0.113.9:1")), "100.64.0.5", false, "203.0.113.9"},
				{"a stranger of PROXY UNKNOWN, forging", "100.64.0.3:1", "PROXY UNKNOWN\r\n", "100.64.0.5", false, "unknown"},
			} {
				d.check(t, p, pool, c.name, c.peer, c.preface, c.xff, c.ok, c.told)
			}
			if p.tls {
				return // what is in TLS is no hop's word
			}
			hops := "100.64.0.3, fd7a:115c:a1e0::4, 100.64.0.4"
			for _, c := range []struct {
				name, peer, preface, xff string
				ok                       bool
				told                     string
			}{
				{"a user by a header", "100.64.0.4:1", "", "100.64.0.5", true, "100.64.0.4"},
				{"a user through hops", "100.64.0.4:1", "", "100.64.0.5, " + hops, true, "100.64.0.4"},
				{"a network of clients", "100.64.0.4:1", "", "198.51.100.7", true, "100.64.0.4"},
				{"a hop of a hop", "100.64.0.4:1", "", "100.64.0.3", false, "unknown"},
				{"a hop of a hop, IPv6", "100.64.0.4:1", "", "fd7a:115c:a1e0::3", false, "unknown"},
				{"a hop of a hop, mapped", "100.64.0.4:1", "", "::ffff:100.64.0.3", false, "unknown"},
				{"a hop of a hop, by its network", "100.64.0.4:1", "", "192.0.2.7", false, "unknown"},
				{"a hop of a hop, with a zone", "100.64.0.4:1", "", "fe80::7%eth0", false, "unknown"},
				{"nothing but hops", "100.64.0.4:1", "", hops, false, "unknown"},
				{"too many hops", "100.64.0.4:1", "", "100.64.0.5" + strings.Repeat(", 100.64.0.3", 20), false, "unknown"},
				{"a hop that speaks for itself, and a user", "100.64.0.4:1", local, "100.64.0.5", true, "100.64.0.4"},
				{"who can't say", "100.64.0.4:1", "", "unknown", false, "unknown"},
				{"who can't say, before a hop", "100.64.0.4:1", "", "100.64.0.5, unknown, 100.64.0.3", false, "unknown"},
			} {
				d.check(t, p, pool, c.name, c.peer, c.preface, c.xff, c.ok, c.told)
			}
		})
	}
}

// check asks d for what only some may have, and for what all may, which tells what the target hears.
func (d *daemon) check(t *testing.T, p protocol, pool *x509.CertPool, name, peer, preface, xff string, ok bool, told string) {
	t.Helper()
	client := p.client(t, pool, func() net.Conn {
		c := d.come(t, "web", peer)
		io.WriteString(c, preface)
		return c
	})
	var lines []string
	if xff != "" {
		lines = []string{"X-Forwarded-For: " + xff, "Tailscale-User-Login: me@vsq.cz"}
	}
	status := 403
	if ok {
		status = 200
	}
	if res, _, body := p.get(t, client, "/", lines...); res.StatusCode != status {
		t.Errorf("%s: %d, want %d: %s", name, res.StatusCode, status, body)
	}
	res, got, body := p.get(t, client, "/open", lines...)
	heard := strings.Split(got.Get("X-Forwarded-For"), ", ")
	if res.StatusCode != 200 || heard[len(heard)-1] != told {
		t.Errorf("%s: the target hears of the client %q, want %q: %d %s", name, heard, told, res.StatusCode, body)
	}
	if who := got.Get("Tailscale-User-Login"); who != "" && !ok {
		t.Errorf("%s: the target hears of the user %q", name, who)
	}
}

// TestHopIsNoClientSplice: the same where bytes are passed on untouched.
func TestHopIsNoClientSplice(t *testing.T) {
	startTailscaled(t)
	heard := make(chan *proxyheader.Header, 1)
	target := backend(t, func(c net.Conn) {
		defer c.Close()
		h, _, err := proxyheader.Read(c, nil, 4096, time.Minute)
		if err != nil {
			t.Error(err)
		}
		heard <- h
	})
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: sni, listen: %q, mode: sni, accept_proxy: { from: [home, edge] }, default: { forward: %[3]q, send_proxy: v2 }, routes: [{ sni: app.test, forward: %[3]q, send_proxy: v2, allow: ["me@vsq.cz", edge] }] }
  - { name: tcp, listen: %[2]q, mode: tcp, accept_proxy: { from: [home, edge] }, default: { forward: %[3]q, send_proxy: v2 } }
  - { name: tcp-allow, listen: %[4]q, mode: tcp, accept_proxy: { from: [home, edge] }, default: { forward: %[3]q, send_proxy: v2, allow: ["me@vsq.cz", edge] } }
`, freeAddr(t), freeAddr(t), target, freeAddr(t)))
	app, other := clientHello(t, "app.test"), clientHello(t, "other.test")
	for _, c := range []struct {
		name, listener string
		preface        []byte
		hello          []byte
		want           string // what the target hears; "refused"
	}{
		{"a user", "sni", from("100.64.0.5:1"), app, "100.64.0.5:1"},
		{"a hop that says nothing", "sni", nil, app, "refused"},
		{"a hop that says nothing, where all may", "sni", nil, other, "invalid AddrPort"},
		{"a hop of a hop", "sni", from("100.64.0.4:1"), app, "refused"},
		{"a hop of a hop, IPv6", "sni", from("[fd7a:115c:a1e0::3]:1"), app, "refused"},
		{"a hop of a hop, where all may", "sni", from("[fd7a:115c:a1e0::3]:1"), other, "invalid AddrPort"},
		{"a user", "tcp-allow", from("[fd7a:115c:a1e0::5]:1"), nil, "[fd7a:115c:a1e0::5]:1"},
		{"a hop of a hop", "tcp-allow", from("100.64.0.3:1"), nil, "refused"},
		{"a hop of a hop, where all may", "tcp", from("100.64.0.3:1"), nil, "invalid AddrPort"},
	} {
		before := d.refused(notAllowed)
		conn := d.come(t, c.listener, "100.64.0.3:9")
		conn.Write(slices.Concat(c.preface, c.hello))
		if c.want == "refused" {
			io.Copy(io.Discard, conn)
			if n := d.refused(notAllowed) - before; n != 1 {
				t.Errorf("%s at %s: %d refusals are counted", c.name, c.listener, n)
			}
			continue
		}
		select {
		case h := <-heard:
			if got := h.Source.String(); got != c.want || h.Local {
				t.Errorf("%s at %s: the target hears of %s, want %s", c.name, c.listener, got, c.want)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s at %s: nothing reaches the target", c.name, c.listener)
		}
		conn.Close()
	}
}

// mayIn is a listener where tailscaled must be asked who the client is, and one where it must be asked only
// whether somebody is a hop: the network of all of the tailnet may come in.
func mayIn(t *testing.T, p protocol, app string) (*daemon, *x509.CertPool) {
	certs, pool := p.certificateYAML(t)
	return start(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [127.0.0.1, home, edge] }, routes: [
  { host: app.test, path: /open, forward: %[4]q },
  { host: app.test, path: /net, forward: %[4]q, allow: [100.64.0.0/10, "fd7a:115c:a1e0::/48"] },
  { host: app.test, forward: %[4]q, allow: ["me@vsq.cz"] }] }]`, freeAddr(t), p.mode(), certs, app)), pool
}

// TestTailscaledSlow: who is a hop is found out before anybody is let in, however long that takes.
func TestTailscaledSlow(t *testing.T) {
	app := headers(t)
	for _, p := range protocols {
		for _, follow := range []bool{true, false} { // or it is asked anew each time
			if follow && p.h2 {
				continue
			}
			ts := startTailscaled(t)
			ts.noBus, ts.slow = !follow, 1200*time.Millisecond
			d, pool := mayIn(t, p, app)
			t.Run(fmt.Sprint(p.name, ", followed ", follow), func(t *testing.T) {
				if !follow { // else it must come before all is known
					t.Parallel()
				}
				for path, edge := range map[string]string{"/": "100.64.0.3", "/net": "fd7a:115c:a1e0::3"} {
					var lines []string
					client := p.client(t, pool, func() net.Conn {
						c := d.come(t, "web", "127.0.0.1:9")
						if p.tls {
							c.Write(from(net.JoinHostPort(edge, "1")))
						}
						return c
					})
					if !p.tls {
						lines = []string{"X-Forwarded-For: " + edge}
					}
					res, _, body := p.get(t, client, path, lines...)
					if res.StatusCode != 403 && res.StatusCode != 503 { // the latter where this machine is slower still
						t.Errorf("a hop of a hop, %s: %d %s", path, res.StatusCode, body)
					}
				}
				ts.change(func() { ts.slow = 0 })
				client := p.client(t, pool, func() net.Conn { return d.come(t, "web", "100.64.0.5:1") })
				if res, got, body := p.get(t, client, "/"); res.StatusCode != 200 || got.Get("Tailscale-User-Login") != "me@vsq.cz" {
					t.Errorf("the user: %d %s", res.StatusCode, body)
				}
			})
		}
	}
}

// TestTailscaledGone: while tailscaled is away, hangs, or is starting, nobody of the tailnet is taken for a
// client, and nobody for a hop; the page and the log say why. Once it answers all is well.
func TestTailscaledGone(t *testing.T) {
	app := headers(t)
	for _, p := range protocols {
		for _, how := range []string{"gone", "hanging", "starting"} {
			if how == "hanging" && p.name != "h2 TLS" || how == "starting" && p.name != "h1" {
				continue // each takes seconds
			}
			ts := startTailscaled(t)
			switch how {
			case "gone":
				ts.stop()
			case "hanging":
				ts.deaf = true
			case "starting":
				ts.state = "Starting"
			}
			d, pool := mayIn(t, p, app)
			t.Run(p.name+" "+how, func(t *testing.T) {
				t.Parallel() // it mostly waits
				cases := []struct {
					name, peer, xff string
					proxy           bool
					path            string
					status          int
				}{
					{"a user", "100.64.0.5:1", "", false, "/", 503},
					{"a hop, or not", "100.64.0.3:1", "", false, "/net", 503},
					{"a hop, or not, IPv6", "[fd7a:115c:a1e0::3]:1", "100.64.0.5", false, "/net", 503},
					{"a hop, or not, where all may", "100.64.0.3:1", "100.64.0.5", false, "/open", 200},
					{"a hop of a hop, or not", "127.0.0.1:1", "100.64.0.3", true, "/net", 503},
					{"a hop of a hop, or not, where all may", "127.0.0.1:1", "100.64.0.3", true, "/open", 200},
				}
				if how != "gone" {
					cases = cases[1:2]
				}
				for _, c := range cases {
					before := d.refused(notIdentified)
					var lines []string
					client := p.client(t, pool, func() net.Conn {
						conn := d.come(t, "web", c.peer)
						if c.proxy && p.tls {
							conn.Write(from(net.JoinHostPort(c.xff, "1")))
						}
						return conn
					})
					if c.xff != "" && !(c.proxy && p.tls) {
						lines = []string{"X-Forwarded-For: " + c.xff}
					}
					res, got, body := p.get(t, client, c.path, append(lines, "Accept: application/json", "Tailscale-User-Login: me@vsq.cz")...)
					if res.StatusCode != c.status || strings.Contains(body, "me@vsq.cz") {
						t.Errorf("%s: %d, want %d: %s", c.name, res.StatusCode, c.status, body)
					}
					if c.status == 503 {
						if res.Header.Get("Retry-After") == "" || !strings.Contains(body, "could not find out who you are") || d.refused(notIdentified) != before+1 {
							t.Errorf("%s: %v %s, %d refusals are counted", c.name, res.Header, body, d.refused(notIdentified)-before)
						}
						continue
					}
					heard := strings.Split(got.Get("X-Forwarded-For"), ", ")
					if heard[len(heard)-1] != "unknown" || strings.Contains(body, "100.64.0.5") {
						t.Errorf("%s: the target gets %s", c.name, body)
					}
				}
				log := d.log.String()
				if !strings.Contains(log, "tailscaled did not answer who 100.64.0.") || strings.Contains(log, "allow does not name") || d.refused(notAllowed) != 0 {
					t.Error("the log does not say why, or names somebody")
				}
				switch how {
				case "gone":
					ts.start()
				case "hanging":
					ts.change(func() { ts.deaf = false })
				case "starting":
					ts.change(func() { ts.state = "Running" })
				}
				eventually(t, "the user comes in", func() bool {
					client := p.client(t, pool, func() net.Conn { return d.come(t, "web", "100.64.0.5:1") })
					res, _, _ := p.get(t, client, "/")
					return res.StatusCode == 200
				})
				client := p.client(t, pool, func() net.Conn { return d.come(t, "web", "100.64.0.3:1") })
				if res, _, body := p.get(t, client, "/net"); res.StatusCode != 403 {
					t.Errorf("the hop: %d %s", res.StatusCode, body)
				}
			})
		}
	}
}

// TestTailscaledGoneSplice: the same for connections, and for PROXY headers.
func TestTailscaledGoneSplice(t *testing.T) {
	ts := startTailscaled(t)
	ts.stop()
	target := backend(t, echo)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: web, listen: %q, mode: http, accept_proxy: { from: [edge] }, default: { forward: %[4]q } }
  - { name: sni, listen: %[2]q, mode: sni, accept_proxy: { from: [edge] }, routes: [{ sni: app.test, forward: %[4]q, allow: [100.64.0.0/10] }] }
  - { name: tcp, listen: %[3]q, mode: tcp, accept_proxy: { from: [edge] }, default: { forward: %[4]q } }
`, freeAddr(t), freeAddr(t), freeAddr(t), target))
	hello := clientHello(t, "app.test")
	for i, c := range []struct {
		name, listener string
		sent           []byte
	}{
		{"a PROXY header", "web", append(from("203.0.113.9:1"), "GET / HTTP/1.0\r\n\r\n"...)},
		{"a PROXY header", "sni", append(from("100.64.0.5:1"), hello...)},
		{"a hop, or not", "sni", hello},
		{"a hop, or not", "tcp", []byte("hello")},
	} {
		conn := d.come(t, c.listener, "100.64.0.3:1")
		conn.Write(c.sent)
		if got, _ := io.ReadAll(conn); len(got) > 0 && got[0] != 21 {
			t.Errorf("%s at %s is answered by %q", c.name, c.listener, got)
		}
		eventually(t, "counted", func() bool { return d.refused(notIdentified) == int64(i+1) })
	}
	if log := d.log.String(); !strings.Contains(log, "tailscaled did not answer who 100.64.0.3 is: no tailscaled") || d.refused(proxyFromStranger) != 0 {
		t.Error("the log does not say why")
	}
}

// TestProxyRequired: with accept_proxy.required nobody gets in without a PROXY header, and what a stranger
// writes about himself through a hop that passes on the bytes alone is not believed.
func TestProxyRequired(t *testing.T) {
	startTailscaled(t)
	app := headers(t)
	for _, p := range protocols {
		certs, pool := p.certificateYAML(t)
		d := start(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [edge], required: true }, routes: [{ host: app.test, forward: %q, allow: ["me@vsq.cz"] }] }]`, freeAddr(t), p.mode(), certs, app))
		for _, c := range []struct {
			peer, preface, xff string
			status             int // 0: closed
			reason             string
		}{
			{"100.64.0.3:1", "", "100.64.0.5", 0, "proxy_missing"},
			{"[fd7a:115c:a1e0::3]:1", "", "100.64.0.5", 0, "proxy_missing"},
			{"100.64.0.5:1", "", "", 0, proxyFromStranger},
			{"100.64.0.3:1", string(from("100.64.0.5:1")), "", 200, ""},
			{"100.64.0.3:1", string(from("203.0.113.9:1")), "100.64.0.5", 403, notAllowed},
		} {
			before := d.refused(c.reason)
			client := p.client(t, pool, func() net.Conn {
				conn := d.come(t, "web", c.peer)
				io.WriteString(conn, c.preface)
				return conn
			})
			scheme := "http"
			if p.tls {
				scheme = "https"
			}
			req, err := http.NewRequest("POST", scheme+"://app.test/", nil) // which is not tried again
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Forwarded-For", c.xff)
			status := 0
			if res, err := client.Do(req); err == nil {
				status = res.StatusCode
				res.Body.Close()
			}
			if status != c.status || c.reason != "" && d.refused(c.reason) == before {
				t.Errorf("%s, %q by %s: %d, want %d, refused: %v", p.name, c.preface, c.peer, status, c.status, d.Status().Refused)
			}
		}
	}
}

// TestProxyRequiredSplice: the same where bytes are passed on. On a tcp listener it is always so.
func TestProxyRequiredSplice(t *testing.T) {
	startTailscaled(t)
	app := backend(t, echo)
	d := start(t, fmt.Sprintf(`
listeners:
  - { name: sni, listen: %q, mode: sni, accept_proxy: { from: [edge], required: true }, routes: [{ sni: app.test, forward: %[4]q, allow: ["me@vsq.cz"] }] }
  - { name: tcp, listen: %[2]q, mode: tcp, accept_proxy: { from: [edge], required: true }, default: { forward: %[4]q, allow: ["me@vsq.cz"] } }
  - { name: always, listen: %[3]q, mode: tcp, accept_proxy: { from: [edge] }, default: { forward: %[4]q, allow: ["me@vsq.cz"] } }`, freeAddr(t), freeAddr(t), freeAddr(t), app))
	hello := clientHello(t, "app.test")
	for _, listener := range []string{"sni", "tcp", "always"} {
		for _, c := range []struct {
			peer    string
			preface []byte
			reason  string // "": it comes in
		}{
			{"100.64.0.3:1", nil, "proxy_missing"},
			{"[fd7a:115c:a1e0::3]:1", nil, "proxy_missing"},
			{"100.64.0.5:1", nil, proxyFromStranger},
			{"100.64.0.5:1", from("100.64.0.5:1"), proxyFromStranger},
			{"203.0.113.9:1", from("100.64.0.5:1"), proxyFromStranger},
			{"100.64.0.3:1", from("203.0.113.9:1"), notAllowed},
			{"100.64.0.3:1", slices.Concat(from("203.0.113.9:1"), from("100.64.0.5:1")), "not_tls"}, // the second is data
			{"100.64.0.3:1", from("100.64.0.5:1"), ""},
		} {
			reason := c.reason
			if reason == "not_tls" && listener != "sni" {
				reason = notAllowed
			}
			before := d.refused(reason)
			conn := d.come(t, listener, c.peer)
			conn.Write(slices.Concat(c.preface, hello))
			if reason != "" {
				if got, _ := io.ReadAll(conn); len(got) > 0 && got[0] != 21 { // an alert
					t.Errorf("%s, %q by %s: answered by %q", listener, c.preface, c.peer, got)
				}
				eventually(t, "counted as "+reason, func() bool { return d.refused(reason) == before+1 })
				continue
			}
			if _, err := io.ReadFull(conn, make([]byte, len(hello))); err != nil {
				t.Errorf("%s, %q by %s: %v", listener, c.preface, c.peer, err)
			}
			conn.Close()
		}
	}
}

// TestProxyRequiredLater: on a connection that is kept, no request is answered once accept_proxy.required
// wants a PROXY header which it did not begin with.
func TestProxyRequiredLater(t *testing.T) {
	app := headers(t)
	for _, p := range protocols {
		certs, pool := p.certificateYAML(t)
		addr := freeAddr(t)
		config := func(more string) string {
			return fmt.Sprintf(`listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [192.0.2.1]%s }, default: { forward: %q } }]`, addr, p.mode(), certs, more, app)
		}
		d := start(t, config(""))
		kept := func(peer, preface string) func() *http.Response {
			client := p.client(t, pool, func() net.Conn {
				conn := d.come(t, "web", peer)
				io.WriteString(conn, preface)
				return conn
			})
			return func() *http.Response {
				res, _, _ := p.get(t, client, "/", "X-Forwarded-For: 203.0.113.7")
				return res
			}
		}
		hop, stranger, said := kept("192.0.2.1:1", ""), kept("198.51.100.1:1", ""), kept("192.0.2.1:1", string(from("203.0.113.7:1")))
		check := func(when string, without int) {
			t.Helper()
			for name, ask := range map[string]func() *http.Response{"of the hop": hop, "of a stranger": stranger} {
				if res := ask(); res.StatusCode != without {
					t.Errorf("%s, %s, %s: %s, want %d", p.name, when, name, res.Status, without)
				}
			}
			if res := said(); res.StatusCode != 200 {
				t.Errorf("%s, %s: with a PROXY header: %s", p.name, when, res.Status)
			}
		}
		// Over TLS the hop has not said for whom it speaks, and comes in where there is no allow.
		check("before", 200)
		if err := d.Reload(parse(t, config(", required: true"))); err != nil {
			t.Fatal(err)
		}
		check("after", 403)
		if n := d.refused(proxyMissing); n != 2 {
			t.Errorf("%s: %d refusals are counted as %s", p.name, n, proxyMissing)
		}
	}
}

// TestPathNames: the target hears the names of the hops that are known, and no name of anybody else.
func TestPathNames(t *testing.T) {
	startTailscaled(t)
	d := start(t, fmt.Sprintf(`
node: laptop
listeners: [{ name: web, listen: %q, mode: http, accept_proxy: { from: ["tag:home", 127.0.0.1] }, default: { forward: %q } }]`,
		freeAddr(t), headers(t)))
	for _, c := range []struct{ name, peer, preface, header, want string }{
		{"a hop that passes on a client's bytes", "100.64.0.4:1", string(from("203.0.113.7:1")), "edge-a, forged", "home, laptop"},
		{"a hop that sends requests", "100.64.0.4:1", "", "edge-a, house", "edge-a, house, laptop"},
		{"a hop that names none", "100.64.0.4:1", "", "", "home, laptop"},
		{"a hop without a name", "127.0.0.1:1", string(from("203.0.113.7:1")), "", "laptop"},
		{"a client", "100.64.0.5:1", "", "forged", "laptop"},
	} {
		client := protocols[0].client(t, nil, func() net.Conn {
			conn := d.come(t, "web", c.peer)
			io.WriteString(conn, c.preface)
			return conn
		})
		_, got, body := protocols[0].get(t, client, "/", "X-Tailsplice-Path: "+c.header)
		if path := got.Get("X-Tailsplice-Path"); path != c.want {
			t.Errorf("%s: %q, want %q: %s", c.name, path, c.want, body)
		}
	}
}

// TestAskedOnce: for one request tailscaled is asked once about each address, also while nobody follows it.
func TestAskedOnce(t *testing.T) {
	ts := startTailscaled(t)
	ts.noBus = true
	d, _ := mayIn(t, protocols[0], headers(t))
	client := protocols[0].client(t, nil, func() net.Conn { return d.come(t, "web", "127.0.0.1:1") })
	for i := range 3 {
		res, got, body := protocols[0].get(t, client, "/", "X-Forwarded-For: 100.64.0.5, fd7a:115c:a1e0::3, 100.64.0.4")
		if res.StatusCode != 200 || got.Get("Tailscale-User-Login") != "me@vsq.cz" {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
		for _, addr := range []string{"100.64.0.5", "fd7a:115c:a1e0::3", "100.64.0.4"} {
			if n := ts.times(addr); n != i+1 {
				t.Errorf("%s: asked %d times for %d requests", addr, n, i+1)
			}
		}
	}
}

// TestTrustPerRequest: on a connection that is kept, a peer is believed as long as accept_proxy names it, and
// tailscaled says that it is who it was.
func TestTrustPerRequest(t *testing.T) {
	app := headers(t)
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			ts := startTailscaled(t)
			certs, pool := p.certificateYAML(t)
			addr := freeAddr(t)
			config := func(from string) string {
				return fmt.Sprintf(`listeners: [{ name: web, listen: %q, mode: %s, %saccept_proxy: { from: [%s] }, allow: [203.0.113.7, "2001:db8::7"], default: { forward: %q } }]`, addr, p.mode(), certs, from, app)
			}
			d := start(t, config(`192.0.2.1, "tag:home"`))
			// kept is a connection from peer with a client by which it speaks for somebody. In TLS that is said before.
			kept := func(peer, client string) func() *http.Response {
				var dialled int
				c := p.client(t, pool, func() net.Conn {
					dialled++
					conn := d.come(t, "web", peer)
					if p.tls {
						conn.Write(from(client))
					}
					return conn
				})
				host, _, _ := net.SplitHostPort(client)
				return func() *http.Response {
					var lines []string
					if !p.tls {
						lines = []string{"X-Forwarded-For: " + host}
					}
					res, _, _ := p.get(t, c, "/", lines...)
					if dialled != 1 {
						t.Fatalf("%d connections", dialled)
					}
					return res
				}
			}
			network, tag, tag6 := kept("192.0.2.1:1", "203.0.113.7:1"), kept("100.64.0.4:1", "203.0.113.7:1"), kept("[fd7a:115c:a1e0::4]:1", "[2001:db8::7]:1")
			for name, ask := range map[string]func() *http.Response{"network": network, "tag": tag, "tag, IPv6": tag6} {
				if res := ask(); res.StatusCode != 200 {
					t.Errorf("%s: %s", name, res.Status)
				}
			}
			if err := d.Reload(parse(t, config(`"tag:home"`))); err != nil {
				t.Fatal(err)
			}
			if res := network(); res.StatusCode != 403 || p.tls && !p.h2 && !res.Close {
				t.Errorf("removed from accept_proxy: %s, closed: %v", res.Status, res.Close)
			}
			if res := tag(); res.StatusCode != 200 {
				t.Errorf("still named: %s", res.Status)
			}
			want := notAllowed
			if p.tls {
				want = proxyFromStranger
			}
			if n := d.refused(want); n != 1 {
				t.Errorf("%d refusals are counted as %s", n, want)
			}
			ts.change(func() { ts.nodes["home"] = node{"friend@vsq.cz", nil, tailnetNodes["home"].addrs} })
			eventually(t, "the loss of its tag is heard of", func() bool {
				for _, addr := range tailnetNodes["home"].addrs {
					if id, err := d.tailnet.WhoIs(t.Context(), netip.MustParseAddr(addr)); err != nil || len(id.Tags) > 0 {
						return false
					}
				}
				return true
			})
			for name, ask := range map[string]func() *http.Response{"tag": tag, "tag, IPv6": tag6} {
				if res := ask(); res.StatusCode != 403 {
					t.Errorf("%s is lost: %s", name, res.Status)
				}
			}
		})
	}
}

// TestPeersZone: the address of a link-local client says by which interface it came, and is in the prefixes that it is in without.
func TestPeersZone(t *testing.T) {
	for _, c := range []struct {
		list, client string
		want         bool
	}{
		{"::/0", "fe80::1%eth0", true},
		{"fe80::/10", "fe80::1%2", true},
		{"fe80::1", "fe80::1%eth0", true},
		{"fe80::2", "fe80::1%eth0", false},
		{"fd00::/8", "fe80::1%eth0", false},
		{"0.0.0.0/0", "fe80::1%eth0", false},
	} {
		if ok, err := plan.NewPeers([]string{c.list}).Contains(netip.MustParseAddr(c.client), nil); ok != c.want || err != nil {
			t.Errorf("%s in %s: %v (%v), want %v", c.client, c.list, ok, err, c.want)
		}
	}
}

// TestTailnetNetworks: an address of the tailnet's ranges that no node has is a stranger's, such as the
// neighbour's at a provider that gives 100.64.0.0/10 to its customers.
func TestTailnetNetworks(t *testing.T) {
	startTailscaled(t)
	app := headers(t)
	d := start(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: http, accept_proxy: { from: [100.64.0.0/24, "fd7a:115c:a1e0::/64"] }, routes: [
  { host: app.test, path: /net, forward: %[2]q, allow: [100.64.0.0/10, "fd7a:115c:a1e0::/48"] },
  { host: app.test, path: /one, forward: %[2]q, allow: [100.64.1.99, "fd7a:115c:a1e0:9::99"] },
  { host: app.test, forward: %[2]q, allow: [0.0.0.0/0, "::/0"] }] }]`, freeAddr(t), app))
	for _, c := range []struct {
		peer, preface string
		status        map[string]int // 0: closed
	}{
		{"100.64.0.3:1", string(from("100.64.0.5:1")), map[string]int{"/net": 403, "/": 403}}, // all of that network are hops
		{"100.64.0.3:1", string(from("203.0.113.9:1")), map[string]int{"/net": 403, "/": 200}},
		{"[fd7a:115c:a1e0::3]:1", string(from("203.0.113.9:1")), map[string]int{"/net": 403, "/": 200}},
		{"100.64.0.99:1", "", map[string]int{"/net": 403, "/": 200}},
		{"100.64.0.99:1", string(from("203.0.113.9:1")), map[string]int{"/": 0}},
		{"100.64.1.99:1", "", map[string]int{"/net": 403, "/one": 403, "/": 200}},
		{"[fd7a:115c:a1e0:9::99]:1", "", map[string]int{"/net": 403, "/one": 403, "/": 200}},
		{"[fd7a:115c:a1e0::99]:1", string(from("203.0.113.9:1")), map[string]int{"/": 0}},
	} {
		for path, want := range c.status {
			conn := d.come(t, "web", c.peer)
			fmt.Fprintf(conn, "%sGET %s HTTP/1.0\r\nHost: app.test\r\n\r\n", c.preface, path)
			status := 0
			if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				status = res.StatusCode
			}
			if status != want {
				t.Errorf("%s, %q asks for %s: %d, want %d", c.peer, c.preface, path, status, want)
			}
		}
	}
}
