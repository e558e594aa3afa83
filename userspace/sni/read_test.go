package sni

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// pair is a TCP connection over the loopback interface.
func pair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// send writes b in pieces of n bytes, each in a segment of its own as far as the kernel goes along, and stops at the
// first error: the reader may have heard enough.
func send(c net.Conn, b []byte, n int) {
	for len(b) > 0 {
		n := min(n, len(b))
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
	}
}

func TestReadSocket(t *testing.T) {
	long := builder{}.serverName("a.b").ext(21, make([]byte, 16<<10)) // padding, RFC 7685
	tests := []struct {
		name    string
		stream  []byte
		segment int // bytes
	}{
		{"at once", records(message(0x303, builder{}.serverName("a.b")), maxPlaintext), 1 << 20},
		{"byte by byte", records(message(0x303, builder{}.serverName("a.b")), maxPlaintext), 1},
		{"records of one byte, byte by byte", records(message(0x303, builder{}.serverName("a.b")), 1), 1},
		{"16 KiB", records(message(0x303, long), maxPlaintext), 1 << 20},
		{"16 KiB in segments of 536", records(message(0x303, long), maxPlaintext), 536},
		{"16 KiB in records of one byte", records(message(0x303, long), 1), 1 << 20},
		{"16 KiB in records of one byte, byte by byte", records(message(0x303, long), 1), 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, server := pair(t)
			client.SetNoDelay(true)
			go send(client, tt.stream, tt.segment)
			h, head, err := Read(server, nil, 64<<10, patience) // the default limit
			if err != nil || h.ServerName != "a.b" || h.Length != len(tt.stream) || !bytes.Equal(head, tt.stream) {
				t.Errorf("got %q, %d of %d bytes, %v", h.ServerName, len(head), len(tt.stream), err)
			}
		})
	}
}

func TestReadErrors(t *testing.T) {
	good := records(message(0x303, builder{}.serverName("a.b")), maxPlaintext)
	endless := records(append([]byte{typeClientHello, 0, 0xff, 0}, make([]byte, 1<<17)...), maxPlaintext)
	const maxBytes = 4096
	tests := []struct {
		name   string
		client func(*net.TCPConn)
		want   error
		read   int  // bytes in head, at most
		alert  bool // whether the client should get one
	}{
		{"nothing, then a close", func(c *net.TCPConn) { c.Close() }, ErrEOF, 0, false},
		{"nothing, then a reset", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, ErrEOF, 0, false},
		{"nothing, then a half-close", func(c *net.TCPConn) { c.CloseWrite() }, ErrEOF, 0, false},
		{"half a hello, then a close", func(c *net.TCPConn) { c.Write(good[:40]); c.Close() }, io.ErrUnexpectedEOF, 40, false},
		{"one byte of http", func(c *net.TCPConn) { c.Write([]byte("G")) }, ErrNotTLS, 1, false},
		{"says that it is too large", func(c *net.TCPConn) { c.Write(records(handshake(1, make([]byte, maxBytes)), 100)[:105]) }, ErrTooLarge, 105, true},
		{"endless, says so late", func(c *net.TCPConn) { send(c, endless, 1000) }, ErrTooLarge, wireFactor * maxBytes, true},
		{"records of one byte without end", func(c *net.TCPConn) {
			send(c, records(handshake(1, make([]byte, maxBytes-messageHeaderLen)), 1), 1000)
		}, ErrTooLarge, wireFactor * maxBytes, true},
		{"a record that does not fit", func(c *net.TCPConn) { c.Write([]byte("\x16\x03\x01\x40\x00")) }, ErrTooLarge, 5, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, server := pair(t)
			done := make(chan struct{})
			go func() { defer close(done); tt.client(client) }()
			h, head, err := Read(server, nil, maxBytes, patience)
			if !errors.Is(err, tt.want) || !same(h, Hello{}) {
				t.Errorf("got %+v, %v; want %v", h, err, tt.want)
			}
			if len(head) > tt.read || tt.read > 0 && len(head) == 0 {
				t.Errorf("read %d bytes, want 1 to %d", len(head), tt.read)
			}
			if _, ok := AlertFor(err); ok != tt.alert {
				t.Errorf("AlertFor(%v): %v, want %v", err, ok, tt.alert)
			}
			server.Close()
			client.Close()
			<-done
		})
	}
}

