package sni

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// seeds are streams to start from: what real clients send, and what none does.
func seeds(f *testing.F) (streams [][]byte) {
	chromium, err := os.ReadFile(filepath.Join("testdata", "chromium.hello"))
	if err != nil {
		f.Fatal(err)
	}
	streams = append(streams, chromium)
	for _, config := range []*tls.Config{
		{ServerName: "Example.org", NextProtos: []string{"h2", "http/1.1"}},
		{ServerName: "a.b", MaxVersion: tls.VersionTLS12},
	} {
		var c first
		_ = tls.Client(&c, config).Handshake() // ends after the hello
		streams = append(streams, c.hello)
	}
	for _, e := range []builder{
		nil,
		builder{}.serverName("a.b.").alpn("h2").versions(0x304, 0x2a2a),
		builder{}.serverName("192.0.2.1"),
		builder{}.serverName("a", "b"),
		builder{}.serverName("a").serverName("b"),
		builder{}.serverName("a").ext(0xfe0d, []byte{1}),
		builder{}.ext(extServerName, []byte("\x00\x0b\x01\x00\x02xx\x00\x00\x03a.b")),
	} {
		streams = append(streams, records(message(0x303, e), maxPlaintext), records(message(0x303, e), 7))
	}
	return append(streams, []byte("\x15\x03\x01\x00\x02\x01\x00"), []byte("\x80\x2e\x01\x03\x01"), []byte("\x16\x03\x01\x00\x00"))
}

// first is a connection that keeps its first write and then fails.
type first struct {
	script
	hello []byte
}

func (c *first) Write(b []byte) (int, error) {
	c.hello = bytes.Clone(b)
	return len(b), nil
}

// FuzzStream fuzzes all of a stream, the records included.
func FuzzStream(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s, uint16(1))
		f.Add(s, uint16(100))
	}
	f.Fuzz(func(t *testing.T, stream []byte, cut uint16) { compare(t, stream, int(cut)) })
}

// FuzzMessage fuzzes what is in the records, so that no input is wasted on their headers and lengths.
func FuzzMessage(f *testing.F) {
	for _, s := range seeds(f) {
		if h, err := Parse(s); err == nil {
			whole := refragment(s, h.Length, maxPlaintext)
			f.Add(whole[recordHeaderLen+messageHeaderLen:], uint16(50))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte, size uint16) {
		if len(body) > 60000 {
			return // crypto/tls stops at 65536
		}
		compare(t, records(handshake(typeClientHello, body), int(size)%maxPlaintext+1), int(size))
	})
}

// FuzzServerName fuzzes the body of the server_name extension.
func FuzzServerName(f *testing.F) {
	for _, s := range []string{"\x00\x06\x00\x00\x03a.b", "\x00\x09\x00\x00\x06a.b:80", "\x00\x0c\x00\x00\x09[::1]:443", "\x00\x0a\x00\x00\x07127.0.1", "\x00\x0c\x01\x00\x03a.b\x00\x00\x03c.d", "\x00\x0c\x00\x00\x03a.b\x00\x00\x03c.d", "\x00\x00", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 0xffff {
			compare(t, records(message(0x303, builder{}.ext(extServerName, data)), maxPlaintext), 3)
		}
	})
}

// compare holds Parse against crypto/tls, and against itself with the same bytes in other pieces.
func compare(t *testing.T, stream []byte, cut int) {
	h, err := Parse(stream)
	info := oracle(stream)
	switch {
	case err == nil && info != nil:
		if h.ServerName != strings.ToLower(info.ServerName) && !read(h.ServerName, info.ServerName) {
			t.Fatalf("we see the name %q, crypto/tls %q", h.ServerName, info.ServerName)
		}
		if !slices.Equal(h.ALPN, info.SupportedProtos) {
			t.Fatalf("we see ALPN %q, crypto/tls %q", h.ALPN, info.SupportedProtos)
		}
	case err != nil && info != nil && !stricter(stream, info, err):
		t.Fatalf("we say %v, crypto/tls accepts it with the name %q", err, info.ServerName)
	}
	if err == nil {
		sound(t, h, stream)
	}

	// The same bytes in two pieces, and a byte at a time.
	s := scanner{maxMessage: maxHello, maxWire: 1 << 30}
	if i := cut % (len(stream) + 1); i > 0 {
		// A buffer of its own each time: the scanner may not rely on the last one's memory.
		if h2, err2 := s.next(bytes.Clone(stream[:i])); err2 != ErrIncomplete {
			agree(t, "early", h, err, h2, err2)
			return
		}
	}
	h2, err2 := s.next(stream)
	agree(t, "in two pieces", h, err, h2, err2)
	s = scanner{maxMessage: maxHello, maxWire: 1 << 30}
	err2 = ErrIncomplete
	for i := 0; i <= len(stream) && err2 == ErrIncomplete; i++ {
		h2, err2 = s.next(stream[:i])
	}
	agree(t, "byte by byte", h, err, h2, err2)

	// The same message in other records.
	if err == nil {
		again := refragment(stream, h.Length, cut%maxPlaintext+1)
		h2, err := Parse(again)
		if err != nil || !same(h, h2) {
			t.Fatalf("in records of %d bytes: %+v, %v; before: %+v", cut%maxPlaintext+1, h2, err, h)
		}
	}
}

// read reports whether name is what is read of raw, where crypto/tls passes on what RFC 6066 forbids: a name with a port
// is that name, and an address is none.
func read(name, raw string) bool {
	if name != "" {
		port, ok := strings.CutPrefix(strings.ToLower(raw), name)
		port = strings.TrimPrefix(port, ".")
		_, err := strconv.ParseUint(strings.TrimPrefix(port, ":"), 10, 32)
		return ok && err == nil && port[0] == ':'
	}
	host := strings.TrimSuffix(raw, ".")
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = strings.TrimSuffix(h, ".")
	}
	_, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil || number([]byte(strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])))
}

func agree(t *testing.T, how string, h Hello, err error, h2 Hello, err2 error) {
	t.Helper()
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	if !same(h, h2) || h.Length != h2.Length || text(err) != text(err2) {
		t.Fatalf("%s: %+v, %v; at once: %+v, %v", how, h2, err2, h, err)
	}
}

// sound checks what Hello promises.
func sound(t *testing.T, h Hello, stream []byte) {
	if h.Length <= 0 || h.Length > len(stream) {
		t.Fatalf("a length of %d in %d bytes", h.Length, len(stream))
	}
	if h.ServerName != "" {
		if again, problem := hostName([]byte(h.ServerName)); again != h.ServerName {
			t.Fatalf("%q is not canonical: %q %s", h.ServerName, again, problem)
		}
	}
	if slices.Contains(h.ALPN, "") {
		t.Fatal("an empty ALPN protocol")
	}
}

// stricter reports whether err is one of the differences from crypto/tls that the package's comment names.
func stricter(stream []byte, info *tls.ClientHelloInfo, err error) bool {
	var r *RejectError
	switch {
	case err == ErrNotTLS:
		return stream[1] != 3
	case !errors.As(err, &r):
		return false
	case r.Alert == AlertProtocolVersion:
		return true // what crypto/tls does about it comes after our question to it
	case r.Alert == AlertUnexpectedMessage:
		return strings.Contains(r.Reason, "record") && !strings.Contains(r.Reason, "empty") // an alert in front or between
	case r.Alert == AlertIllegalParameter && info.ServerName != "":
		_, problem := hostName([]byte(info.ServerName))
		return problem == r.Reason
	}
	return false
}
