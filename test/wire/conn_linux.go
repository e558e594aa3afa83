package wire

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// A Conn is our end of a connection. Positions are bytes of our stream from its beginning. It acknowledges by
// itself what comes in order, sends nothing twice unless it is told to, and is safe for concurrent use.
type Conn struct {
	n          *Network
	port, peer uint16
	start      uint32 // the sequence number of our first byte

	mu       sync.Mutex
	changed  sync.Cond
	open     bool
	acked    int    // bytes of ours that the kernel has, a FIN counts one
	room     int    // what it would take behind them
	next     uint32 // what we expect of its stream
	got      []byte
	window   uint16 // that we give
	eof, cut bool   // its stream has ended, was reset
}

// ErrReset is that the kernel has reset the connection.
var ErrReset = errors.New("the kernel has reset the connection")

func (c *Conn) send(s segment) {
	s.from, s.to = c.port, c.peer
	c.n.tun.Write(s.packet()) // one that is lost is sent again, or the test fails
}

// receive takes a segment of the kernel's.
func (c *Conn) receive(s segment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.changed.Broadcast()
	switch {
	case s.flags&rst != 0:
		c.cut = true
		return
	case s.flags&syn != 0:
		c.peer, c.next = s.from, s.seq+1
		answer := segment{flags: ack, seq: c.start, ack: c.next, window: c.window}
		if s.flags&ack == 0 {
			answer.flags, answer.seq = syn|ack, c.start-1
		} else {
			c.open, c.room = true, int(s.window)
		}
		c.send(answer)
		return
	}
	if n := int(int32(s.ack - c.start)); n >= c.acked {
		c.open, c.acked, c.room = true, n, int(s.window)
	}
	if len(s.data) == 0 && s.flags&fin == 0 {
		return
	}
	if s.seq == c.next && len(s.data) <= int(c.window) {
		c.got = append(c.got, s.data...)
		c.next += uint32(len(s.data))
		if s.flags&fin != 0 {
			c.eof = true
			c.next++
		}
	}
	c.send(segment{flags: ack, seq: c.start + uint32(c.acked), ack: c.next, window: c.window})
}

// wait waits until is, which is called with c.mu held.
func (c *Conn) wait(is func() bool) error { return c.waitUntil(time.Now().Add(patience), is) }

func (c *Conn) waitUntil(end time.Time, is func() bool) error {
	defer time.AfterFunc(time.Until(end), c.changed.Broadcast).Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !is() {
		if c.cut {
			return ErrReset
		}
		if !time.Now().Before(end) {
			return fmt.Errorf("%w: %d bytes are acknowledged, there is room for %d, and %d came", os.ErrDeadlineExceeded, c.acked, c.room, len(c.got))
		}
		c.changed.Wait()
	}
	return nil
}

// Acked is how many bytes the kernel has acknowledged.
func (c *Conn) Acked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.acked
}

// Send sends one segment with bytes of our stream from a position on, whatever was sent before.
func (c *Conn) Send(at int, data []byte) { c.sendWith(at, data, psh, 0) }

// SendUrgent is Send with an urgent pointer that makes the last byte of data the urgent one.
func (c *Conn) SendUrgent(at int, data []byte) { c.sendWith(at, data, psh|urg, uint16(len(data))) }

// SendLast is Send with the end of the stream behind data.
func (c *Conn) SendLast(at int, data []byte) { c.sendWith(at, data, psh|fin, 0) }

func (c *Conn) sendWith(at int, data []byte, flags byte, urgent uint16) {
	c.mu.Lock()
	s := segment{flags: ack | flags, seq: c.start + uint32(at), ack: c.next, window: c.window, up: urgent, data: data}
	c.mu.Unlock()
	c.send(s)
}

// Until waits until n bytes are acknowledged, and sends what is missing of data, which are those before n,
// when that takes long.
func (c *Conn) Until(n int, data []byte) error {
	for end := time.Now().Add(patience); ; {
		was := c.Acked()
		err := c.waitUntil(time.Now().Add(60*time.Millisecond), func() bool { return c.acked >= n })
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if now := c.Acked(); now > was {
			end = time.Now().Add(patience)
		} else if time.Now().After(end) {
			return err
		}
		for at, sent := c.Acked(), 0; at < n && sent < 16; sent++ {
			to := min(at+1000, n)
			c.Send(at, data[at:to])
			at = to
		}
	}
}

// Stopped waits until the kernel has acknowledged nothing for so long.
func (c *Conn) Stopped(rest time.Duration) {
	for {
		was := c.Acked()
		if c.waitUntil(time.Now().Add(rest), func() bool { return c.acked != was }) != nil {
			return
		}
	}
}

// Room is how many bytes the kernel takes behind those that it has acknowledged.
func (c *Conn) Room() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.room
}

// SetWindow says how much we take from now on.
func (c *Conn) SetWindow(n uint16) {
	c.mu.Lock()
	c.window = n
	s := segment{flags: ack, seq: c.start + uint32(c.acked), ack: c.next, window: n}
	c.mu.Unlock()
	c.send(s)
}

// Receive waits for n bytes in all, and for the end of the stream with eof, and gives what came.
func (c *Conn) Receive(n int, eof bool) ([]byte, error) {
	err := c.wait(func() bool { return len(c.got) >= n && (c.eof || !eof) })
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got, err
}

// Reset ends the connection. It may be called again.
func (c *Conn) Reset() {
	c.mu.Lock()
	s := segment{flags: rst | ack, seq: c.start + uint32(c.acked), ack: c.next}
	c.mu.Unlock()
	c.send(s)
}
