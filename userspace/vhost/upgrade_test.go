package vhost

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// echoSocket is a WebSocket server that sends back what it gets.
func echoSocket(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"echo"}, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(4 << 20)
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if err := c.Write(r.Context(), kind, data); err != nil {
			return
		}
	}
}

// TestWebSockets keeps 200 WebSockets busy at once, over TLS and without.
func TestWebSockets(t *testing.T) {
	for _, p := range []protocol{protocols[0], protocols[2]} {
		t.Run(p.name, func(t *testing.T) {
			// Two hundred handshakes at once take a while.
			h := p.hop(t, upstream(t, echoSocket), func(c *config) { c.HeaderTimeout = deadline })
			ctx, cancel := context.WithTimeout(t.Context(), 3*deadline)
			defer cancel()
			c := p.client(t, h)
			c.Timeout = 0
			var open, wg sync.WaitGroup
			open.Add(200)
			for i := range 200 {
				wg.Go(func() {
					ws, _, err := websocket.Dial(ctx, strings.Replace(p.url("/socket"), "http", "ws", 1),
						&websocket.DialOptions{HTTPClient: c, Subprotocols: []string{"echo"}, CompressionMode: websocket.CompressionDisabled})
					open.Done()
					if err != nil {
						t.Error(err)
						return
					}
					defer ws.CloseNow()
					open.Wait() // all of them are there at once
					if ws.Subprotocol() != "echo" {
						t.Errorf("subprotocol %q", ws.Subprotocol())
					}
					random := rand.New(rand.NewPCG(uint64(i), 7))
					for range 5 {
						msg := make([]byte, random.IntN(20<<10))
						rand.NewChaCha8([32]byte{byte(i)}).Read(msg)
						if err := ws.Write(ctx, websocket.MessageBinary, msg); err != nil {
							t.Error(err)
							return
						}
						_, got, err := ws.Read(ctx)
						if err != nil || !bytes.Equal(got, msg) {
							t.Errorf("socket %d: %d bytes of %d came back, %v", i, len(got), len(msg), err)
							return
						}
					}
					if err := ws.Close(websocket.StatusNormalClosure, "done"); err != nil {
						t.Errorf("close: %v", err)
					}
				})
			}
			wg.Wait()
			if q := h.request(t, 200); q.Status != http.StatusSwitchingProtocols || q.BytesIn == 0 || q.BytesOut == 0 {
				t.Errorf("reported %d, %d in, %d out", q.Status, q.BytesIn, q.BytesOut)
			}
		})
	}
}

const upgrade = "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: tailsplice-test/1\r\n\r\n"

const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tailsplice-test/1\r\n\r\n"

// TestUpgradeBytes sends some MiB both ways at once through an upgraded
// connection, with bytes of both sides glued to the handshake.
func TestUpgradeBytes(t *testing.T) {
	const size = 4 << 20
	stream := func(seed byte) []byte {
		b := make([]byte, size)
		rand.NewChaCha8([32]byte{seed}).Read(b)
		return b
	}
	for _, overTLS := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%t", overTLS), func(t *testing.T) {
			upSum := make(chan [32]byte, 1)
			h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
				readHead(br)
				down := stream(2)
				c.Write(append([]byte(switching), down[:1000]...))
				var wg sync.WaitGroup
				wg.Go(func() { c.Write(down[1000:]) })
				got := make([]byte, size)
				io.ReadFull(br, got)
				upSum <- sha256.Sum256(got)
				wg.Wait()
			}))
			c, br := raw(t, h, overTLS)
			up := stream(1)
			c.Write(append([]byte(upgrade), up[:1000]...))
			var wg sync.WaitGroup
			wg.Go(func() { c.Write(up[1000:]) })
			res, err := http.ReadResponse(br, nil)
			if err != nil || res.StatusCode != 101 {
				t.Fatalf("%v %v", res, err)
			}
			got := make([]byte, size)
			if _, err := io.ReadFull(br, got); err != nil || !bytes.Equal(got, stream(2)) {
				t.Errorf("down: %v", err)
			}
			if <-upSum != sha256.Sum256(up) {
				t.Error("up: other bytes arrived")
			}
			wg.Wait()
		})
	}
}

// TestUpgradeHalfClose checks that an upgraded connection may be closed one way
// and used the other, in both orders.
func TestUpgradeHalfClose(t *testing.T) {
	for _, overTLS := range []bool{false, true} {
		for _, first := range []string{"client", "upstream"} {
			t.Run(fmt.Sprintf("tls=%t, %s first", overTLS, first), func(t *testing.T) {
				upGot := make(chan string, 1)
				h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
					readHead(br)
					io.WriteString(c, switching)
					if first == "upstream" {
						io.WriteString(c, "bye from upstream")
						c.CloseWrite()
						b, _ := io.ReadAll(br)
						upGot <- string(b)
						return
					}
					b, err := io.ReadAll(br)
					upGot <- string(b)
					if err == nil {
						io.WriteString(c, "bye from upstream")
					}
				}))
				c, br := raw(t, h, overTLS)
				io.WriteString(c, upgrade)
				if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 101 {
					t.Fatalf("%v %v", res, err)
				}
				closeWrite := func() {
					io.WriteString(c, "bye from client")
					c.(interface{ CloseWrite() error }).CloseWrite()
				}
				if first == "client" {
					closeWrite()
				}
				b, err := io.ReadAll(br)
				if string(b) != "bye from upstream" || err != nil {
					t.Errorf("client got %q, %v", b, err)
				}
				if first == "upstream" {
					closeWrite()
				}
				if got := <-upGot; got != "bye from client" {
					t.Errorf("upstream got %q", got)
				}
			})
		}
	}
}