// TestLimits pins what the limit counts: the message, and twice as much for the records.
func TestLimits(t *testing.T) {
	msg := message(0x303, builder{}.serverName("a.b").ext(21, make([]byte, 4000)))
	tests := []struct {
		name   string
		stream []byte
		max    int // the least that lets it pass
	}{
		{"one record", records(msg, maxPlaintext), len(msg)},
		{"records of ten bytes", records(msg, 10), len(msg)},
		{"records of one byte", records(msg, 1), 3 * len(msg)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, step := range []int{1, 100, 0} {
				if _, _, err := Read(&script{rest: tt.stream, step: step}, nil, tt.max, 0); err != nil {
					t.Errorf("%d bytes at a time, limit %d: %v", step, tt.max, err)
				}
				if _, _, err := Read(&script{rest: tt.stream, step: step}, nil, tt.max-1, 0); err != ErrTooLarge {
					t.Errorf("%d bytes at a time, limit %d: %v, want ErrTooLarge", step, tt.max-1, err)
				}
			}
		})
	}
	for _, limit := range []int{-1, 0, 1, 2, 3} {
		if _, head, err := Read(&script{rest: records(msg, 100)}, nil, limit, 0); err != ErrTooLarge || len(head) > 6 {
			t.Errorf("limit %d: %v after %d bytes", limit, err, len(head))
		}
	}
}

// TestReadTimeout: the timeout is for all of the hello, by a clock that moves only while everybody waits.
func TestReadTimeout(t *testing.T) {
	const timeout = 300 * time.Millisecond
	hello := records(message(0x303, builder{}.serverName("a.b")), maxPlaintext)
	for _, tt := range []struct {
		name  string
		pause time.Duration // before each byte
		sent  []byte
		read  int
	}{
		{"silence", 0, nil, 0},
		{"half a hello, then silence", 0, hello[:40], 40},
		{"a byte now and then", timeout/15 + 1, hello, 14},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				var sending sync.WaitGroup
				defer sending.Wait()
				defer server.Close()
				sending.Go(func() {
					for i := range tt.sent {
						time.Sleep(tt.pause)
						if _, err := client.Write(tt.sent[i : i+1]); err != nil {
							return
						}
					}
				})
				start := time.Now()
				h, head, err := Read(server, nil, 4096, timeout)
				if !errors.Is(err, ErrTimeout) || !same(h, Hello{}) || !bytes.Equal(head, tt.sent[:tt.read]) {
					t.Errorf("got %+v, %x, %v; want %d bytes and %v", h, head, err, tt.read, ErrTimeout)
				}
				if d := time.Since(start); d != timeout {
					t.Errorf("took %v, the timeout is %v", d, timeout)
				}
				if _, ok := AlertFor(err); ok {
					t.Error("there is an alert for it")
				}
			})
		})
	}
}

func TestReadClearsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		go func() {
			client.Write(records(message(0x303, builder{}.serverName("a.b")), maxPlaintext))
			time.Sleep(2 * time.Second)
			client.Write([]byte("x"))
		}()
		if _, _, err := Read(server, nil, 64<<10, time.Second); err != nil {
			t.Fatal(err)
		}
		if n, err := server.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("the next read: %v", err)
		}
	})
}

