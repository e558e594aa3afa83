package vhost

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// spoken is an upstream that reads one line (as a PROXY header) from each
// connection, and answers each request with that line and the connection's
// number.
func spoken(t testing.TB, speaks Speaker) (up *Upstream, open *atomic.Int64) {
	open = new(atomic.Int64)
	var number atomic.Int64
	raw := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		open.Add(1)
		defer open.Add(-1)
		n := number.Add(1)
		who, err := br.ReadString('\n')
		for err == nil {
			var r *http.Request
			if r, err = http.ReadRequest(br); err == nil {
				io.Copy(io.Discard, r.Body)
				body := fmt.Sprintf("%d %s", n, strings.TrimSpace(who))
				_, err = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
		}
	})
	dial := raw.Dial
	raw.Speaks = speaks
	raw.Dial = func(ctx context.Context) (net.Conn, error) {
		info, ok := Info(ctx)
		if !ok {
			t.Error("no Info for Dial")
		}
		c, err := dial(ctx)
		if err == nil {
			fmt.Fprintf(c, "%s\n", info.Client)
		}
		return c, err
	}
	return raw, open
}

// TestOwnConnections checks that an upstream connection which speaks for one
// downstream connection is used again for that, and never for another one.
func TestOwnConnections(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		up, _ := spoken(t, ForPath)
		var n atomic.Int64
		h := p.hop(t, up, func(c *config) {
			c.info = func(i ConnInfo) ConnInfo {
				i.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n.Add(1))}), 1000)
				return i
			}
		})
		seen := map[string]string{} // upstream connection → client
		for range 3 {
			c := p.client(t, h)
			first := ""
			for range 4 {
				_, body := get(t, c, p.url("/"))
				conn, client, _ := strings.Cut(body, " ")
				if was := seen[conn]; was != "" && was != client {
					t.Errorf("connection %s serves %s and %s", conn, was, client)
				}
				seen[conn] = client
				if first != "" && body != first {
					t.Errorf("one client, two connections one after the other: %q, %q", first, body)
				}
				first = body
			}
			c.CloseIdleConnections()
		}
		if len(seen) != 3 {
			t.Errorf("%d upstream connections for 3 clients", len(seen))
		}
	})
}

// TestOwnConnectionsAtOnce checks the same while clients come and go at once,
// and that soon nothing of them is left.
func TestOwnConnectionsAtOnce(t *testing.T) {
	p := protocols[3]
	up, open := spoken(t, ForPath)
	var n atomic.Int64
	h := p.hop(t, up, func(c *config) {
		c.info = func(i ConnInfo) ConnInfo {
			i.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n.Add(1))}), 1000)
			return i
		}
	})
	var seen sync.Map
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			c := p.client(t, h)
			defer c.CloseIdleConnections()
			var mine sync.WaitGroup
			for range 10 {
				mine.Go(func() {
					_, body := get(t, c, p.url("/"))
					conn, client, _ := strings.Cut(body, " ")
					if was, loaded := seen.LoadOrStore(conn, client); loaded && was != client {
						t.Errorf("connection %s serves %s and %s", conn, was, client)
					}
				})
			}
			mine.Wait()
		})
	}
	wg.Wait()
	eventually(t, "all upstream connections are closed", func() bool { return open.Load() == 0 })
}

// TestSpeakers checks for whom upstream connections speak where a hop that is
// believed carries the requests of many clients on one connection: what the
// request says counts, not the hop's own address.
func TestSpeakers(t *testing.T) {
	for _, c := range []struct {
		name     string
		speaks   Speaker
		requests [][2]string // X-Forwarded-For and the path's id
		want     []string
	}{
		{"the client", ForClient, [][2]string{
			{"192.0.2.1", "id-of-path-1"}, {"192.0.2.2", "id-of-path-2"}, {"192.0.2.1", "id-of-path-3"}, {"6.6.6.6, 2001:db8::2", "id-of-path-4"}, {"", "id-of-path-5"}, {"nonsense", "id-of-path-6"}},
			[]string{"1 192.0.2.1:0", "2 192.0.2.2:0", "1 192.0.2.1:0", "3 [2001:db8::2]:0", "4 hop", "5 hop"}}, // the last is of nobody that is known
		{"the path", ForPath, [][2]string{
			{"192.0.2.1", "id-of-path-1"}, {"192.0.2.1", "id-of-path-2"}, {"192.0.2.1", "id-of-path-1"}, {"192.0.2.2", "id-of-path-1"}},
			[]string{"1 192.0.2.1:0", "2 192.0.2.1:0", "1 192.0.2.1:0", "3 192.0.2.2:0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			up, _ := spoken(t, c.speaks)
			var hop atomic.Value
			h := newHop(t, up, func(c *config) {
				c.info = func(i ConnInfo) ConnInfo { i.Trusted = true; hop.Store(i.Client.String()); return i }
			})
			client := protocols[0].client(t, h)
			for i, r := range c.requests {
				_, body := get(t, client, "http://a/", func(q *http.Request) {
					if r[0] != "" {
						q.Header.Set("X-Forwarded-For", r[0])
					}
					q.Header.Set(IDHeader, r[1])
				})
				if want := strings.Replace(c.want[i], "hop", hop.Load().(string), 1); body != want {
					t.Errorf("request %d for %q: the upstream connection is %q, want %q", i, r, body, want)
				}
			}
		})
	}
}

