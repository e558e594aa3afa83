package clients

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/gobwas/ws"
)

// echo sends messages back, and closes as the message "close CODE" says.
func echo(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(32 << 20)
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil {
			return
		}
		var code int
		if n, _ := fmt.Sscanf(string(data[:min(len(data), 20)]), "close %d", &code); n == 1 {
			c.Close(websocket.StatusCode(code), "as you say")
			return
		}
		if err := c.Write(r.Context(), kind, data); err != nil {
			return
		}
	}
}

// TestWebSocket goes through the cases that Autobahn's test suite made common
// (github.com/crossbario/autobahn-testsuite), with frames built one by one: what the hop does to them is
// nothing.
func TestWebSocket(t *testing.T) {
	h := start(t, "forward: "+backend(t, echo))
	random := func(n int) []byte {
		b := make([]byte, n)
		rand.NewChaCha8([32]byte{byte(n)}).Read(b)
		return b
	}
	// Its text ends anywhere in a character.
	text := func(n int) []byte { return []byte(strings.Repeat("κόσμε-", n/10+1)[:n]) }
	type frames = []ws.Frame
	frame := func(op ws.OpCode, fin bool, p []byte) ws.Frame { return ws.NewFrame(op, fin, p) }
	closing := func(code ws.StatusCode, why string) ws.Frame {
		return ws.NewCloseFrame(ws.NewCloseFrameBody(code, why))
	}
	type test struct {
		name       string
		send, want frames
		chop       int // bytes of each write; 0 writes frame by frame
	}
	var tests []test
	for _, n := range []int{0, 1, 125, 126, 127, 128, 65535, 65536, 65537, 1 << 20, 16 << 20} {
		tests = append(tests, test{fmt.Sprintf("text of %d", n), frames{ws.NewTextFrame(text(n))},
			frames{ws.NewTextFrame(text(n))}, 0},
			test{fmt.Sprintf("binary of %d", n), frames{ws.NewBinaryFrame(random(n))},
				frames{ws.NewBinaryFrame(random(n))}, 0})
	}
	fragments := func(op ws.OpCode, data []byte, size int, between ...ws.Frame) (out frames) {
		for at := 0; at < len(data); at += size {
			end := min(at+size, len(data))
			out = append(out, frame(op, end == len(data), data[at:end]))
			if op = ws.OpContinuation; end < len(data) {
				out = append(out, between...)
			}
		}
		return out
	}
	ping, pong := ws.NewPingFrame(random(125)), ws.NewPongFrame(random(125))
	two := frames{pong, pong}
	tests = append(tests,
		test{"a byte at a time", frames{ws.NewTextFrame(text(1000)), ping},
			frames{ws.NewTextFrame(text(1000)), pong}, 1},
		test{"997 bytes at a time", frames{ws.NewBinaryFrame(random(100 << 10))},
			frames{ws.NewBinaryFrame(random(100 << 10))}, 997},
		test{"many at once", append(bytesOf(50, ws.NewTextFrame(text(10))), ping),
			append(bytesOf(50, ws.NewTextFrame(text(10))), pong), 1 << 20},
		test{"fragments", fragments(ws.OpText, text(1000), 100), frames{ws.NewTextFrame(text(1000))}, 0},
		test{"fragments of one byte", fragments(ws.OpBinary, random(500), 1),
			frames{ws.NewBinaryFrame(random(500))}, 0},
		test{"fragments inside of characters", fragments(ws.OpText, text(99), 1),
			frames{ws.NewTextFrame(text(99))}, 0},
		test{"fragments of 16 MiB", fragments(ws.OpBinary, random(16<<20), 4<<10),
			frames{ws.NewBinaryFrame(random(16 << 20))}, 0},
		test{"empty fragments", frames{frame(ws.OpText, false, nil), frame(ws.OpContinuation, false, nil),
			frame(ws.OpContinuation, true, nil)}, frames{ws.NewTextFrame(nil)}, 0},
		test{"pings between fragments", fragments(ws.OpText, text(90), 30, ping),
			append(two, ws.NewTextFrame(text(90))), 0},
		test{"the same, a byte at a time", fragments(ws.OpText, text(90), 30, ping),
			append(two, ws.NewTextFrame(text(90))), 1},
		test{"an empty ping", frames{ws.NewPingFrame(nil)}, frames{ws.NewPongFrame(nil)}, 0},
		test{"a pong that nobody asked for", frames{ws.NewPongFrame([]byte("x")), ping}, frames{pong}, 0},
		test{"close", frames{closing(1000, "bye")}, frames{closing(1000, "bye")}, 0},
		test{"close, a byte at a time", frames{closing(1000, "bye")}, frames{closing(1000, "bye")}, 1},
		test{"close without a word", frames{ws.NewCloseFrame(nil)}, frames{ws.NewCloseFrame(nil)}, 0},
		test{"close in the middle of a message", frames{frame(ws.OpText, false, text(10)), closing(1001, "")},
			frames{closing(1001, "")}, 0},
		test{"close, and then talk on", frames{closing(1000, ""), ws.NewTextFrame(text(10)), ping},
			frames{closing(1000, "")}, 1 << 20},
		test{"a continuation of nothing", frames{frame(ws.OpContinuation, true, text(10))},
			frames{closing(1002, "*")}, 0},
		test{"a message inside of another", frames{frame(ws.OpText, false, text(10)),
			ws.NewTextFrame(text(10))}, frames{closing(1002, "*")}, 0},
		test{"a reserved opcode", frames{frame(5, true, text(10))}, frames{closing(1002, "*")}, 0},
		test{"a reserved bit", frames{{Header: ws.Header{Fin: true, Rsv: ws.Rsv(false, true, false),
			OpCode: ws.OpText, Length: 3}, Payload: text(3)}}, frames{closing(1002, "*")}, 0},
		test{"a ping too large", frames{frame(ws.OpPing, true, random(126))}, frames{closing(1002, "*")}, 0},
	)
	for _, code := range []ws.StatusCode{
		1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999,
	} {
		tests = append(tests, test{fmt.Sprintf("close %d", code), frames{closing(code, "why")},
			frames{closing(code, "why")}, 0},
			test{fmt.Sprintf("the server closes, %d", code),
				frames{ws.NewTextFrame(fmt.Appendf(nil, "close %d", code))},
				frames{closing(code, "as you say")}, 0})
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			conn := h.upgrade(t)
			var sent bytes.Buffer
			go func() {
				for _, f := range c.send {
					f.Payload = bytes.Clone(f.Payload)
					if err := ws.WriteFrame(&sent, ws.MaskFrameInPlace(f)); err != nil {
						t.Error(err)
					}
					if c.chop == 0 {
						conn.Write(sent.Next(sent.Len()))
					}
				}
				for sent.Len() > 0 {
					conn.Write(sent.Next(c.chop))
				}
			}()
			for i, want := range c.want {
				got, err := readMessage(conn)
				if err != nil {
					t.Fatalf("frame %d: %v", i, err)
				}
				// Whatever the server says.
				if bytes.HasSuffix(want.Payload, []byte("*")) && want.Header.OpCode == ws.OpClose {
					got.Payload, want.Payload = got.Payload[:2], want.Payload[:2]
				}
				if got.Header.OpCode != want.Header.OpCode || !bytes.Equal(got.Payload, want.Payload) {
					t.Fatalf("frame %d: opcode %d with %d bytes %.40q, want %d with %d bytes %.40q", i,
						got.Header.OpCode, len(got.Payload), got.Payload,
						want.Header.OpCode, len(want.Payload), want.Payload)
				}
				if want.Header.OpCode == ws.OpClose {
					if strings.HasPrefix(c.name, "the server") {
						ws.WriteFrame(conn, ws.MaskFrame(want))
					}
					if rest, _ := io.ReadAll(conn); len(rest) > 0 {
						t.Errorf("%d bytes after the end", len(rest))
					}
				}
			}
		})
	}
}

