package vhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
)

// answering is an upstream that answers each request with these bytes, and ends the connection.
func answering(t testing.TB, answer string) *Upstream {
	return rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		readHead(br)
		io.WriteString(c, answer)
	})
}

// speak opens a connection to h, writes the request and reads until the connection ends.
func speak(t testing.TB, h *hop, overTLS bool, request string) (string, error) {
	c, br := raw(t, h, overTLS)
	defer c.Close()
	io.WriteString(c, request)
	all, err := io.ReadAll(br)
	return string(all), err
}

const plainGet = "GET / HTTP/1.0\r\nHost: example.org\r\n\r\n"

// TestWebSocketSpelling checks that the headers of WebSocket are spelled as RFC 6455 does, both ways: there
// are clients and servers that compare letter by letter.
func TestWebSocketSpelling(t *testing.T) {
	const asks = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: chat\r\nSec-WebSocket-Extensions: x-y\r\n"
	const answers = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\nSec-WebSocket-Extensions: x-y\r\n"
	for _, overTLS := range []bool{false, true} {
		for _, status := range []string{"101 Switching Protocols", "426 Upgrade Required"} {
			got := make(chan string, 1)
			h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
				got <- readHead(br)
				fmt.Fprintf(c,
					"HTTP/1.1 %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n%sSec-WebSocket-Version: 13\r\n\r\n", status, answers)
			}))
			answer, _ := speak(t, h, overTLS,
				"GET / HTTP/1.1\r\nHost: example.org\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"+asks+"\r\n")
			if head := <-got; !containsLines(head, asks) {
				t.Errorf("the upstream got %q", head)
			}
			if !strings.HasPrefix(answer, "HTTP/1.1 "+status) ||
				!containsLines(answer, answers+"Sec-WebSocket-Version: 13\r\n") {
				t.Errorf("the client got %q", answer)
			}
		}
	}
}

func containsLines(head, lines string) bool {
	for line := range strings.SplitAfterSeq(lines, "\r\n") {
		if !strings.Contains(head, line) {
			return false
		}
	}
	return true
}

// TestUpgradeOffers checks which protocols a client may offer, and which of them an upstream may choose.
func TestUpgradeOffers(t *testing.T) {
	for _, c := range []struct{ offer, sent, chosen, status string }{
		{"Connection: Upgrade\r\nUpgrade: websocket, foo\r\n", "websocket, foo", "websocket", "101"},
		{"Connection: Upgrade\r\nUpgrade: foo\r\nUpgrade: websocket\r\n", "foo, websocket", "WebSocket",
			"101"},
		{"Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", "websocket", "websocket",
			"101"},
		{"Connection: Upgrade\r\nUpgrade: websocket\r\n", "websocket", "foo", "502"},
		{"Connection: Upgrade\r\nUpgrade: websocket\r\n", "websocket", "h2c", "502"},
		{"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n", "", "websocket", "502"},
		{"Upgrade: websocket\r\n", "", "websocket", "502"},
	} {
		for _, overTLS := range []bool{false, true} {
			got := make(chan string, 1)
			h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(conn *net.TCPConn, br *bufio.Reader) {
				got <- readHead(br)
				fmt.Fprintf(conn,
					"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\nearly", c.chosen)
				io.Copy(conn, br)
			}))
			conn, br := raw(t, h, overTLS)
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: example.org\r\n"+c.offer+"\r\n")
			head, line := <-got, "\r\nUpgrade: "+c.sent+"\r\n"
			if strings.Contains(head, "\r\nUpgrade:") != (c.sent != "") || c.sent != "" &&
				!strings.Contains(head, line) {
				t.Errorf("%q: the upstream got %q", c.offer, head)
			}
			answer := readHead(br)
			if !strings.HasPrefix(answer, "HTTP/1.1 "+c.status) {
				t.Errorf("%q, and %s was chosen: %q", c.offer, c.chosen, answer)
			}
			if c.status != "101" {
				continue
			}
			if !strings.Contains(answer, "\r\nUpgrade: "+c.chosen+"\r\n") {
				t.Errorf("%q: the client is told %q", c.offer, answer)
			}
			io.WriteString(conn, "echo")
			b := make([]byte, 9)
			if _, err := io.ReadFull(br, b); err != nil || string(b) != "earlyecho" {
				t.Errorf("%q: then %q, %v", c.offer, b, err)
			}
		}
	}
}