// TestSharedConnections checks that without a PROXY header clients share
// upstream connections, by Key and not by Upstream.
func TestSharedConnections(t *testing.T) {
	up, open := spoken(t, ForAll)
	h := newHop(t, nil, func(c *config) {
		c.Route = leading(func(host, _ string) (*Upstream, error) { // as after a reload
			return &Upstream{Key: up.Key + host, Name: up.Name, Dial: up.Dial}, nil
		})
	})
	for _, host := range []string{"a", "b"} {
		for range 3 {
			c := protocols[0].client(t, h)
			if _, body := get(t, c, "http://"+host+"/"); !strings.HasPrefix(body, map[string]string{"a": "1 ", "b": "2 "}[host]) {
				t.Errorf("%s: %q", host, body)
			}
			c.CloseIdleConnections()
		}
	}
	if open.Load() != 2 {
		t.Errorf("%d connections", open.Load())
	}
	h.Close()
	eventually(t, "Close closes idle upstream connections", func() bool { return open.Load() == 0 })
}

// TestStaleConnection checks that an upstream which closes its idle connections
// costs no request that may be repeated.
func TestStaleConnection(t *testing.T) {
	var kill atomic.Pointer[net.TCPConn]
	up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			if r.URL.Path == "/die" && kill.CompareAndSwap(nil, c) {
				return // the second request of this connection finds it closed
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	h := newHop(t, up)
	c := protocols[0].client(t, h)
	get(t, c, "http://a/")
	if res, body := get(t, c, "http://a/die"); res.StatusCode != 200 || body != "ok" {
		t.Errorf("%d %q", res.StatusCode, body)
	}
}

// TestNoRepeat checks that a request which may have had its effect is not sent
// again.
func TestNoRepeat(t *testing.T) {
	var posts atomic.Int64
	up := rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			io.Copy(io.Discard, r.Body)
			if r.Method == "POST" {
				posts.Add(1)
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	h := newHop(t, up)
	c := protocols[0].client(t, h)
	for _, body := range []string{"", "pay"} {
		posts.Store(0)
		get(t, c, "http://a/") // so that there is a connection to use again
		res, err := c.Post("http://a/", "text/plain", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 502 || posts.Load() != 1 {
			t.Errorf("body %q: %d, sent %d times", body, res.StatusCode, posts.Load())
		}
	}
}

// TestKeptConnectionIsHealth: a target that could not be reached is well again once it has answered on a
// connection that was kept, and no error that is not its fault has it avoided.
func TestKeptConnectionIsHealth(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		up := upstream(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "here") })
		h := p.hop(t, up)
		client := p.client(t, h)
		ask := func() {
			t.Helper()
			if _, body := get(t, client, p.url("/")); body != "here" {
				t.Fatal(body)
			}
		}
		ask()
		up.Health.Failed()
		if ask(); up.Health.IsAvoided() {
			t.Error("it has answered, and is avoided")
		}
	})
	refuses := &Upstream{Dial: func(context.Context) (net.Conn, error) { return nil, io.EOF }, IsFault: func(error) bool { return false }}
	if _, err := dialUpstream(context.WithValue(t.Context(), dialKey{}, refuses)); err == nil || refuses.Health.IsAvoided() {
		t.Errorf("after an error that is not its fault, %v, it is avoided: %v", err, refuses.Health.IsAvoided())
	}
}
