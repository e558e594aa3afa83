package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A trick is what a stranger does with one connection from source, until ctx ends or he is cut. Between two
// of them he waits a little, so that it is the daemon that is measured, and not how fast one can write.
type trick struct {
	name string
	port int
	do   func(ctx context.Context, c net.Conn)
}

// Where the daemon listens.
const (
	portSNI, portHTTPS, portHTTP, portMTLS = 4430, 4431, 8080, 4432
)

// tricks are those that a stranger knows. first is a hello of TLS.
func tricks(first []byte) []trick {
	half := func(_ context.Context, c net.Conn) { c.Write(first[:len(first)/2]); keep(c) }
	all := []trick{
		{"half a hello, sni", portSNI, half},
		{"half a hello, https", portHTTPS, half},
		{"nothing at all", portSNI, func(_ context.Context, c net.Conn) { keep(c) }},
		{"a hello byte by byte", portSNI, func(ctx context.Context, c net.Conn) { slowly(ctx, c, first, 50*time.Millisecond) }},
		{"half a handshake with mTLS", portMTLS, func(_ context.Context, c net.Conn) { c.Write(first); keep(c) }},
		{"a flow that is not read", portSNI, func(ctx context.Context, c net.Conn) {
			c.Write(first)
			io.Copy(c, io.LimitReader(endless{}, 4<<20)) // which comes back
			<-ctx.Done()
		}},
		{"a slow header", portHTTP, func(ctx context.Context, c net.Conn) {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\n")
			slowly(ctx, c, []byte(strings.Repeat("X-A: b\r\n", 1000)), 50*time.Millisecond)
		}},
		{"a slow body", portHTTP, func(ctx context.Context, c net.Conn) {
			io.WriteString(c, "POST /drain HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\n\r\n")
			slowly(ctx, c, make([]byte, 1000), 50*time.Millisecond)
		}},
		{"a slow read", portHTTP, func(ctx context.Context, c net.Conn) {
			io.WriteString(c, "GET /big HTTP/1.1\r\nHost: a.test\r\n\r\n")
			for b := make([]byte, 100); ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
				if _, err := c.Read(b); err != nil {
					return
				}
			}
		}},
		{"pings of a WebSocket", portHTTP, func(ctx context.Context, c net.Conn) {
			io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
			for ctx.Err() == nil { // and none of the pongs is read
				if _, err := c.Write([]byte(strings.Repeat("\x89\x80\x01\x02\x03\x04", 100))); err != nil {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}},
	}
	for _, tr := range http2Tricks {
		do := onHTTP2(tr.do)
		inTLS := func(ctx context.Context, c net.Conn) { do(ctx, tls.Client(c, clientTLS)) }
		all = append(all, trick{tr.name, portHTTP, do}, trick{tr.name + ", in TLS", portHTTPS, inTLS})
	}
	return all
}

var clientTLS = &tls.Config{InsecureSkipVerify: true, ServerName: "a.test", NextProtos: []string{"h2"}}

// http2Tricks are done again and again.
var http2Tricks = []struct {
	name string
	do   func(f *http2.Framer, id uint32) error
}{
	{"rapid reset", func(f *http2.Framer, id uint32) error {
		for range 20 {
			if err := request(f, id, "/big", true); err != nil {
				return err
			}
			if err := f.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
				return err
			}
			id += 2
		}
		return nil
	}},
	{"a header without end", func(f *http2.Framer, id uint32) error {
		if err := request(f, id, "/", false); err != nil {
			return err
		}
		for range 100 {
			if err := f.WriteContinuation(id, false, []byte("\x00\x01x\x7f\xa1\x07"+strings.Repeat("a", 1056))); err != nil {
				return err
			}
		}
		return nil
	}},
	{"SETTINGS", func(f *http2.Framer, id uint32) error {
		for i := range 100 {
			if err := f.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: uint32(i)}); err != nil {
				return err
			}
		}
		return nil
	}},
	{"PINGs", func(f *http2.Framer, id uint32) error {
		for range 100 {
			if err := f.WritePing(false, [8]byte{1}); err != nil {
				return err
			}
		}
		return nil
	}},
	{"a header table that grows", func(f *http2.Framer, id uint32) error {
		block := append(header("/", "x-much", strings.Repeat("b", 3900)), strings.Repeat("\xbe", 100)...) // that again
		return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true, EndStream: true})
	}},
	{"empty windows, of much", func(f *http2.Framer, id uint32) error { return request(f, id, "/big", true) }},
	{"empty windows, of little", func(f *http2.Framer, id uint32) error { return request(f, id, "/", true) }},
}

// keep waits for the other end to have enough.
func keep(c net.Conn) { io.Copy(io.Discard, c) }

func slowly(ctx context.Context, c net.Conn, b []byte, every time.Duration) {
	for i := range b {
		if _, err := c.Write(b[i : i+1]); err != nil || ctx.Err() != nil {
			return
		}
		time.Sleep(every)
	}
}

// onHTTP2 does the same again and again on a connection of HTTP/2 that is never read, and whose streams have
// no window.
func onHTTP2(do func(f *http2.Framer, id uint32) error) func(context.Context, net.Conn) {
	return func(ctx context.Context, c net.Conn) {
		out := bufio.NewWriter(c) // which costs the stranger as little as can be
		out.WriteString(http2.ClientPreface)
		f := http2.NewFramer(out, c)
		f.AllowIllegalWrites = true
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		for id := uint32(1); ctx.Err() == nil; id += 100 {
			c.SetWriteDeadline(time.Now().Add(time.Second))
			if do(f, id) != nil || out.Flush() != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

func request(f *http2.Framer, id uint32, path string, end bool) error {
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: header(path), EndHeaders: end, EndStream: true})
}

// header is the block of a request, with more names and values.
func header(path string, more ...string) []byte {
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	lines := append([]string{":method", "GET", ":scheme", "http", ":authority", "a.test", ":path", path}, more...)
	for i := 0; i < len(lines); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: lines[i], Value: lines[i+1]})
	}
	return []byte(block.String())
}

// endless is a stream of zeros.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// attack does all tricks from source, conns connections of each at a time, until ctx ends. count is told of
// each that begins.
func attack(ctx context.Context, source string, first []byte, conns int, count func(trick string)) {
	done := make(chan struct{})
	all := tricks(first)
	for _, tr := range all {
		for range conns {
			go func() {
				defer func() { done <- struct{}{} }()
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: time.Second, Control: smallBuffer}
				for ctx.Err() == nil {
					c, err := d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", tr.port))
					if err == nil {
						count(tr.name)
						stop := context.AfterFunc(ctx, func() { c.Close() })
						tr.do(ctx, c)
						stop()
						c.(*net.TCPConn).SetLinger(0)
						c.Close()
					}
					time.Sleep(100 * time.Millisecond)
				}
			}()
		}
	}
	for range len(all) * conns {
		<-done
	}
}

func smallBuffer(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
}
