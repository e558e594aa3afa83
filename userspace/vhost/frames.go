package vhost

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

const (
	http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // what the first bytes of HTTP/2 are (RFC 9113 3.4)

	frameHeader = 9 // bytes (RFC 9113 4.1)
	frameData   = 0 // the type of DATA
	frameEnd    = 1 // the flag END_STREAM of DATA
	frameBuffer = 4 << 10

	// What brings no answer is read slowly. A frame that is not DATA costs one of frameBurst. Time brings
	// framesPerSecond back, and each frameAnswer bytes that the client is sent bring one. So neither requests
	// that are answered nor the windows of who reads answers wait, and PING, SETTINGS, RST_STREAM and
	// CONTINUATION without end do.
	frameBurst      = 250
	framesPerSecond = 25
	frameAnswer     = 32
)

// frames reads HTTP/2 of one connection.
type frames struct {
	from   io.Reader
	conn   *conn
	free   bool         // of a hop, which speaks for many
	sent   atomic.Int64 // bytes, to the client
	header [frameHeader]byte
	have   int // bytes of header
	left   int // bytes of the frame's payload
	budget frameBudget
}

func newFrames(c *conn, from io.Reader) *frames {
	return &frames{from: from, conn: c, free: c.info.crowd() == crowdOfHop,
		budget: frameBudget{left: frameBurst, at: time.Now()}}
}

func (f *frames) Read(b []byte) (int, error) {
	n, err := f.from.Read(b)
	if cost := f.pass(b[:n]); cost > 0 && !f.free {
		f.conn.wait(f.budget.spend(cost, f.sent.Load(), time.Now()))
	}
	return n, err
}

// pass looks at what is read, and tells how many frames of it are to be paid for.
func (f *frames) pass(b []byte) (cost int) {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(f.left, len(b))
			f.left, b = f.left-n, b[n:]
			continue
		}
		n := copy(f.header[f.have:], b)
		f.have, b = f.have+n, b[n:]
		if f.have < frameHeader {
			continue
		}
		h := &f.header
		f.have, f.left = 0, int(h[0])<<16|int(h[1])<<8|int(h[2])
		if h[3] != frameData || f.left == 0 && h[4]&frameEnd == 0 {
			cost++
		}
	}
	return cost
}

// frameBudget is what a client may still send before it has to wait.
type frameBudget struct {
	left float64
	at   time.Time // when left was that
	paid int64     // bytes sent to the client until then
}

// spend takes cost away, and returns how long to wait until nothing is owed. sent are all bytes that the
// client was sent until now.
func (b *frameBudget) spend(cost int, sent int64, now time.Time) time.Duration {
	earned := now.Sub(b.at).Seconds()*framesPerSecond + float64(sent-b.paid)/frameAnswer
	b.left, b.at, b.paid = min(b.left+earned, frameBurst)-float64(cost), now, sent
	if b.left >= 0 {
		return 0
	}
	return time.Duration(-b.left / framesPerSecond * float64(time.Second))
}

// Read reads what the client sends, and finds out whether that is HTTP/2 without TLS. Then net/http asks for
// the header and the payload of a frame by a read each, which a buffer makes few system calls.
func (c *conn) Read(b []byte) (int, error) {
	if c.frames != nil {
		return c.frames.Read(b)
	}
	n, err := c.Conn.Read(b)
	if c.preface >= 0 && n > 0 { // net/http reads a preface, and nothing behind it
		if rest := http2Preface[c.preface:]; !strings.HasPrefix(rest, string(b[:n])) {
			c.preface = -1
		} else if c.preface += n; c.preface == len(http2Preface) {
			c.frames = newFrames(c, bufio.NewReaderSize(c.Conn, frameBuffer))
		}
	}
	return n, err
}

// secure is a connection of HTTP/2 in TLS. It hides that from net/http, whose own way with TLS leaves no room to
// look at frames: requests get their TLS by secured.
type secure struct {
	net.Conn
	tls     tls.ConnectionState
	below   *conn
	frames  *frames
	preface int // bytes of HTTP/2's preface that were read
}

// newSecure takes over tc, whose handshake is done.
func newSecure(tc *tls.Conn) *secure {
	below := tc.NetConn().(*conn)
	s := &secure{Conn: tc, tls: tc.ConnectionState(), below: below, frames: newFrames(below, tc)}
	below.secure = s
	return s
}

// Read ends a connection that does not begin as HTTP/2: net/http would take it for HTTP/1.
func (s *secure) Read(b []byte) (int, error) {
	rest := http2Preface[s.preface:]
	if rest == "" {
		return s.frames.Read(b)
	}
	n, err := s.Conn.Read(b[:min(len(b), len(rest))])
	if !strings.HasPrefix(rest, string(b[:n])) {
		return 0, io.EOF
	}
	s.preface += n
	return n, err
}

func (s *secure) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	s.frames.sent.Add(int64(n))
	return n, err
}

// secured gives a request of HTTP/2 its connection's TLS.
func (c *conn) secured(r *http.Request) {
	if c.secure != nil {
		r.TLS = &c.secure.tls
	}
}

// wait waits for d, or until the connection is closed.
func (c *conn) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.done:
	}
}
