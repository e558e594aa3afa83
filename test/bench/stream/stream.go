// Package stream makes the bytes that the benchmark sends, and knows them again when they arrive.
//
// A flow begins with a real ClientHello and a [Command]; then it has a payload each way. The payload is a
// pattern of Period random bytes, over and over, from a phase of the flow's own. Checking it is one
// comparison with memory that stays in the second-level cache (20 GB/s and more, so 2 to 4 % of what moving
// the bytes costs), and it finds a byte that is wrong, lost, doubled or out of order, or that belongs to
// another flow: Period is prime, and no multiple of any buffer's or segment's size. What it could miss is a
// whole multiple of Period lost, for which the counts of both ends are compared.
package stream

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

const (
	Period = 65521     // bytes; prime
	Chunk  = 256 << 10 // bytes that At gives at most
)

var pattern = func() (p [Period + Chunk]byte) {
	rand.NewChaCha8([32]byte{'t', 's', 'b', 'e', 'n', 'c', 'h'}).Read(p[:Period])
	for i := Period; i < len(p); i += copy(p[i:], p[:Period]) {
	}
	return p
}()

// At is what a flow's payload has in bytes [offset, offset+n), n <= Chunk. The caller must not write to it.
func At(phase uint32, offset int64, n int) []byte {
	return pattern[(int64(phase)+offset)%Period:][:n]
}

// Phases of the payloads of a flow, up and down.
func Phases(flow uint32) (up, down uint32) {
	return flow * 257 % Period, (flow*257 + Period/2) % Period
}

// Check says where got is not what the payload has at offset; an error means that the proxy broke the flow.
func Check(phase uint32, offset int64, got []byte) error {
	want := At(phase, offset, len(got))
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d is %#02x, not %#02x", offset+int64(i), got[i], want[i])
		}
	}
	return nil
}

// ServerName is what the hello asks for.
const ServerName = "bench.example"

// Hello is a ClientHello as crypto/tls sends it, post-quantum key share included.
func Hello() ([]byte, error) {
	c := &capture{}
	err := tls.Client(c, &tls.Config{ServerName: ServerName, NextProtos: []string{"h2", "http/1.1"}}).Handshake()
	if len(c.sent) == 0 {
		return nil, fmt.Errorf("make a ClientHello: %w", err)
	}
	return c.sent, nil
}

// ProxyHeader is a PROXY header of version 2 that names a client.
func ProxyHeader() []byte {
	return []byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" +
		"\xc6\x33\x64\x07\xcb\x00\x71\x50\x10\xe1\x01\xbb") // from 198.51.100.7:4321 to 203.0.113.80:443
}

// capture is a connection that keeps what is written, and ends when read from.
type capture struct {
	net.Conn
	sent []byte
}

func (c *capture) Write(b []byte) (int, error)      { c.sent = append(c.sent, b...); return len(b), nil }
func (c *capture) Read([]byte) (int, error)         { return 0, io.EOF }
func (c *capture) Close() error                     { return nil }
func (c *capture) SetDeadline(time.Time) error      { return nil }
func (c *capture) SetWriteDeadline(time.Time) error { return nil }

// Op is what the server does with a flow.
type Op uint8

const (
	Echo   Op = 1 // answers each Size bytes with as many
	Sink   Op = 2 // takes all there is
	Source Op = 3 // sends for Duration; 0 = until it is told to stop
	Deaf   Op = 4 // reads nothing until it is told to, and then all there is
)

// Command is what the client sends after the hello.
type Command struct {
	Op       Op
	Cell     uint32 // one run of one measure on one system
	Flow     uint32 // unique in the cell
	Size     uint32 // bytes of a request and of a response
	Warm     time.Duration
	Duration time.Duration // both in whole milliseconds on the wire
}

// CommandSize is the length of a Command on the wire, in bytes.
const CommandSize = 32

var magic = [4]byte{'t', 's', 'b', '1'}

// Append appends the wire form.
func (c Command) Append(b []byte) []byte {
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(c.Op))
	b = binary.BigEndian.AppendUint32(b, c.Cell)
	b = binary.BigEndian.AppendUint32(b, c.Flow)
	b = binary.BigEndian.AppendUint32(b, c.Size)
	b = binary.BigEndian.AppendUint32(b, uint32(c.Warm.Milliseconds()))
	b = binary.BigEndian.AppendUint32(b, uint32(c.Duration.Milliseconds()))
	return append(b, 0, 0, 0, 0)
}

// ParseCommand reads the wire form.
func ParseCommand(b []byte) (Command, error) {
	if len(b) != CommandSize || [4]byte(b[:4]) != magic {
		return Command{}, errors.New("no command behind the hello")
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(b[4*i:]) }
	c := Command{
		Op: Op(u(1)), Cell: u(2), Flow: u(3), Size: u(4),
		Warm: time.Duration(u(5)) * time.Millisecond, Duration: time.Duration(u(6)) * time.Millisecond,
	}
	if c.Op < Echo || c.Op > Deaf || c.Op == Echo && c.Size == 0 {
		return Command{}, fmt.Errorf("bad command %+v", c)
	}
	return c, nil
}
