package agent

import (
	"bytes"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

const forever = math.MaxInt64

// A flow is one connection, at either end. It sends its payload up to allow, and verifies what comes.
type flow struct {
	loop *loop
	cell *cell
	fd   int
	cmd  stream.Command

	onCommand         func(f *flow) // of the server
	connected, closed bool
	paused            bool // does not read
	eof               bool // the other end has ended its stream
	ending, shut      bool // ours ends when all that is allowed is sent; it has
	events            uint32

	head []byte // sent before the payload
	intro
	tx, rx           int64 // bytes of payload
	txPhase, rxPhase uint32
	allow            int64 // tx may go so far
	until            int64 // no further payload after this time (now()); 0 = no limit

	began int64 // of the connection or of the latest request
	step  int   // for the client's own purposes
}

// intro is the server's progress through hello and command.
type intro struct {
	expect []byte // the hello; nil once hello and command are there
	got    int    // bytes of hello and command so far
	raw    [stream.CommandSize]byte
}

// fail ends the flow as broken, and says so.
func (f *flow) fail(err error) {
	if f.closed {
		return
	}
	f.cell.fault(fmt.Errorf("flow %d, after %d bytes sent and %d received: %w", f.cmd.Flow, f.tx, f.rx, err))
	f.loop.close(f, true)
}

// receive reads once.
func (f *flow) receive(buf []byte) {
	n, err := unix.Read(f.fd, buf)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
	case err != nil:
		f.fail(fmt.Errorf("read: %w", err))
	case n == 0:
		f.eof = true
		f.want(f.events &^ (unix.EPOLLIN | unix.EPOLLRDHUP))
	default:
		f.consume(buf[:n])
	}
}

// consume verifies what was received.
func (f *flow) consume(b []byte) {
	for f.expect != nil && len(b) > 0 {
		if n := min(len(f.expect)-f.got, len(b)); n > 0 {
			if !bytes.Equal(b[:n], f.expect[f.got:][:n]) {
				f.fail(errors.New("the ClientHello arrived changed"))
				return
			}
			f.got += n
			b = b[n:]
			continue
		}
		n := copy(f.raw[f.got-len(f.expect):], b)
		f.got += n
		b = b[n:]
		if f.got == len(f.expect)+stream.CommandSize {
			f.expect = nil
			var err error
			if f.cmd, err = stream.ParseCommand(f.raw[:]); err != nil {
				f.fail(err)
				return
			}
			f.onCommand(f)
		}
	}
	if len(b) == 0 {
		return
	}
	if err := stream.Check(f.rxPhase, f.rx, b); err != nil {
		f.fail(err)
		return
	}
	f.rx += int64(len(b))
	f.cell.received(len(b))
	if f.onCommand != nil && f.cmd.Op == stream.Echo {
		f.allow = f.rx - f.rx%int64(f.cmd.Size)
	}
}

// send writes as long as there is something to send and the socket takes it.
func (f *flow) send() {
	if !f.connected || f.closed {
		return
	}
	for len(f.head) > 0 {
		// The first payload goes in the same write, as a client's would.
		b := f.head
		if n := min(f.allow-f.tx, 64<<10); n > 0 && f.tx == 0 {
			b = append(b[:len(b):len(b)], stream.At(f.txPhase, 0, int(n))...)
		}
		n, ok := f.write(b)
		if !ok {
			return
		}
		head := min(n, len(f.head))
		f.head = f.head[head:]
		f.tx += int64(n - head)
	}
	for f.tx < f.allow {
		if f.until != 0 && now() >= f.until {
			f.allow, f.ending = f.tx, true
			break
		}
		n, ok := f.write(stream.At(f.txPhase, f.tx, int(min(f.allow-f.tx, stream.Chunk))))
		if !ok {
			return
		}
		f.tx += int64(n)
	}
	f.want(f.events &^ unix.EPOLLOUT)
	if f.ending && !f.shut {
		f.shut = true
		f.cell.Sent += f.tx
		// Who has ended both ways by now has sent all there was: settle compares the bytes.
		if err := unix.Shutdown(f.fd, unix.SHUT_WR); err != nil && !(f.eof && errors.Is(err, unix.ENOTCONN)) {
			f.fail(fmt.Errorf("shutdown: %w", err))
		}
	}
}

// write writes once; false: no more now.
func (f *flow) write(b []byte) (n int, ok bool) {
	n, err := unix.Write(f.fd, b)
	switch {
	case err == nil:
		f.cell.progress = now()
		return n, true
	case errors.Is(err, unix.EINTR):
		return 0, true
	case errors.Is(err, unix.EAGAIN):
		f.want(f.events | unix.EPOLLOUT)
	default:
		f.fail(fmt.Errorf("write: %w", err))
	}
	return 0, false
}

func (f *flow) want(events uint32) {
	if f.closed || events == f.events {
		return
	}
	f.events = events
	if err := f.loop.watch(f.fd, events, unix.EPOLL_CTL_MOD); err != nil {
		f.fail(err)
	}
}

// pause stops or resumes reading.
func (f *flow) pause(stop bool) {
	if f.paused = stop; stop {
		f.want(f.events &^ (unix.EPOLLIN | unix.EPOLLRDHUP))
	} else if !f.eof {
		f.want(f.events | unix.EPOLLIN)
	}
}

// finish ends our stream where it is.
func (f *flow) finish() {
	f.allow, f.ending = f.tx, true
	f.send()
}