func TestContinue(t *testing.T) {
	stream := append(records(message(0x303, builder{}.serverName("a.b")), 10), "early data"...)
	for i := range len(stream) + 1 {
		c := &script{rest: stream[i:], step: 1}
		h, head, err := Read(c, bytes.Clone(stream[:i]), 64<<10, 0)
		if err != nil || h.ServerName != "a.b" || !bytes.Equal(append(head, c.rest...), stream) {
			t.Fatalf("%d bytes read before: %+v, %q, %v", i, h, head, err)
		}
		if i >= h.Length && c.reads > 0 {
			t.Fatalf("%d bytes read before: reads although the hello is complete", i)
		}
	}
}

// TestHandshake passes a hello on as the daemon does, in one-byte records from a real client, to a real server that
// knows nothing about it, and lets the two finish their handshake.
func TestHandshake(t *testing.T) {
	cert := selfsigned.Certificate(t, "example.org")
	client, server := pair(t)
	go func() {
		c := tls.Client(&shredder{Conn: client}, &tls.Config{ServerName: "Example.org", InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		c.Write([]byte("hello"))
	}()
	h, head, err := Read(server, nil, 64<<10, patience)
	if err != nil || h.ServerName != "example.org" {
		t.Fatalf("%+v, %v", h, err)
	}
	if len(head) < 6*1200 {
		t.Errorf("%d bytes: not in records of one byte", len(head))
	}
	s := tls.Server(&prefixed{server, io.MultiReader(bytes.NewReader(head), server)}, &tls.Config{Certificates: []tls.Certificate{cert}})
	s.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 5)
	if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "hello" {
		t.Errorf("got %q, %v", buf, err)
	}
}

// shredder sends the first write, the hello, in records of one byte.
type shredder struct {
	net.Conn
	done bool
}

func (s *shredder) Write(b []byte) (int, error) {
	if s.done {
		return s.Conn.Write(b)
	}
	s.done = true
	if _, err := s.Conn.Write(refragment(b, len(b), 1)); err != nil {
		return 0, err
	}
	return len(b), nil
}

type prefixed struct {
	net.Conn
	r io.Reader
}

func (p *prefixed) Read(b []byte) (int, error) { return p.r.Read(b) }

// TestLinear makes sure that a slow sender costs time and memory in proportion to what it sends, whatever it sends.
func TestLinear(t *testing.T) {
	for _, record := range []int{1, 100, maxPlaintext} {
		msg := message(0x303, builder{}.serverName("a.b").ext(21, make([]byte, 60000)))
		stream := records(msg, record)
		c := new(script)
		allocs := testing.AllocsPerRun(3, func() {
			*c = script{rest: stream, step: 1}
			if _, _, err := Read(c, nil, 192<<10, 0); err != nil {
				t.Fatal(err)
			}
		})
		// Doubling from 3 KiB to the whole, and append's growth of the message from one record up.
		if allocs > 60 {
			t.Errorf("records of %d bytes: %v allocations for %d bytes", record, allocs, len(stream))
		}
	}
	// Work: the same total in one-byte records must not take much more CPU when it is one hello than when it is
	// 16. A quadratic reader takes 16 times as much.
	const total = 60000
	work := func(n int) time.Duration {
		stream := records(message(0x303, builder{}.ext(21, make([]byte, n))), 1)
		best := time.Duration(1 << 62)
		for range 5 {
			start := cpuTime(t)
			for range total / n {
				if _, _, err := Read(&script{rest: stream, step: 1}, nil, 192<<10, 0); err != nil {
					t.Fatal(err)
				}
			}
			best = min(best, cpuTime(t)-start)
		}
		return best
	}
	short, long := work(total/16), work(total)
	if long > 6*short {
		t.Errorf("one long hello takes %v, 16 short ones %v", long, short)
	}
}

// cpuTime is what this process has used: unlike the time of day it doesn't count what others do meanwhile.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestErrorText(t *testing.T) {
	err := reject(AlertIllegalParameter, "the host name is an IP address")
	if got := err.Error(); !strings.Contains(got, "illegal_parameter") || !strings.Contains(got, "IP address") {
		t.Error(got)
	}
}
