package sni

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// need returns the path of a program, or skips the test for want of it. Under CI it must be there.
func need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", program)
		}
		t.Skipf("%s is not installed", program)
	}
	return path
}

// builder writes hellos by hand, for what no client sends.
type builder []byte

func (b builder) uint16(v int) builder { return binary.BigEndian.AppendUint16(b, uint16(v)) }
func (b builder) vector8(v []byte) builder {
	return append(append(b, byte(len(v))), v...)
}
func (b builder) vector16(v []byte) builder { return append(b.uint16(len(v)), v...) }
func (b builder) ext(typ int, data []byte) builder {
	return b.uint16(typ).vector16(data)
}

func (b builder) serverName(names ...string) builder {
	var list builder
	for _, n := range names {
		list = append(list, 0).vector16([]byte(n))
	}
	return b.ext(extServerName, builder{}.vector16(list))
}

func (b builder) alpn(protocols ...string) builder {
	var list builder
	for _, p := range protocols {
		list = list.vector8([]byte(p))
	}
	return b.ext(extALPN, builder{}.vector16(list))
}

func (b builder) versions(vs ...int) builder {
	var list builder
	for _, v := range vs {
		list = list.uint16(v)
	}
	return b.ext(extSupportedVersions, builder{}.vector8(list))
}

// message is a ClientHello message with these extensions; nil means that it ends before them.
func message(version int, extensions builder) []byte {
	body := builder{}.uint16(version)
	body = append(body, make([]byte, 32)...)
	body = body.vector8(make([]byte, 32)).vector16([]byte{0x13, 0x01, 0xc0, 0x2f}).vector8([]byte{0})
	if extensions != nil {
		body = body.vector16(extensions)
	}
	return handshake(typeClientHello, body)
}

func handshake(typ byte, body []byte) []byte {
	n := len(body)
	return append([]byte{typ, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
}

// records puts a message into handshake records of at most n bytes.
func records(msg []byte, n int) []byte {
	var out []byte
	for part := range slices.Chunk(msg, n) {
		out = append(out, recordHandshake, 3, 1)
		out = builder(out).vector16(part)
	}
	return out
}

// refragment returns the message that the records of stream[:length] carry in records of n bytes.
func refragment(stream []byte, length, n int) []byte {
	var msg []byte
	for b := stream[:length]; len(b) > 0; {
		size := int(b[3])<<8 | int(b[4])
		msg = append(msg, b[recordHeaderLen:recordHeaderLen+size]...)
		b = b[recordHeaderLen+size:]
	}
	return records(msg, n)
}

// oracle asks crypto/tls what it sees at the start of a stream. info is nil when it accepts no hello there.
func oracle(stream []byte) (info *tls.ClientHelloInfo) {
	server := tls.Server(&script{rest: stream}, &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
		info = i
		return nil, errors.New("seen enough")
	}})
	_ = server.Handshake() // always fails
	return info
}

// script is a connection that plays a stream, step bytes a read (0: all there is), and then ends.
type script struct {
	net.Conn
	rest  []byte
	step  int
	reads int
}

func (s *script) Read(b []byte) (int, error) {
	s.reads++
	if len(s.rest) == 0 {
		return 0, io.EOF
	}
	if s.step > 0 {
		b = b[:min(len(b), s.step)]
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *script) Write(b []byte) (int, error)      { return len(b), nil }
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func same(a, b Hello) bool {
	return a.ServerName == b.ServerName && a.FinalDot == b.FinalDot && slices.Equal(a.ALPN, b.ALPN)
}

// check holds a hello that a real client sent against crypto/tls, cuts it everywhere, and fragments it anew.
func check(t *testing.T, stream []byte) Hello {
	t.Helper()
	h, err := Parse(stream)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	info := oracle(stream)
	if info == nil {
		t.Fatal("crypto/tls does not accept this hello")
	}
	if h.ServerName != strings.ToLower(info.ServerName) || !slices.Equal(h.ALPN, info.SupportedProtos) {
		t.Errorf("got %q %q, crypto/tls says %q %q", h.ServerName, h.ALPN, info.ServerName, info.SupportedProtos)
	}
	for i := range h.Length {
		if _, err := Parse(stream[:i]); err != ErrIncomplete {
			t.Fatalf("Parse of the first %d of %d bytes: %v, want ErrIncomplete", i, h.Length, err)
		}
	}
	for _, n := range []int{1, 2, 3, 5, 64, 1000, maxPlaintext} {
		again := refragment(stream, h.Length, n)
		h2, err := Parse(again)
		if err != nil || !same(h, h2) || h2.Length != len(again) {
			t.Errorf("in records of %d bytes: %+v, %v; want %+v of %d bytes", n, h2, err, h, len(again))
		}
		if oracle(again) == nil {
			t.Errorf("in records of %d bytes: crypto/tls does not accept it", n)
		}
		for _, step := range []int{1, 7, 0} {
			// What follows the hello must not be lost or looked at.
			full := append(bytes.Clone(again), "early data"...)
			c := &script{rest: full, step: step}
			h3, head, err := Read(c, nil, 128<<10, time.Second)
			if err != nil || !same(h, h3) || h3.Length != len(again) {
				t.Errorf("Read, %d bytes at a time, records of %d: %+v, %v", step, n, h3, err)
			}
			if len(head) < h3.Length || !bytes.Equal(append(head, c.rest...), full) {
				t.Errorf("Read, %d bytes at a time, records of %d: bytes were lost or changed", step, n)
			}
		}
	}
	return h
}
