package vhost

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

const (
	http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // what the first bytes of HTTP/2 are (RFC 9113 3.4)

	frameHeader = 9 // bytes (RFC 9113 4.1)
	frameBuffer = 4 << 10

	// Types of frames, and the flags END_STREAM, END_HEADERS and PADDED.
	frameDATA, frameHEADERS, frameRST, frameSETTINGS, frameCONTINUATION = 0, 1, 3, 4, 9
	frameEnd, frameEndHeaders, framePadded                              = 1, 4, 8

	mostPadding = 1 + 255 // bytes: its length, and as many as that says (RFC 9113 6.1)

	// What brings no answer is read slowly. A frame costs one of frameBurst, but for those that begin
	// requests and those with a part of their body, which other limits bound. Time brings framesPerSecond
	// back. A frame of an answer brings frameAnswer, and one more for each frameBytes of its body: whoever
	// reads answers acknowledges each, and some, gRPC's clients, also measure the way by a PING. So they
	// never wait, and PING, SETTINGS, RST_STREAM and CONTINUATION without end do.
	frameBurst      = 250
	framesPerSecond = 25
	frameAnswer     = 4
	frameBytes      = 2 << 10
)

// splitter finds the frames of HTTP/2 in a stream of bytes.
type splitter struct {
	header [frameHeader]byte
	have   int // bytes of header
	left   int // bytes of the frame's payload
}

// frame is the header of one.
type frame struct {
	kind, flags byte
	length      int
	stream      uint32
}

// isBetween reports whether no frame has begun.
func (s *splitter) isBetween() bool { return s.have == 0 && s.left == 0 }

// pass goes on with b. It calls value for each frame that begins, and returns the sum of what that returned.
func (s *splitter) pass(b []byte, value func(frame) int) (sum int) {
	for len(b) > 0 {
		if s.left > 0 {
			n := min(s.left, len(b))
			s.left, b = s.left-n, b[n:]
			continue
		}
		n := copy(s.header[s.have:], b)
		s.have, b = s.have+n, b[n:]
		if s.have == frameHeader {
			h := &s.header
			s.have, s.left = 0, int(h[0])<<16|int(h[1])<<8|int(h[2])
			sum += value(frame{h[3], h[4], s.left, binary.BigEndian.Uint32(h[5:]) &^ (1 << 31)})
		}
	}
	return sum
}

// cost is what a client pays for a frame that it sends.
func (f *frames) cost(fr frame) int {
	switch fr.kind {
	case frameHEADERS, frameCONTINUATION:
		f.isInHead = fr.flags&frameEndHeaders == 0
	case frameSETTINGS:
		f.isInHead = false
	}
	switch {
	case fr.kind == frameHEADERS:
		f.bodies.begin(fr)
		return 0
	case fr.kind == frameDATA && f.bodies.goesOn(fr):
		return 0
	case fr.kind == frameRST: // of an answer that has no end then
		f.bodies.givenUp(fr.stream)
	}
	return 1
}

// worth is what a client earns by a frame that it is sent.
func (f *frames) worth(fr frame) int {
	if fr.kind == frameRST || fr.kind <= frameHEADERS && fr.flags&frameEnd != 0 {
		f.bodies.answered(fr.stream)
	}
	switch fr.kind {
	case frameHEADERS:
		return frameAnswer
	case frameDATA:
		return frameAnswer + fr.length/frameBytes
	}
	return 0
}

// bodies are the streams whose requests go on: those alone may have DATA.
type bodies struct {
	mu sync.Mutex
	// +checklocks:mu
	open map[uint32]struct{}
	// late are the last streams that were answered to the end. Their clients may still send what they have.
	// +checklocks:mu
	late []uint32
}

// mostLate is as many as there may be requests on a connection.
const mostLate = 250

// begin takes note of a request, or of the trailers at its end.
func (b *bodies) begin(fr frame) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if fr.flags&frameEnd != 0 {
		b.end(fr.stream)
		return
	}
	if b.open == nil {
		b.open = map[uint32]struct{}{}
	}
	b.open[fr.stream] = struct{}{}
}

// goesOn reports whether fr is DATA of a request that goes on, and more than padding, or is the end.
func (b *bodies) goesOn(fr frame) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, open := b.open[fr.stream]
	open = open || slices.Contains(b.late, fr.stream)
	if fr.flags&frameEnd != 0 {
		b.end(fr.stream)
		return open
	}
	return open && (fr.length > mostPadding || fr.length > 0 && fr.flags&framePadded == 0)
}

