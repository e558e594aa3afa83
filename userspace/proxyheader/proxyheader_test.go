package proxyheader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// v2 is a header of version 2 by hand.
func v2(command, family byte, block ...string) []byte {
	body := strings.Join(block, "")
	b := append(bytes.Clone(signatureV2), command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

func tlv(typ byte, value string) string {
	return string(append(binary.BigEndian.AppendUint16([]byte{typ}, uint16(len(value))), value...))
}

const (
	v4block = "\xc0\x00\x02\x01\xc6\x33\x64\x02\x30\x39\x01\xbb"
	v6block = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x30\x39\x01\xbb"
)

var (
	v4 = Header{Source: ap("192.0.2.1:12345"), Destination: ap("198.51.100.2:443")}
	v6 = Header{Source: ap("[2001:db8::1]:12345"), Destination: ap("[2001:db8::2]:443")}
)

func with(h Header, name, alpn, id string) Header {
	h.ServerName, h.ALPN, h.ID = name, alpn, id
	return h
}

// script is a connection that plays a stream, step bytes a read (0: all there is), and then ends.
type script struct {
	net.Conn
	rest []byte
	step int
}

func (s *script) Read(b []byte) (int, error) {
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

func (s *script) SetReadDeadline(time.Time) error { return nil }

// readAll reads the header of a stream, and everything after it.
func readAll(stream []byte, maxBytes, step int) (h *Header, rest []byte, err error) {
	c := &script{rest: stream, step: step}
	h, rest, err = Read(c, nil, maxBytes, 0)
	return h, append(bytes.Clone(rest), c.rest...), err
}

// checkCut reads a stream of which the first bytes have been read before, up to cut, and compares with what
// is read of all of it; and it asks Parse what they say.
func checkCut(t *testing.T, stream []byte, cut int, h *Header, rest []byte, err error) {
	t.Helper()
	c := &script{rest: stream[cut:]}
	h2, rest2, err2 := Read(c, stream[:cut], 0, 0)
	rest2 = append(bytes.Clone(rest2), c.rest...)
	if (h == nil) != (h2 == nil) || h != nil && *h != *h2 || !bytes.Equal(rest, rest2) || text(err) != text(err2) {
		t.Errorf("all: %+v, %d bytes, %v; after the first %d bytes: %+v, %d bytes, %v", h, len(rest), err, cut, h2, len(rest2), err2)
	}
	p, n, err2 := Parse(stream[:cut], 0)
	switch {
	case err2 == ErrIncomplete && p == nil && n == 0:
		if h != nil && cut >= len(stream)-len(rest) {
			t.Errorf("the first %d bytes of a header of %d are not enough", cut, len(stream)-len(rest))
		}
	case (h == nil) != (p == nil) || h != nil && *h != *p || h != nil && n != len(stream)-len(rest) || h == nil && n != 0 || text(err) != text(err2):
		t.Errorf("all: %+v, %v; the first %d bytes: %+v, %d, %v", h, err, cut, p, n, err2)
	}
}

func TestRead(t *testing.T) {
	withCRC := func(damage int) []byte {
		b := v2(0x21, 0x11, v4block, tlv(3, "\x00\x00\x00\x00"), tlv(2, "example.org"))
		sum := crc32.Checksum(b, castagnoli)
		binary.BigEndian.PutUint32(b[16+12+3:], sum)
		b[17] ^= byte(damage)
		return b
	}
	good := []struct {
		name   string
		header []byte
		want   Header
	}{
		{"v1 tcp4", []byte("PROXY TCP4 192.0.2.1 198.51.100.2 12345 443\r\n"), v4},
		{"v1 tcp6", []byte("PROXY TCP6 2001:db8::1 2001:db8::2 12345 443\r\n"), v6},
		{"v1 tcp6 with mapped addresses", []byte("PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 12345 443\r\n"), v4},
		{"v1 tcp4 to an IPv6 address", []byte("PROXY TCP4 192.0.2.1 2001:db8::2 12345 443\r\n"), Header{Source: v4.Source, Destination: v6.Destination}},
		{"v1 tcp6 to an IPv4 address", []byte("PROXY TCP6 2001:db8::1 198.51.100.2 12345 443\r\n"), Header{Source: v6.Source, Destination: v4.Destination}},
		{"v1 tcp6 from an IPv4 address", []byte("PROXY TCP6 192.0.2.1 2001:db8::2 12345 443\r\n"), Header{Source: v4.Source, Destination: v6.Destination}},
		{"v1 tcp4 from an IPv6 address", []byte("PROXY TCP4 2001:db8::1 198.51.100.2 12345 443\r\n"), Header{Source: v6.Source, Destination: v4.Destination}},
		{"v1 tcp4 to a mapped address", []byte("PROXY TCP4 192.0.2.1 ::ffff:198.51.100.2 12345 443\r\n"), v4},
		{"v1 tcp4 to a unix socket", []byte("PROXY TCP4 192.0.2.1 unix:/run/x.sock 12345 0\r\n"), Header{Source: v4.Source}},
		{"v1 tcp6 to a unix socket", []byte("PROXY TCP6 2001:db8::1 unix: 12345 0\r\n"), Header{Source: v6.Source}},
		{"v1 unknown", []byte("PROXY UNKNOWN\r\n"), Header{}},
		{"v1 unknown with the longest tail", []byte("PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n"), Header{}},
		{"v2 tcp4", v2(0x21, 0x11, v4block), v4},
		{"v2 tcp6", v2(0x21, 0x21, v6block), v6},
		{"v2 udp4, as haproxy for quic", v2(0x21, 0x12, v4block), v4},
		{"v2 unix", v2(0x21, 0x31, strings.Repeat("/", 216), tlv(5, "id")), Header{ID: "id"}},
		{"v2 local", v2(0x20, 0x00), Header{Local: true}},
		{"v2 local with addresses, to be ignored", v2(0x20, 0x11, v4block, tlv(5, "id")), Header{Local: true, ID: "id"}},
		{"v2 local with a short block", v2(0x20, 0x11, "abc"), Header{Local: true}},
		{"v2 local with what is no TLV", v2(0x20, 0x00, "\x05\xff"), Header{Local: true}},
		{"v2 without addresses", v2(0x21, 0x00, tlv(2, "a.b")), Header{ServerName: "a.b"}},
		{"v2 unknown destination", v2(0x21, 0x11, "\xc0\x00\x02\x01\x00\x00\x00\x00\x30\x39\x00\x00"), Header{Source: v4.Source}},
		{"v2 destination without a port", v2(0x21, 0x11, "\xc0\x00\x02\x01\xc6\x33\x64\x02\x30\x39\x00\x00"), Header{Source: v4.Source, Destination: ap("198.51.100.2:0")}},
		{"v2 destination with a port alone", v2(0x21, 0x11, "\xc0\x00\x02\x01\x00\x00\x00\x00\x30\x39\x01\xbb"), Header{Source: v4.Source, Destination: ap("0.0.0.0:443")}},
		{"tlvs", v2(0x21, 0x11, v4block, tlv(1, "h2"), tlv(2, "Example.ORG."), tlv(5, "7F000001:8296_7F00001E:1F90_4F7B0A69_0003:790E")),
			with(v4, "example.org", "h2", "7F000001:8296_7F00001E:1F90_4F7B0A69_0003:790E")},
		{"other tlvs", v2(0x21, 0x11, v4block, tlv(0x20, "\x01\x00\x00\x00\x00"), tlv(4, "\x00\x00\x00"), tlv(0xee, ""), tlv(5, "id"), tlv(0x30, "ns")), with(v4, "", "", "id")},
		{"the first of two counts", v2(0x21, 0x11, v4block, tlv(2, "a.b"), tlv(2, "c.d")), with(v4, "a.b", "", "")},
		{"the first good one counts", v2(0x21, 0x11, v4block, tlv(2, "192.0.2.1"), tlv(2, "c.d")), with(v4, "c.d", "", "")},
		{"tlvs that are no good", v2(0x21, 0x11, v4block, tlv(1, "\x0a\x0a"), tlv(2, "a b"), tlv(5, strings.Repeat("x", 129))), v4},
		{"no newline gets into a log", v2(0x21, 0x11, v4block, tlv(1, "h2\n"), tlv(2, "a.b\n"), tlv(5, "id\nid")), v4},
		{"the longest values", v2(0x21, 0x11, v4block, tlv(1, strings.Repeat("x", 255)), tlv(5, strings.Repeat("x", 128))), with(v4, "", strings.Repeat("x", 255), strings.Repeat("x", 128))},
		{"checksum", withCRC(0), with(v4, "example.org", "", "")},
	}
	for _, tt := range good {
		t.Run(tt.name, func(t *testing.T) {
			for _, follow := range []string{"", "\x16\x03\x01", "PROXY TCP4 192.0.2.9 192.0.2.9 1 1\r\n", strings.Repeat("x", 10000)} {
				for _, step := range []int{1, 13, 0} {
					h, rest, err := readAll(append(bytes.Clone(tt.header), follow...), 0, step)
					if err != nil || h == nil || *h != tt.want {
						t.Fatalf("%d bytes at a time: got %+v, %v; want %+v", step, h, err, tt.want)
					}
					if string(rest) != follow {
						t.Fatalf("%d bytes at a time: %.40q follows, want %.40q", step, rest, follow)
					}
				}
			}
		})
	}

	bad := []struct {
		name   string
		stream []byte
		want   string
	}{
		{"v1 line too long", []byte("PROXY UNKNOWN " + strings.Repeat("x", 200)), "107"},
		{"v1 line of 108 bytes", []byte("PROXY UNKNOWN " + strings.Repeat("x", 92) + "\r\n"), "107"},
		{"v1 without CR", []byte("PROXY UNKNOWN\n"), `\r\n`},
		{"v1 udp", []byte("PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n"), "protocol"},
		{"v1 lower case", []byte("PROXY tcp4 192.0.2.1 198.51.100.2 1 2\r\n"), "protocol"},
		{"v1 bad address", []byte("PROXY TCP4 192.0.2.256 198.51.100.2 1 2\r\n"), "address"},
		{"v1 wrong family", []byte("PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n"), "address"},
		{"v1 wrong family, IPv4", []byte("PROXY TCP6 192.0.2.1 198.51.100.2 1 2\r\n"), "address"},
		{"v1 bad address beside one of another family", []byte("PROXY TCP4 192.0.2.1 2001:db8::2%eth0 1 2\r\n"), "address"},
		{"v1 bad port beside addresses of two families", []byte("PROXY TCP4 192.0.2.1 2001:db8::2 1 65536\r\n"), "port"},
		{"v1 from a unix socket", []byte("PROXY TCP4 unix: 192.0.2.1 0 1\r\n"), "address"},
		{"v1 says what came", []byte("PROXY TCP4 192.0.2.1 x\x1b[1m 1 2\r\n"), `"PROXY TCP4 192.0.2.1 x\x1b[1m 1 2\r\n"`},
		{"v1 too long says what came", []byte("PROXY UNKNOWN " + strings.Repeat("x", 200)), `"PROXY UNKNOWN xxx`},
		{"v1 bad port", []byte("PROXY TCP4 192.0.2.1 198.51.100.2 1 65536\r\n"), "port"},
		{"v1 too few words", []byte("PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n"), "protocol"},
		{"v1 nothing else", []byte("PROXY \r\n"), "protocol"},
		{"v2 version 1", v2(0x11, 0x11, v4block), "version and command"},
		{"v2 command 2", v2(0x22, 0x11, v4block), "version and command"},
		{"v2 unknown family", v2(0x21, 0x41, v4block), "family"},
		{"v2 unknown transport", v2(0x21, 0x13, v4block), "family"},
		{"v2 family without a transport", v2(0x21, 0x10, v4block), "family"},
		{"v2 local of an unknown family", v2(0x20, 0x41), "family"},
		{"v2 short addresses", v2(0x21, 0x11, v4block[:11]), "length"},
		{"v2 short tlv", v2(0x21, 0x11, v4block, "\x02\x00"), "TLV"},
		{"v2 tlv that goes on", v2(0x21, 0x11, v4block, "\x02\x00\x09a.b"), "TLV"},
		{"v2 tlv that goes on for a byte", v2(0x21, 0x11, v4block, "\x02\x00\x04a.b"), "TLV"},
		{"v2 too long", v2(0x21, 0x11, v4block, tlv(4, strings.Repeat("x", 5000))), "5031 bytes long, more than the limit of 4112"},
		{"checksum wrong", withCRC(1), "checksum"},
		{"checksum of a wrong size", v2(0x21, 0x11, v4block, tlv(3, "\x00")), "checksum"},
	}
	for _, tt := range bad {
		t.Run(tt.name, func(t *testing.T) {
			for _, step := range []int{1, 0} {
				h, rest, err := readAll(tt.stream, 0, step)
				var invalid *InvalidError
				if h != nil || !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%d bytes at a time: got %+v, %v; want an error about %q", step, h, err, tt.want)
				}
				if !bytes.Equal(rest, tt.stream) {
					t.Errorf("%d bytes at a time: the bytes that were read are lost", step)
				}
				for cut := range len(tt.stream) + 1 {
					checkCut(t, tt.stream, cut, h, rest, err)
				}
			}
		})
	}

	none := []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x10", "PROXYTCP4", "PROX\r\n", "\r\n\r\n\x00\r\nQUIT\r", "\r\n", "P", "\r\n\r\n", "PROXY"}
	for _, stream := range none {
		for _, step := range []int{1, 0} {
			h, rest, err := readAll([]byte(stream), 0, step)
			if h != nil || err != nil || string(rest) != stream {
				t.Errorf("%q: got %+v, %q, %v; want no header and no error", stream, h, rest, err)
			}
			for cut := range len(stream) + 1 {
				checkCut(t, []byte(stream), cut, h, rest, err)
			}
		}
	}
}

func TestReadLimit(t *testing.T) {
	header := with(v4, "example.org", "h2", "id").Append(nil)
	for _, step := range []int{1, 0} {
		if _, _, err := readAll(header, len(header), step); err != nil {
			t.Errorf("the limit is the header's length: %v", err)
		}
		if _, _, err := readAll(header, len(header)-1, step); err == nil || !strings.Contains(err.Error(), "limit") {
			t.Errorf("the limit is less than the header's length: %v", err)
		}
	}
	// The longest that any limit allows, more than the first buffer holds.
	long := v2(0x21, 0x11, v4block, tlv(5, "id"), tlv(4, strings.Repeat("x", 4096-12-5-3)))
	if len(long) != MaxBytes {
		t.Fatalf("%d bytes", len(long))
	}
	for _, step := range []int{1, 1000, 0} {
		h, rest, err := readAll(append(bytes.Clone(long), "rest"...), 1<<20, step)
		if err != nil || h.ID != "id" || string(rest) != "rest" {
			t.Errorf("%d bytes at a time: %+v, %q, %v", step, h, rest, err)
		}
	}
}

func TestReadSocket(t *testing.T) {
	tests := []struct {
		name   string
		client func(*net.TCPConn)
		want   error
		rest   string
	}{
		{"nothing, then a close", func(c *net.TCPConn) { c.Close() }, ErrEOF, ""},
		{"nothing, then a reset", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, ErrEOF, ""},
		{"half a header, then a close", func(c *net.TCPConn) { c.Write([]byte("PROXY TCP4 ")); c.Close() }, io.ErrUnexpectedEOF, "PROXY TCP4 "},
		{"one byte that begins no header", func(c *net.TCPConn) { c.Write([]byte("G")) }, nil, "G"},
		{"a header", func(c *net.TCPConn) { c.Write(append(v4.Append(nil), "rest"...)) }, nil, "rest"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			client, server := pair(t)
			done := make(chan struct{})
			go func() { defer close(done); tt.client(client) }()
			_, rest, err := Read(server, nil, 0, patience)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if string(rest) != tt.rest {
				t.Errorf("rest %q, want %q", rest, tt.rest)
			}
			server.Close()
			client.Close()
			<-done
		})
	}
}

// TestReadTimeout: the timeout is for all of the header, and none is left after it, by a clock that moves
// only while everybody waits.
func TestReadTimeout(t *testing.T) {
	const timeout = 300 * time.Millisecond
	slow := string(v4.Append(nil))
	for _, tt := range []struct {
		name  string
		sent  string
		pause time.Duration // before each byte
		want  error
		rest  string
	}{
		{"silence", "", 0, ErrTimeout, ""},
		{"half a signature, then silence", "PRO", 0, ErrTimeout, "PRO"},
		{"half a header, then silence", "PROXY TCP4 ", 0, ErrTimeout, "PROXY TCP4 "},
		{"a byte now and then", slow, timeout/15 + 1, ErrTimeout, slow[:14]},
		{"one byte that begins no header", "G", 0, nil, "G"},
		{"a header", string(v4.Append(nil)), 0, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				var sending sync.WaitGroup
				defer sending.Wait()
				defer server.Close()
				sending.Go(func() {
					for i := range len(tt.sent) {
						time.Sleep(tt.pause)
						if _, err := client.Write([]byte{tt.sent[i]}); err != nil {
							return
						}
					}
					time.Sleep(2 * timeout)
					client.Write([]byte("x"))
				})
				start := time.Now()
				_, rest, err := Read(server, nil, 0, timeout)
				if !errors.Is(err, tt.want) || string(rest) != tt.rest {
					t.Errorf("got %v, %q; want %v, %q", err, rest, tt.want, tt.rest)
				}
				if d := time.Since(start); err != nil && d != timeout {
					t.Errorf("took %v, the timeout is %v", d, timeout)
				}
				if err == nil {
					if _, err := server.Read(make([]byte, 1)); err != nil {
						t.Errorf("the next read: %v", err)
					}
				}
			})
		})
	}
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

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