// TestUpgradeEnds checks that either side's death ends the other side, and that
// nothing is left behind.
func TestUpgradeEnds(t *testing.T) {
	for _, who := range []string{"client", "upstream", "the hop"} {
		t.Run(who, func(t *testing.T) {
			die := make(chan bool)
			upGone := make(chan bool, 1)
			h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
				readHead(br)
				io.WriteString(c, switching)
				if who == "upstream" {
					<-die
					c.SetLinger(0)
					return
				}
				io.ReadAll(br)
				upGone <- true
			}))
			c, br := raw(t, h, false)
			io.WriteString(c, upgrade)
			if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 101 {
				t.Fatalf("%v %v", res, err)
			}
			switch who {
			case "client":
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			case "upstream":
				close(die)
			case "the hop":
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				if err := h.Shutdown(ctx); err == nil {
					t.Error("Shutdown did not wait for an upgraded connection")
				}
			}
			if who != "client" {
				if b, _ := io.ReadAll(br); len(b) != 0 {
					t.Errorf("client got %q", b)
				}
			}
			if who != "upstream" {
				<-upGone
			}
			eventually(t, "ServeConn returns", func() bool { return h.served.Load() == 1 })
		})
	}
}

// TestUpgradeRefused checks an upstream that does not want to.
func TestUpgradeRefused(t *testing.T) {
	h := newHop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		io.WriteString(w, "no "+r.Header.Get("Upgrade"))
	}))
	if res, body := rawDo(t, h, upgrade); res.StatusCode != 403 || body != "no tailsplice-test/1" {
		t.Errorf("%d %q", res.StatusCode, body)
	}
}

// TestH2CSmuggling checks that no client gets an HTTP/2 connection with the
// upstream by an upgrade: routes would not apply to what it asks there.
func TestH2CSmuggling(t *testing.T) {
	for _, token := range []string{"h2c", "H2C", "foo, h2c"} {
		h := newHop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "Upgrade %q Settings %q Connection %q", r.Header["Upgrade"], r.Header["Http2-Settings"], r.Header["Connection"])
		}))
		res, body := rawDo(t, h, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: "+token+"\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n")
		if res.StatusCode != 200 || body != "Upgrade [] Settings [] Connection []" {
			t.Errorf("%s: %d %s", token, res.StatusCode, body)
		}
	}
}

// TestDrain checks that Shutdown lets a request end, and no new one begin.
func TestDrain(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		release := make(chan bool)
		h := p.hop(t, upstream(t, func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).Flush()
			<-release
			io.WriteString(w, "whole")
		}))
		res, err := p.client(t, h).Get(p.url("/"))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		h.lastCall = 0
		ended := shutDown(t, h)
		late, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer late.Close()
		late.SetDeadline(time.Now().Add(deadline))
		if n, err := late.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Error("a connection is served after Shutdown")
		}
		if h.gone.Err() != nil {
			t.Fatal("Shutdown did not wait")
		}
		close(release)
		if b, err := io.ReadAll(res.Body); string(b) != "whole" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		ended()
	})
}

// TestUpgradeByTLS upgrades connections to an upstream that would rather speak
// HTTP/2, which has no upgrades, and is spoken with so otherwise.
func TestUpgradeByTLS(t *testing.T) {
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{selfsigned.Certificate(t, "up.test")}, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Upgrade") {
		case "websocket":
		case "tailsplice-test/1":
			w.WriteHeader(400)
			return
		default:
			io.WriteString(w, r.Proto)
			return
		}
		echoSocket(w, r)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	up := wayTo(l.Addr().String())
	up.Protocol, up.TLS = HTTPS, &tls.Config{ServerName: "up.test", InsecureSkipVerify: true}
	p := protocols[2]
	h := p.hop(t, up)
	c := p.client(t, h)
	for range 2 {
		if _, body := get(t, c, p.url("/")); body != "HTTP/2.0" {
			t.Errorf("spoken with by %s", body)
		}
		ws, _, err := websocket.Dial(t.Context(), strings.Replace(p.url("/"), "http", "ws", 1), &websocket.DialOptions{HTTPClient: c})
		if err != nil {
			t.Fatal(err)
		}
		ws.Write(t.Context(), websocket.MessageText, []byte("hello"))
		if _, got, err := ws.Read(t.Context()); string(got) != "hello" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		ws.CloseNow()
		// Whatever it is called: net/http's transport knows of WebSockets only. In two lines first, while no
		// connection is kept that speaks HTTP/1.1.
		lines := strings.Replace(upgrade, "keep-alive, Upgrade", "keep-alive\r\nX: y\r\nConnection: Upgrade", 1)
		for _, request := range []string{lines, upgrade} {
			conn, br := raw(t, h, true)
			io.WriteString(conn, request)
			if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 400 {
				t.Errorf("%q: %v, %v; want the upstream's own 400", request, res, err)
			}
		}
	}
}

// TestUpgradeH2C upgrades at an upstream that is spoken with by h2c.
func TestUpgradeH2C(t *testing.T) {
	up := upstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			io.WriteString(w, r.Proto)
			return
		}
		echoSocket(w, r)
	}, func(s *http.Server) {
		s.Protocols = new(http.Protocols)
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetUnencryptedHTTP2(true)
	})
	up.Protocol = H2C
	p := protocols[2]
	h := p.hop(t, up)
	c := p.client(t, h)
	if _, body := get(t, c, p.url("/")); body != "HTTP/2.0" {
		t.Errorf("spoken with by %s", body)
	}
	ws, _, err := websocket.Dial(t.Context(), strings.Replace(p.url("/"), "http", "ws", 1), &websocket.DialOptions{HTTPClient: c})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	ws.Write(t.Context(), websocket.MessageText, []byte("hello"))
	if _, got, err := ws.Read(t.Context()); string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
