// Package oracle asks real servers what they made of a request that came through the daemon. It has a grammar
// of requests, right and wrong ones, a client that sends them as bytes of HTTP/1.1 and as frames of HTTP/2,
// and in its tests the servers, and what must hold of all that they answer.
//
// Its files:
//
//	message.go  a request, as HTTP/1.1 and as HTTP/2
//	grammar.go  requests that are wrong in all ways
//	seeds.go    requests that others found
//	choices.go  where the grammar's choices come from
//	conn.go     a connection that requests are sent on
package oracle

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Field is one field of a header section, or a trailer.
type Field struct{ Name, Value string }

// Message is a request, whatever is wrong with it.
type Message struct {
	Method string
	Target string // the request-target, and :path
	// Hosts are the values of Host. In HTTP/2 the first is :authority, and all others are fields called host.
	Hosts   []string
	Fields  []Field
	Body    []byte  // nil for none
	Chunked bool    // the body's framing in HTTP/1.1, else it is Content-Length. In HTTP/2 it has none then
	Trailer []Field // in HTTP/1.1 only of a chunked body
	// After is what follows on the connection, which ends then. Only HTTP/1.1 has it.
	After []byte

	// What only HTTP/1.1 has.
	Version string // "" is HTTP/1.1
	Edits   []Edit // of what is sent before the body

	// What only HTTP/2 has.
	Scheme   string  // "" is the connection's
	NoPath   bool    // no :path
	Pseudo   []Field // more pseudo-header fields
	Late     bool    // they come after the fields
	AsItIs   bool    // names are not lower case
	Split    []int   // where the header block is divided into frames, as a share of 256
	Padding  byte
	Priority bool
}

// Edit changes bytes: Cut of them at At, a share of 256 of the whole, are replaced.
type Edit struct {
	At, Cut int
	Put     string
}

func (m *Message) String() string {
	return fmt.Sprintf("%q", m.HTTP1())
}

// HTTP1 is the message in HTTP/1.1. After is not a part of it.
func (m *Message) HTTP1() []byte {
	var b bytes.Buffer
	version := m.Version
	if version == "" {
		version = "HTTP/1.1"
	}
	fmt.Fprintf(&b, "%s %s %s\r\n", m.Method, m.Target, version)
	for _, h := range m.Hosts {
		fmt.Fprintf(&b, "Host: %s\r\n", h)
	}
	for _, f := range m.Fields {
		fmt.Fprintf(&b, "%s: %s\r\n", f.Name, f.Value)
	}
	switch {
	case m.Body == nil:
	case m.Chunked:
		for _, f := range m.Trailer {
			fmt.Fprintf(&b, "Trailer: %s\r\n", f.Name)
		}
		b.WriteString("Transfer-Encoding: chunked\r\n")
	default:
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(m.Body))
	}
	b.WriteString("\r\n")
	head := b.Bytes()
	for _, e := range m.Edits {
		at := min(e.At*len(head)/256, len(head))
		head = append(append(bytes.Clone(head[:at]), e.Put...), head[min(at+e.Cut, len(head)):]...)
	}
	var body bytes.Buffer
	if m.Body != nil && m.Chunked {
		for rest := m.Body; len(rest) > 0; {
			n := min(len(rest), 1<<14)
			fmt.Fprintf(&body, "%x\r\n%s\r\n", n, rest[:n])
			rest = rest[n:]
		}
		body.WriteString("0\r\n")
		for _, f := range m.Trailer {
			fmt.Fprintf(&body, "%s: %s\r\n", f.Name, f.Value)
		}
		body.WriteString("\r\n")
	} else {
		body.Write(m.Body)
	}
	return append(head, body.Bytes()...)
}

// HTTP2 is the message as frames of a stream, whose header blocks enc writes into block. It is for windows
// that are large enough for the body.
func (m *Message) HTTP2(stream uint32, scheme string, enc *hpack.Encoder, block *bytes.Buffer) []byte {
	if m.Scheme != "" {
		scheme = m.Scheme
	}
	pseudo := []Field{{":method", m.Method}, {":scheme", scheme}}
	if !m.NoPath {
		pseudo = append(pseudo, Field{":path", m.Target})
	}
	var fields []Field
	for i, h := range m.Hosts {
		if i == 0 {
			pseudo = append(pseudo, Field{":authority", h})
		} else {
			fields = append(fields, Field{"host", h})
		}
	}
	pseudo, fields = append(pseudo, m.Pseudo...), append(fields, m.Fields...)
	if m.Body != nil && !m.Chunked {
		fields = append(fields, Field{"content-length", fmt.Sprint(len(m.Body))})
	}
	for _, f := range m.Trailer {
		fields = append(fields, Field{"trailer", f.Name})
	}
	if m.Late {
		fields = append(fields, pseudo...)
	} else {
		fields = append(pseudo, fields...)
	}
	encode := func(fields []Field) []byte {
		block.Reset()
		for _, f := range fields {
			name := f.Name
			if !m.AsItIs {
				name = strings.ToLower(name)
			}
			// Never indexed, so that a message doesn't depend on those before it.
			enc.WriteField(hpack.HeaderField{Name: name, Value: f.Value, Sensitive: true})
		}
		return block.Bytes()
	}
	end := http2.FlagHeadersEndStream
	if m.Body != nil {
		end = 0
	}
	b := m.headers(nil, stream, end, encode(fields))
	for rest := m.Body; m.Body != nil; {
		n := min(len(rest), 1<<14)
		flags := http2.Flags(0)
		if n == len(rest) && m.Trailer == nil {
			flags = http2.FlagDataEndStream
		}
		b = appendFrame(b, http2.FrameData, flags, stream, rest[:n])
		if rest = rest[n:]; len(rest) == 0 {
			break
		}
	}
	if m.Body != nil && m.Trailer != nil {
		b = m.headers(b, stream, http2.FlagHeadersEndStream, encode(m.Trailer))
	}
	return b
}

// headers appends a header block in as many frames as m wants.
func (m *Message) headers(b []byte, stream uint32, flags http2.Flags, block []byte) []byte {
	var parts [][]byte
	at := 0
	for _, share := range m.Split {
		if to := share * len(block) / 256; to >= at {
			parts, at = append(parts, block[at:to]), to
		}
	}
	parts = append(parts, block[at:])
	for i, part := range parts {
		kind := http2.FrameContinuation
		if i == 0 {
			kind = http2.FrameHeaders
			var before, after []byte
			if m.Padding > 0 {
				flags |= http2.FlagHeadersPadded
				before, after = []byte{m.Padding}, make([]byte, m.Padding)
			}
			if m.Priority {
				flags |= http2.FlagHeadersPriority
				before = append(before, 0, 0, 0, 0, 16)
			}
			part = append(append(before, part...), after...)
		}
		if i == len(parts)-1 {
			flags |= http2.FlagHeadersEndHeaders
		}
		b = appendFrame(b, kind, flags, stream, part)
		flags = 0
	}
	return b
}

// appendFrame appends a frame (RFC 9113 4.1).
func appendFrame(b []byte, kind http2.FrameType, flags http2.Flags, stream uint32, payload []byte) []byte {
	b = append(b, byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)), byte(kind), byte(flags))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}
