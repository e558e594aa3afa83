package sni

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	many := builder{}.serverName("a.b")
	for i := range 16000 {
		if i != extServerName && i != extALPN && i != extSupportedVersions {
			many = many.ext(i, nil)
		}
	}
	tests := []struct {
		name string
		msg  []byte
		want Hello
	}{
		{"ends before the extensions", message(0x303, nil), Hello{}},
		{"no extensions", message(0x303, builder{}), Hello{}},
		{"a version of the future without supported_versions is TLS 1.2", message(0x399, nil), Hello{}},
		{"tls 1.0", message(0x301, nil), Hello{}},
		{"case", message(0x303, builder{}.serverName("WwW.ExAmPlE.oRg")), Hello{ServerName: "www.example.org"}},
		{"trailing dot", message(0x303, builder{}.serverName("www.example.org.")), Hello{ServerName: "www.example.org", FinalDot: true}},
		{"port", message(0x303, builder{}.serverName("www.example.org:8443")), Hello{ServerName: "www.example.org"}},
		{"ipv4", message(0x303, builder{}.serverName("192.0.2.1")), Hello{}},
		{"ipv6", message(0x303, builder{}.serverName("2001:db8::1")), Hello{}},
		{"a-label", message(0x303, builder{}.serverName("xn--bcher-kva.example")), Hello{ServerName: "xn--bcher-kva.example"}},
		{"another name type in front", message(0x303, builder{}.ext(extServerName, []byte("\x00\x0b\x01\x00\x02xx\x00\x00\x03a.b"))), Hello{ServerName: "a.b"}},
		{"only another name type", message(0x303, builder{}.ext(extServerName, []byte("\x00\x05\x01\x00\x02xx"))), Hello{}},
		{"unknown extensions", message(0x303, builder{}.ext(0x7777, []byte("?")).serverName("a.b").ext(0x8888, nil)), Hello{ServerName: "a.b"}},
		{"grease", message(0x303, builder{}.ext(0x1a1a, nil).versions(0x2a2a, 0x304, 0x303).serverName("a.b").alpn("\xda\xda", "h2").ext(0xfafa, []byte{0})),
			Hello{ServerName: "a.b", ALPN: []string{"\xda\xda", "h2"}}},
		{"versions in no usual order", message(0x303, builder{}.versions(0x303, 0x304)), Hello{}},
		{"a version that nobody knows", message(0x303, builder{}.versions(0x305, 0x304, 0x7f1c)), Hello{}},
		{"a version in the middle that nobody knows", message(0x303, builder{}.versions(0x304, 0x7f1c, 0x303)), Hello{}},
		{"a version in the middle, then the usual order", message(0x303, builder{}.versions(0x304, 0x7f1c, 0x302)), Hello{}},
		{"versions twice", message(0x303, builder{}.versions(0x301, 0x301)), Hello{}},
		{"nothing but grease", message(0x303, builder{}.versions(0x2a2a)), Hello{}},
		{"ech", message(0x303, builder{}.serverName("public.example").ext(0xfe0d, []byte{0})), Hello{ServerName: "public.example"}},
		{"16,000 extensions", message(0x303, many), Hello{ServerName: "a.b"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, n := range []int{maxPlaintext, 1, 5} {
				stream := records(tt.msg, n)
				tt.want.Length = len(stream)
				// Bytes that follow change nothing.
				for _, more := range []string{"", "\x17\x03\x03\x00\x01x", "garbage"} {
					h, err := Parse(append(bytes.Clone(stream), more...))
					if err != nil || !same(h, tt.want) || h.Length != len(stream) {
						t.Fatalf("records of %d bytes: got %+v, %v; want %+v", n, h, err, tt.want)
					}
				}
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	good := message(0x303, builder{}.serverName("a.b"))
	ext := func(e builder) []byte { return records(message(0x303, e), maxPlaintext) }
	cut := func(n int) []byte { return records(handshake(typeClientHello, good[messageHeaderLen:n]), maxPlaintext) }
	name := func(s string) []byte { return ext(builder{}.serverName(s)) }
	edit := func(i int, v byte) []byte {
		b := records(good, maxPlaintext)
		b[i] = v
		return b
	}
	tests := []struct {
		name   string
		stream []byte
		alert  uint8 // 0: ErrNotTLS
		reason string
	}{
		{"http", []byte("GET / HTTP/1.1\r\n\r\n"), 0, ""},
		{"ssh", []byte("SSH-2.0-OpenSSH_9.2\r\n"), 0, ""},
		{"a PROXY header", []byte("PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"), 0, ""},
		{"a PROXY header of version 2", []byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"), 0, ""},
		{"an SSLv2 hello", []byte("\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10"), 0, ""},
		{"dtls", []byte("\x16\xfe\xfd\x00\x00"), 0, ""},
		{"zeros", make([]byte, 10), 0, ""},
		{"version 2 in the record", edit(1, 2), 0, ""},
		{"version 4 in the record", edit(1, 4), 0, ""},
		{"record type 19", edit(0, 19), 0, ""},
		{"record type 25", edit(0, 25), 0, ""},

		{"an alert", []byte("\x15\x03\x01\x00\x02\x01\x00"), AlertUnexpectedMessage, "first record"},
		{"application data", []byte("\x17\x03\x03\x00\x01x"), AlertUnexpectedMessage, "first record"},
		{"an empty record", []byte("\x16\x03\x01\x00\x00"), AlertUnexpectedMessage, "empty"},
		{"an empty record between two", append(records(good[:20], 20), "\x16\x03\x01\x00\x00"...), AlertUnexpectedMessage, "empty"},
		{"an alert between two", append(records(good[:20], 20), "\x15\x03\x01\x00\x02\x01\x00"...), AlertUnexpectedMessage, "mixed"},
		{"change_cipher_spec between two", append(records(good[:20], 20), "\x14\x03\x01\x00\x01\x01"...), AlertUnexpectedMessage, "mixed"},
		{"a record too long", []byte("\x16\x03\x01\x40\x01"), AlertRecordOverflow, "16384"},
		{"a ServerHello", records(handshake(2, good[4:]), maxPlaintext), AlertUnexpectedMessage, "no ClientHello"},
		{"a HelloRequest", records(handshake(0, nil), maxPlaintext), AlertUnexpectedMessage, "no ClientHello"},
		{"16 MiB", []byte("\x16\x03\x01\x00\x04\x01\xff\xff\xff"), AlertDecodeError, "longer than any"},

		{"no body", cut(4), AlertDecodeError, "version"},
		{"half a version", cut(5), AlertDecodeError, "version"},
		{"no random", cut(6), AlertDecodeError, "random"},
		{"half a random", cut(37), AlertDecodeError, "random"},
		{"no session id", cut(38), AlertDecodeError, "session id"},
		{"half a session id", cut(50), AlertDecodeError, "session id"},
		{"no cipher suites", cut(71), AlertDecodeError, "cipher suites"},
		{"half the cipher suites", cut(75), AlertDecodeError, "cipher suites"},
		{"no compression methods", cut(77), AlertDecodeError, "compression"},
		{"half the length of the extensions", cut(80), AlertDecodeError, "extensions' length"},
		{"half the extensions", cut(len(good) - 1), AlertDecodeError, "extensions' length"},
		{"bytes after the extensions", records(handshake(typeClientHello, append(bytes.Clone(good[4:]), 0)), maxPlaintext), AlertDecodeError, "extensions' length"},
		{"ssl 3.0", records(message(0x300, nil), maxPlaintext), AlertProtocolVersion, "SSL 3.0"},
		{"ssl 3.0 that says tls 1.3", records(message(0x300, builder{}.versions(0x304)), maxPlaintext), AlertProtocolVersion, "SSL 3.0"},
		{"version 2", records(message(0x200, nil), maxPlaintext), AlertProtocolVersion, "SSL 3.0"},

		{"half an extension's type", ext(builder{0}), AlertDecodeError, "ends in its type"},
		{"half an extension's length", ext(builder{0, 0, 0}), AlertDecodeError, "ends in its data"},
		{"half an extension", ext(builder{0, 0, 0, 9, 0}), AlertDecodeError, "ends in its data"},
		{"server_name twice", ext(builder{}.serverName("a.b").serverName("a.b")), AlertIllegalParameter, "twice"},
		{"alpn twice", ext(builder{}.alpn("h2").serverName("a.b").alpn("h2")), AlertIllegalParameter, "twice"},
		{"an unknown extension twice", ext(builder{}.ext(0x9999, nil).serverName("a.b").ext(0x9999, nil)), AlertIllegalParameter, "twice"},
		{"the last of 200 again", ext(sequence(300, 500).ext(499, nil)), AlertIllegalParameter, "twice"},
		{"the first of 200 again", ext(sequence(300, 500).ext(300, nil)), AlertIllegalParameter, "twice"},

		{"server_name without a body", ext(builder{}.ext(extServerName, nil)), AlertDecodeError, "server_name"},
		{"server_name with an empty list", ext(builder{}.ext(extServerName, []byte{0, 0})), AlertDecodeError, "server_name"},
		{"server_name list too long", ext(builder{}.ext(extServerName, []byte("\x00\x07\x00\x00\x03a.b"))), AlertDecodeError, "server_name"},
		{"server_name list too short", ext(builder{}.ext(extServerName, []byte("\x00\x05\x00\x00\x03a.b"))), AlertDecodeError, "server_name"},
		{"bytes after the server_name list", ext(builder{}.ext(extServerName, []byte("\x00\x06\x00\x00\x03a.b?"))), AlertDecodeError, "server_name"},
		{"a name type alone", ext(builder{}.ext(extServerName, []byte("\x00\x01\x00"))), AlertDecodeError, "server_name"},
		{"an empty name", name(""), AlertDecodeError, "empty"},
		{"two names", ext(builder{}.serverName("a.b", "c.d")), AlertIllegalParameter, "more than one"},
		{"the same name twice", ext(builder{}.serverName("a.b", "a.b")), AlertIllegalParameter, "more than one"},

		{"alpn without a body", ext(builder{}.ext(extALPN, nil)), AlertDecodeError, "ALPN"},
		{"alpn with an empty list", ext(builder{}.alpn()), AlertDecodeError, "ALPN"},
		{"alpn with an empty protocol", ext(builder{}.alpn("h2", "")), AlertDecodeError, "ALPN"},
		{"alpn with half a protocol", ext(builder{}.ext(extALPN, []byte("\x00\x02\x02h"))), AlertDecodeError, "ALPN"},
		{"bytes after the alpn list", ext(builder{}.ext(extALPN, []byte("\x00\x03\x02h2?"))), AlertDecodeError, "ALPN"},

		{"supported_versions without a body", ext(builder{}.ext(extSupportedVersions, nil)), AlertDecodeError, "supported_versions"},
		{"supported_versions empty", ext(builder{}.versions()), AlertDecodeError, "supported_versions"},
		{"half a version in supported_versions", ext(builder{}.ext(extSupportedVersions, []byte{1, 3})), AlertDecodeError, "supported_versions"},
		{"bytes after supported_versions", ext(builder{}.ext(extSupportedVersions, []byte{2, 3, 4, 0})), AlertDecodeError, "supported_versions"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse(tt.stream)
			verdict(t, err, tt.alert, tt.reason)
			// The verdict is the same when bytes come one at a time, and when more of them follow.
			_, head, err := Read(&script{rest: append(bytes.Clone(tt.stream), make([]byte, 100)...), step: 1}, nil, 64<<10, time.Second)
			verdict(t, err, tt.alert, tt.reason)
			if len(head) > len(tt.stream) {
				t.Errorf("read %d bytes to refuse %d", len(head), len(tt.stream))
			}
		})
	}
}

func sequence(from, to int) (b builder) {
	for i := from; i < to; i++ {
		b = b.ext(i, nil)
	}
	return b
}

func verdict(t *testing.T, err error, alert uint8, reason string) {
	t.Helper()
	if alert == 0 {
		if err != ErrNotTLS {
			t.Errorf("got %v, want ErrNotTLS", err)
		}
		return
	}
	var r *RejectError
	if !errors.As(err, &r) || r.Alert != alert || !strings.Contains(r.Reason, reason) {
		t.Errorf("got %v, want alert %s for %q", err, alertName(alert), reason)
	}
	if got, ok := AlertFor(fmt.Errorf("in front: %w", err)); !ok || got != alert {
		t.Errorf("AlertFor: %d, %v", got, ok)
	}
}

func TestHostName(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	good := map[string]string{
		"a":                     "a",
		"localhost":             "localhost",
		"Example.ORG":           "example.org",
		"example.org.":          "example.org",
		"a.b.c.d.e.f":           "a.b.c.d.e.f",
		"1.2.3.4.in-addr.arpa":  "1.2.3.4.in-addr.arpa",
		"1and1.de":              "1and1.de",
		"123.example":           "123.example",
		"a--b.example":          "a--b.example",
		"XN--BCHER-KVA.example": "xn--bcher-kva.example",
		"my_app._tcp.example":   "my_app._tcp.example",
		label63 + ".example":    label63 + ".example",
		longName:                longName,
		longName + ".":          longName,
		"0x7f.example":          "0x7f.example",
		"4e6.0xzz":              "4e6.0xzz",
		"1.2.3.4a":              "1.2.3.4a",
		"-a.b":                  "-a.b",
		"A-.b":                  "a-.b",
		"a.-b":                  "a.-b",
		"a.b-":                  "a.b-",
		"A.b:443":               "a.b",
		"a.b.:443":              "a.b",
		longName + ":65535":     longName,

		// Addresses, which are no name.
		"127.0.0.1":        "",
		"127.0.0.1.":       "",
		"127.0.0.1:443":    "",
		"127.1":            "",
		"2130706433":       "",
		"0x7F000001":       "",
		"a.0x1F":           "",
		"0x":               "",
		"::1":              "",
		"[::1]":            "",
		"[::1]:443":        "",
		"2001:DB8::1":      "",
		"fe80::1%eth0":     "",
		"::ffff:127.0.0.1": "",
	}
	for in, want := range good {
		if got, problem := hostName([]byte(in)); got != want || problem != "" {
			t.Errorf("%q: got %q, %q; want %q", in, got, problem, want)
		}
	}
	bad := map[string]string{
		".":                  "empty label",
		"..":                 "empty label",
		".a":                 "empty label",
		"a..b":               "empty label",
		"a.b..":              "empty label",
		label63 + "a.b":      "63 bytes",
		"b." + label63 + "a": "63 bytes",
		longName + "b":       "253 bytes",
		":443":               "empty label",
		"a.b:":               "colon",
		"a.b:http":           "colon",
		"a.b:443.":           "colon",
		"a.b:80:80":          "colon",
		"a.b:123456":         "colon",
		"[::1]:":             "colon",
		"[::1]x":             "colon",
		"[a.b]:443":          "no host name has",
		"::1]":               "colon",
		"a b":                "no host name has",
		"a.b\x00":            "no host name has",
		"a\nb":               "no host name has",
		"*.a.b":              "no host name has",
		"a/b":                "no host name has",
		"bücher.example":     "ASCII",
		"a.b\xff":            "ASCII",
	}
	for in, want := range bad {
		if got, problem := hostName([]byte(in)); got != "" || !strings.Contains(problem, want) {
			t.Errorf("%q: got %q, %q; want %q", in, got, problem, want)
		}
	}
}