// +checklocks:b.mu
func (b *bodies) end(stream uint32) {
	delete(b.open, stream)
	b.late = slices.DeleteFunc(b.late, func(s uint32) bool { return s == stream })
}

func (b *bodies) givenUp(stream uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.end(stream)
}

func (b *bodies) answered(stream uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.open[stream]; !ok {
		return
	}
	delete(b.open, stream)
	b.late = append(b.late[max(0, len(b.late)+1-mostLate):], stream)
}

// frames counts the frames of one connection of HTTP/2.
type frames struct {
	from     io.Reader
	conn     *conn
	isFree   bool // its frames cost nothing: of a hop, which speaks for many
	in, out  splitter
	isInHead bool   // a request's head goes on in the next frame, or SETTINGS, the first, has not come
	leaves   bool   // goAway is to be read next, between two frames
	said     string // of that, what is to be read now
	bodies   bodies
	earned   atomic.Int64 // by frames that the client was sent
	budget   frameBudget
}

func newFrames(c *conn, from io.Reader) *frames {
	return &frames{from: from, conn: c, isInHead: true, isFree: c.info.crowd() == crowdOfHop,
		budget: frameBudget{left: frameBurst, at: time.Now()}}
}

func (f *frames) Read(b []byte) (int, error) {
	n, err := f.read(b)
	if cost := f.in.pass(b[:n], f.cost); cost > 0 && !f.isFree {
		f.conn.wait(f.budget.spend(cost, f.earned.Load(), time.Now()))
	}
	return n, err
}

// goAway has net/http tell the client to go, which it does to a client that says so itself, and end the
// connection when all is answered.
const goAway = "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00"

// read reads what the client sends, and goAway if the connection is called.
func (f *frames) read(b []byte) (n int, err error) {
	for {
		if f.leaves && !f.isInHead && f.in.isBetween() {
			f.leaves, f.said = false, goAway
		}
		if f.said != "" {
			n = copy(b, f.said)
			f.said = f.said[n:]
			return n, nil
		}
		if n, err = f.from.Read(b); n > 0 || !f.conn.wasCalled(err) {
			return n, err
		}
		f.leaves = true
	}
}

// wrote counts what the client was sent. net/http writes one thing after the other.
func (f *frames) wrote(b []byte) {
	if n := f.out.pass(b, f.worth); n > 0 {
		f.earned.Add(int64(n))
	}
}

// frameBudget is what a client may still send before it has to wait.
type frameBudget struct {
	left float64
	at   time.Time // when left was that
	paid int64     // earned until then
}

// spend takes cost away, and returns how long to wait until nothing is owed, given all that was earned.
func (b *frameBudget) spend(cost int, earned int64, now time.Time) time.Duration {
	more := now.Sub(b.at).Seconds()*framesPerSecond + float64(earned-b.paid)
	b.left, b.at, b.paid = min(b.left+more, frameBurst)-float64(cost), now, earned
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
	n, err := c.readFrom(c.Conn, b)
	if n > 0 && c.heard.Load() == 0 {
		c.heard.Store(moment.Now())
	}
	if c.preface >= 0 && n > 0 { // net/http reads a preface, and nothing behind it
		if rest := http2Preface[c.preface:]; !strings.HasPrefix(rest, string(b[:n])) {
			c.preface = -1
		} else if c.preface += n; c.preface == len(http2Preface) {
			c.frames = newFrames(c, bufio.NewReaderSize(c.Conn, frameBuffer))
		}
	}
	return n, err
}

// secure is a connection of HTTP/2 in TLS. It hides that from net/http, whose own way with TLS leaves no room
// to look at frames: newExchange gives requests their TLS.
type secure struct {
	net.Conn
	tls     tls.ConnectionState
	below   *conn
	frames  *frames
	preface int // bytes of HTTP/2's preface that were read
}

// Read ends a connection that does not begin as HTTP/2: net/http would take it for HTTP/1.
func (s *secure) Read(b []byte) (int, error) {
	rest := http2Preface[s.preface:]
	if rest == "" {
		return s.frames.Read(b)
	}
	n, err := s.below.readFrom(s.Conn, b[:min(len(b), len(rest))])
	if !strings.HasPrefix(rest, string(b[:n])) {
		return 0, io.EOF
	}
	s.preface += n
	return n, err
}

func (s *secure) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	s.frames.wrote(b[:n])
	return n, err
}

// wait waits for d, or until the connection is closed.
func (c *conn) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-c.done:
	}
}