// TestPlainClients checks that HTTP/1.0 gets one answer, without what it doesn't know.
func TestPlainClients(t *testing.T) {
	for _, overTLS := range []bool{false, true} {
		for _, early := range []string{"100 Continue", "102 Processing", "103 Early Hints\r\nLink: </x>"} {
			h := protocol{tls: overTLS}.hop(t, answering(t,
				"HTTP/1.1 "+early+"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"))
			if answer, err := speak(t, h, overTLS, plainGet); strings.Count(answer, "HTTP/1.") != 1 ||
				!strings.HasPrefix(answer, "HTTP/1.0 200 OK\r\n") ||
				!strings.HasSuffix(answer, "\r\n\r\nhi") || strings.Contains(answer, "Link") || err != nil {
				t.Errorf("%q before the answer: %q, %v", early, answer, err)
			}
		}
		offered := make(chan string, 1)
		h := protocol{tls: overTLS}.hop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
			offered <- readHead(br)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		}))
		speak(t, h, overTLS,
			"GET / HTTP/1.0\r\nHost: example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		if head := <-offered; strings.Contains(head, "Upgrade") {
			t.Errorf("HTTP/1.0 offers an upgrade: %q", head)
		}
	}
}

// TestOddAnswers sends what upstreams answer that another hop must not pass on as it is.
func TestOddAnswers(t *testing.T) {
	each(t, func(t *testing.T, p protocol) {
		for _, c := range []struct {
			answer string
			status int
			lacks  string // header
		}{
			{"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, "Content-Length"},
			{"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", 204, "Content-Length"},
			{"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, "Content-Length"},
			{"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n", 502, ""},
			{"HTTP/1.1 000 Odd\r\nContent-Length: 0\r\n\r\n", 502, ""},
			{"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\nhi", 999, ""},
			{"HTTP/1.1 299 Odd\r\nContent-Length: 2\r\n\r\nhi", 299, ""},
			{"HTTP/1.1 200 OK\r\nAlt-Svc: h3=\":443\"; ma=86400\r\nContent-Length: 2\r\n\r\nhi", 200,
				"Alt-Svc"},
			// Whose end is a matter of opinion, or that begin with what is no answer.
			{"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nhi", 502, ""},
			{"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi", 502, ""},
			{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", 502, ""},
			{"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 502, ""},
			{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 200, ""},
		} {
			h := p.hop(t, answering(t, c.answer))
			res, err := p.client(t, h).Get(p.url("/"))
			if err != nil {
				t.Errorf("%q: %v", c.answer, err)
				continue
			}
			body, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || res.StatusCode != c.status || c.lacks != "" && res.Header[c.lacks] != nil {
				t.Errorf("%q: %d %v %q, %v", c.answer, res.StatusCode, res.Header, body, err)
			}
			if log := h.log.String(); strings.Contains(log, "panic") {
				t.Errorf("%q: %s", c.answer, log)
			}
		}
	})
}

// TestEarlyAnswers checks that the client gets what an upstream answers that doesn't read the upload, and
// resets the connection.
func TestEarlyAnswers(t *testing.T) {
	const size, tries = 4 << 20, 12
	for name, c := range map[string]struct{ answer, body string }{
		"with a body": {"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large", "too large"},
		"with a large body": {"HTTP/1.1 413 Too Large\r\nContent-Length: 60000\r\nConnection: close\r\n\r\n" +
			strings.Repeat("x", 60000), strings.Repeat("x", 60000)},
		"chunked": {"HTTP/1.1 413 Too Large\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ntoo large\r\n0\r\n\r\n", "too large"},
		"without a body": {"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
			""},
		"redirect": {"HTTP/1.1 302 Found\r\nLocation: /in\r\nContent-Length: 0\r\n\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, p protocol) {
				closed := make(chan struct{}, 2*tries)
				h := p.hop(t, rawUpstream(t, func(c2 *net.TCPConn, br *bufio.Reader) {
					readHead(br)
					io.WriteString(c2, c.answer)
					c2.Close()
					closed <- struct{}{}
				}))
				client := p.client(t, h)
				for i := range tries {
					status, body, err := 0, []byte{}, error(nil)
					if p.h2 {
						req, _ := http.NewRequest("POST", p.url("/"),
							io.LimitReader(rand.NewChaCha8([32]byte{}), size))
						req.ContentLength = size
						var res *http.Response
						if res, err = client.Do(req); err == nil {
							status = res.StatusCode
							body, err = io.ReadAll(res.Body)
							res.Body.Close()
						}
					} else {
						conn, br := raw(t, h, p.tls)
						go func() {
							fmt.Fprintf(conn,
								"POST / HTTP/1.1\r\nHost: example.org\r\nContent-Length: %d\r\n\r\n", size)
							io.Copy(conn, io.LimitReader(rand.NewChaCha8([32]byte{}), size))
						}()
						var res *http.Response
						if res, err = http.ReadResponse(br, nil); err == nil {
							status = res.StatusCode
							body, err = io.ReadAll(res.Body)
						}
						conn.Close()
					}
					if err != nil || fmt.Sprintf("HTTP/1.1 %d", status) != c.answer[:12] ||
						string(body) != c.body {
						t.Fatalf("try %d: %d, %d bytes: %.80q, %v", i, status, len(body), body, err)
					}
					<-closed // else the next request may be sent on this connection, which has not said that it ends
				}
			})
		})
	}
}

// TestCutAnswers checks that what there was of an answer reaches the client when the upstream dies, and that
// it doesn't look whole.
func TestCutAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"known length": "HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 100\r\n\r\nhello",
		"chunked":      "HTTP/1.1 200 OK\r\nX-A: b\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
	} {
		for _, reset := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, reset=%t", name, reset), func(t *testing.T) {
				up := func() *Upstream {
					return rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
						readHead(br)
						io.WriteString(c, answer)
						if reset {
							c.SetLinger(0)
						}
					})
				}
				each(t, func(t *testing.T, p protocol) {
					h := p.hop(t, up())
					for i := range 20 {
						res, err := p.client(t, h).Get(p.url("/"))
						if err != nil {
							t.Fatalf("try %d: %v", i, err)
						}
						body, err := io.ReadAll(res.Body)
						res.Body.Close()
						if res.StatusCode != 200 || res.Header.Get("X-A") != "b" || string(body) != "hello" ||
							err == nil {
							t.Fatalf("try %d: %d %v %q, %v", i, res.StatusCode, res.Header, body, err)
						}
						if q := h.request(t, i+1); !errors.Is(q.Err, errCutOff) {
							t.Errorf("reported %v", q.Err)
						}
					}
				})
				for _, overTLS := range []bool{false, true} { // HTTP/1.0
					h := protocol{tls: overTLS}.hop(t, up())
					answer, err := speak(t, h, overTLS, plainGet)
					if !strings.HasPrefix(answer, "HTTP/1.0 200 OK\r\n") ||
						!strings.HasSuffix(answer, "\r\n\r\nhello") {
						t.Errorf("HTTP/1.0, tls=%t: %q, %v", overTLS, answer, err)
					}
					if known := strings.Contains(answer, "Content-Length"); !known && err == nil {
						t.Errorf("HTTP/1.0, tls=%t: %q looks whole", overTLS, answer)
					}
				}
			})
		}
	}
}