func TestAppend(t *testing.T) {
	tests := []struct {
		name string
		h    Header
		want []byte
		back Header
	}{
		{"nothing", Header{}, v2(0x21, 0x11, strings.Repeat("\x00", 12)), Header{}},
		{"tcp4", v4, v2(0x21, 0x11, v4block), v4},
		{"tcp6", v6, v2(0x21, 0x21, v6block), v6},
		{"tlvs", with(v4, "example.org", "h2", "id"), v2(0x21, 0x11, v4block, tlv(1, "h2"), tlv(2, "example.org"), tlv(5, "id")), with(v4, "example.org", "h2", "id")},
		{"local", Header{Local: true, Source: v4.Source, Destination: v4.Destination, ID: "id"}, v2(0x20, 0x00, tlv(5, "id")), Header{Local: true, ID: "id"}},
		{"mapped and zoned", Header{Source: ap("[::ffff:192.0.2.1]:12345"), Destination: ap("[::ffff:198.51.100.2]:443")}, v2(0x21, 0x11, v4block), v4},
		{"zone", Header{Source: ap("[2001:db8::1%eth0]:12345"), Destination: v6.Destination}, v2(0x21, 0x21, v6block), v6},
		{"mixed", Header{Source: v4.Source, Destination: v6.Destination},
			v2(0x21, 0x21, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01"+v6block[16:]), Header{Source: v4.Source, Destination: v6.Destination}},
		{"mixed the other way", Header{Source: v6.Source, Destination: v4.Destination},
			v2(0x21, 0x21, v6block[:16]+"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc6\x33\x64\x02"+v6block[32:]), Header{Source: v6.Source, Destination: v4.Destination}},
		{"no destination", Header{Source: v4.Source}, v2(0x21, 0x11, "\xc0\x00\x02\x01\x00\x00\x00\x00\x30\x39\x00\x00"), Header{Source: v4.Source}},
		{"no destination, ipv6", Header{Source: v6.Source}, v2(0x21, 0x21, v6block[:16]+strings.Repeat("\x00", 16)+"\x30\x39\x00\x00"), Header{Source: v6.Source}},
		{"a destination that says nothing", Header{Source: v6.Source, Destination: ap("0.0.0.0:0")}, v2(0x21, 0x21, v6block[:16]+strings.Repeat("\x00", 16)+"\x30\x39\x00\x00"), Header{Source: v6.Source}},
		{"no source", Header{Destination: v4.Destination, ServerName: "a.b"}, v2(0x21, 0x11, strings.Repeat("\x00", 12), tlv(2, "a.b")), Header{ServerName: "a.b"}},
		{"text that is no good", with(v4, "a b", "\n", strings.Repeat("x", 129)), v2(0x21, 0x11, v4block), v4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.h.Append([]byte("before"))
			if want := append([]byte("before"), tt.want...); !bytes.Equal(got, want) {
				t.Errorf("got  %x\nwant %x", got, want)
			}
			h, rest, err := readAll(got[6:], 0, 0)
			if err != nil || *h != tt.back || len(rest) > 0 {
				t.Errorf("read back: %+v, %v; want %+v", h, err, tt.back)
			}
		})
	}
}

func TestSniff(t *testing.T) {
	for _, s := range []string{"PROXY TCP4", "\r\n\r\n\x00\r\nQUIT\n!"} {
		sig := len("PROXY ")
		if s[0] == '\r' {
			sig = 12
		}
		for i := range len(s) + 1 {
			want := isUnclear
			if i >= sig {
				want = isHeader
			}
			if got := sniff([]byte(s[:i])); got != want {
				t.Errorf("%q: %v, want %v", s[:i], got, want)
			}
			if i > 0 && i <= sig {
				b := []byte(s[:i])
				b[i-1] ^= 0x20
				if got := sniff(b); got != isOther {
					t.Errorf("%q: %v, want no", b, got)
				}
			}
		}
	}
}

func TestAuthority(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("b", 61)
	for in, want := range map[string]string{
		"a": "a", "Example.ORG": "example.org", "a.b.": "a.b", "xn--bcher-kva.example": "xn--bcher-kva.example", "my_app.example": "my_app.example",
		"1.example": "1.example", long: long, long + ".": long,
		"": "", ".": "", "..": "", "a..b": "", ".a": "", "-a.b": "", "a-.b": "", "a.1": "", "a.0x1f": "", "0x1f.b": "0x1f.b", "a.0xzz": "a.0xzz", "a.1f": "a.1f", "a.b-": "", "192.0.2.1": "", "127.1": "", "1": "", "::1": "", "[::1]": "", "a:443": "",
		"a/b": "", "*.a": "", "a b": "", "b\xfccher": "", "\u212aelvin.example": "", "a\x00": "", long + "b": "", strings.Repeat("a", 64): "", strings.Repeat("a", 64) + ".b": "",
	} {
		if got := authority([]byte(in)); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestUniqueID(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "a": "a", "0191-af:b_c/d=e+f~": "0191-af:b_c/d=e+f~", "a b": "", "a\"": "", "a,b": "", "a;b": "", `a\b`: "", "a\n": "", "\x7f": "", "é": "",
		strings.Repeat("x", 128): strings.Repeat("x", 128), strings.Repeat("x", 129): "",
	} {
		if got := uniqueID([]byte(in)); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(with(v4, "example.org", "h2", "id").Append(nil), uint16(20))
	f.Add(append(v6.Append(nil), "rest"...), uint16(3))
	f.Add(Header{}.Append(nil), uint16(0))
	f.Add([]byte("PROXY TCP4 192.0.2.1 198.51.100.2 12345 443\r\nrest"), uint16(7))
	f.Add([]byte("PROXY UNKNOWN\r\n"), uint16(1))
	f.Add(v2(0x21, 0x00, tlv(2, "a.b")), uint16(1))
	f.Add(v2(0x21, 0x31, strings.Repeat("/", 216), tlv(5, "id")), uint16(1))
	f.Add(v2(0x20, 0x11, "abc"), uint16(1))
	f.Add(v2(0x21, 0x11, v4block, tlv(3, "\x00\x00\x00\x00")), uint16(1))
	f.Fuzz(func(t *testing.T, stream []byte, step uint16) {
		h, rest, err := readAll(stream, 0, 0)
		h2, rest2, err2 := readAll(stream, 0, int(step)+1)
		if (h == nil) != (h2 == nil) || h != nil && *h != *h2 || !bytes.Equal(rest, rest2) || text(err) != text(err2) {
			t.Fatalf("at once: %+v, %d bytes, %v; %d bytes at a time: %+v, %d bytes, %v", h, len(rest), err, int(step)+1, h2, len(rest2), err2)
		}
		checkCut(t, stream, int(step)%(len(stream)+1), h, rest, err)
		if !bytes.HasSuffix(stream, rest) || (h == nil && len(rest) != len(stream)) {
			t.Fatal("bytes were lost")
		}
		if h == nil {
			if err == nil && sniff(stream) == isHeader {
				t.Fatal("a header was not seen")
			}
			return
		}
		if err != nil {
			t.Fatalf("both a header and %v", err)
		}
		// What was understood survives being passed on, but for a destination without a source.
		want := *h
		if !want.Source.IsValid() {
			want.Destination = netip.AddrPort{}
		}
		h3, rest3, err := readAll(h.Append(nil), 0, 0)
		if err != nil || *h3 != want || len(rest3) > 0 {
			t.Fatalf("passed on: %+v, %v; want %+v", h3, err, want)
		}
	})
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// FuzzAppend: any header that can be written can be read, and says the same.
func FuzzAppend(f *testing.F) {
	f.Add([]byte{192, 0, 2, 1}, []byte{198, 51, 100, 2}, uint16(1), uint16(2), false, "a.b", "h2", "id")
	f.Add(make([]byte, 16), []byte{1, 2, 3, 4}, uint16(0), uint16(0), true, "", "\x00", strings.Repeat("x", 300))
	f.Add([]byte("\x20\x01\x0d\xb8            "), make([]byte, 4), uint16(89), uint16(0), false, "", "", "")
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x00\x00\x00\x00"), make([]byte, 4), uint16(0), uint16(1), false, "", "", "")
	f.Fuzz(func(t *testing.T, src, dst []byte, sport, dport uint16, local bool, name, alpn, id string) {
		s, _ := netip.AddrFromSlice(src)
		d, _ := netip.AddrFromSlice(dst)
		h := Header{Source: netip.AddrPortFrom(s, sport), Destination: netip.AddrPortFrom(d, dport), Local: local, ServerName: name, ALPN: alpn, ID: id}
		wire := h.Append(nil)
		got, rest, err := readAll(wire, 0, 0)
		if err != nil || len(rest) > 0 || len(wire) > MaxBytes {
			t.Fatalf("%+v: %v", h, err)
		}
		if source := plain(h.Source); !local && !unknown(source) && got.Source != source {
			t.Fatalf("source %v, want %v", got.Source, h.Source)
		}
		if again := got.Append(nil); !bytes.Equal(again, wire) {
			t.Fatalf("written %x, read and written again %x", wire, again)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	stream := append(with(v4, "example.org", "h2", "0191e3b6c1d27a3f").Append(nil), make([]byte, 1800)...)
	b.ReportAllocs()
	c := new(script)
	for b.Loop() {
		*c = script{rest: stream}
		if h, _, err := Read(c, nil, 0, 0); err != nil || h == nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadNone(b *testing.B) {
	stream := make([]byte, 1800)
	b.ReportAllocs()
	c := new(script)
	for b.Loop() {
		*c = script{rest: stream}
		if h, _, err := Read(c, nil, 0, 0); err != nil || h != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	h := with(v4, "example.org", "h2", "0191e3b6c1d27a3f")
	buf := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		buf = h.Append(buf[:0])
	}
}

func BenchmarkParse(b *testing.B) {
	header := v4.Append(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Parse(header, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func (v verdict) String() string {
	switch v {
	case isUnclear:
		return "more"
	case isHeader:
		return "yes"
	}
	return "no"
}