func bytesOf(n int, f ws.Frame) (out []ws.Frame) {
	for range n {
		out = append(out, f)
	}
	return out
}

// upgrade opens a WebSocket through the hop, and leaves the frames to the caller.
func (h hop) upgrade(t *testing.T) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := ws.Dialer{NetDial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := h.dial(ctx, "http/1.1")
		if err != nil {
			return nil, err
		}
		return conn, nil
	}}
	conn, early, _, err := d.Dial(ctx, "ws://"+site+"/")
	if err != nil {
		t.Fatal(err)
	}
	if early != nil {
		t.Fatal("bytes of a server that has nothing to say yet")
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// readMessage reads a control frame, or the frames of a message.
func readMessage(conn net.Conn) (ws.Frame, error) {
	f, err := ws.ReadFrame(conn)
	for last := f; err == nil && !last.Header.Fin; {
		if last, err = ws.ReadFrame(conn); err == nil {
			f.Payload = append(f.Payload, last.Payload...)
		}
	}
	return f, err
}

// TestEvents reads server-sent events as they are sent, by HTTP/1.1 and HTTP/2: each before the next one is.
func TestEvents(t *testing.T) {
	next := make(chan bool)
	h := start(t, "compress: true, forward: "+backend(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 5 {
			fmt.Fprintf(w, "id: %d\ndata: %s\n\n", i, strings.Repeat("x", i*500))
			w.(http.Flusher).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	}))
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2=%t", h2), func(t *testing.T) {
			tr := &http.Transport{TLSClientConfig: h.tls, ForceAttemptHTTP2: h2, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", h.addr)
			}}
			defer tr.CloseIdleConnections()
			c := &http.Client{Transport: tr, Timeout: time.Minute}
			res, err := c.Get("https://" + site + "/")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if res.ProtoMajor == 2 != h2 || res.Header.Get("Content-Encoding") != "" {
				t.Errorf("%s %v", res.Proto, res.Header)
			}
			for i := range 5 {
				want := fmt.Sprintf("id: %d\ndata: %s\n\n", i, strings.Repeat("x", i*500))
				got := make([]byte, len(want))
				if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != want {
					t.Fatalf("event %d: %.40q, %v", i, got, err)
				}
				next <- true
			}
		})
	}
}
