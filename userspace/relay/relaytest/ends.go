package relaytest

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// halfClose: one end's stream ends, and the other's goes on for long.
func halfClose(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, first, second net.Conn) {
		must(t, transferAll(first, second, 1000))
		must(t, transfer(second, first, 10))
		time.Sleep(20 * time.Millisecond)
		must(t, transferAll(second, first, s.Behind))
	})
}

// halfCloseAtOnce: the FIN is right behind a lot of data, with a reader that is not there yet.
func halfCloseAtOnce(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
		out := newStream()
		in := *out
		sent := make(chan error, 1)
		go func() { sent <- errors.Join(out.send(from, s.Behind), closeWrite(from)) }()
		time.Sleep(50 * time.Millisecond)
		must(t, in.receive(to, s.Behind))
		must(t, wantEOF(to))
		must(t, <-sent)
		must(t, transferAll(to, from, 100<<10))
	})
}

func finWithData(t *testing.T, p Path, s Size) {
	for _, n := range []int64{1, 700, 40_000} {
		bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
			must(t, cork(from))
			out := newStream()
			in := *out
			must(t, errors.Join(out.send(from, n), closeWrite(from)))
			must(t, in.receive(to, n))
			must(t, wantEOF(to))
			must(t, transferAll(to, from, n))
		})
	}
}

// reset: of a flow at rest, which has moved bytes both ways.
func reset(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
		must(t, transfer(from, to, 1000))
		must(t, transfer(to, from, 100<<10))
		abort(from)
		wantReset(t, p, to)
	})
}

// resetBehindData: what the path had acknowledged before the reset arrives, and then the reset.
func resetBehindData(t *testing.T, p Path, s Size) {
	for _, n := range []int64{100, 64 << 10} {
		behindReset(t, p, n, 0, false, func(r *behind) error {
			time.Sleep(20 * time.Millisecond)
			return r.receive(n)
		})
	}
}

// resetBehindWaiting: what the path had acknowledged still arrives when the reader is slow, but not for good,
// to take it.
func resetBehindWaiting(t *testing.T, p Path, s Size) {
	const n = 400 << 10 // more than the reader's window, less than the buffers before it
	behindReset(t, p, n, 64<<10, false, func(r *behind) error {
		time.Sleep(100 * time.Millisecond)
		return r.receive(n)
	})
}

// resetSlowReader: one that goes on reading gets all of it, however long that takes. Each piece is more than
// its buffer holds, so that its window opens each time.
func resetSlowReader(t *testing.T, p Path, s Size) {
	const n, pieces = 400 << 10, 10
	behindReset(t, p, n, 32<<10, true, func(r *behind) error {
		for range pieces {
			time.Sleep(400 * time.Millisecond)
			if err := r.receive(n / pieces); err != nil {
				return err
			}
		}
		return nil
	})
}

// behind is what came before a reset, for the one end that reads it.
type behind struct {
	conn    net.Conn
	in      stream
	last    time.Time     // when it was read from last
	longest time.Duration // from one read to the next call
}

// receive wants n of its bytes.
func (r *behind) receive(n int64) error {
	for n > 0 {
		r.longest = max(r.longest, time.Since(r.last))
		some := min(n, 16<<10)
		err := r.in.receive(r.conn, some)
		if err != nil {
			return err
		}
		r.last = time.Now()
		n -= some
	}
	return nil
}

// behindReset sends n bytes, which are acknowledged, and then a reset. read gets all of the bytes at the
// other end, with a receive buffer of that size, if any. A busy machine may hold that end up for as long as
// no reader may stop: then it is tried again. Where it mostly waits, both ends are tried at once.
func behindReset(t *testing.T, p Path, n int64, buffer int, waits bool, read func(r *behind) error) {
	try := func(t *testing.T, from, to net.Conn) (pause time.Duration, err error) {
		if buffer > 0 {
			must(t, to.(*net.TCPConn).SetReadBuffer(buffer))
		}
		out := newStream()
		r := &behind{conn: to, in: *out, last: time.Now()}
		must(t, out.send(from, n))
		must(t, waitAcked(from))
		r.last = time.Now()
		abort(from)
		if err := read(r); err != nil {
			return r.longest, err
		}
		wantReset(t, p, to)
		return 0, nil
	}
	eachRole(t, p, waits, func(t *testing.T, dial func() (active, passive net.Conn)) {
		for tries := 1; ; tries++ {
			from, to := dial()
			pause, err := try(t, from, to)
			if err == nil {
				return
			}
			if !isReset(err) || pause < time.Second || tries == 10 {
				t.Fatalf("having paused for %v at most: %v", pause, err)
			}
		}
	})
}

// resetHoldsSender: while what came before a reset waits to be delivered, nothing is taken from the other
// end: it would be told that its bytes have arrived.
func resetHoldsSender(t *testing.T, p Path, s Size) {
	bothRolesAtOnce(t, p, func(t *testing.T, from, to net.Conn) {
		fill(from, newStream())
		abort(from)
		const most = 128 << 20 // far more than all buffers on the way
		out := newStream()
		if err := out.send(to, most); !isReset(err) {
			t.Errorf("sender, instead of a reset: %v", err)
		}
	})
}

// resetMidStream: both streams are in full flow. The other end never sees a proper end.
func resetMidStream(t *testing.T, p Path, s Size) {
	for range s.Repeat {
		bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
			out := newStream()
			in := *out
			go out.send(from, 1<<30)
			back := newStream()
			expect := *back
			sent := make(chan error, 1)
			go func() { sent <- back.send(to, 1<<30) }()
			must(t, expect.receive(from, 3<<20))
			must(t, in.receive(to, 3<<20))
			abort(from)
			_, err := in.drain(to)
			if !saysReset(err) {
				// The sender may have been told first; then the stream ends for the reader,
				// and whether it was a reset is for the sender to say.
				if err != io.EOF {
					t.Errorf("reader: %v", err)
				}
			}
			serr := <-sent
			if !isReset(serr) {
				t.Errorf("sender: %v", serr)
			}
			if !saysReset(err) && !saysReset(serr) {
				t.Errorf("neither reader nor sender was told of a reset: %v, %v", err, serr)
			}
		})
	}
}

func isReset(err error) bool {
	return saysReset(err) || errors.Is(err, syscall.EPIPE)
}

// resetAfterHalfClose: a side that has ended its stream, or has been told of the other's end, can still
// reset. The other end does not write meanwhile: it has to be told, not to find out.
func resetAfterHalfClose(t *testing.T, p Path, s Size) {
	t.Run("by the one that ended", func(t *testing.T) {
		bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
			must(t, transferAll(from, to, 1000))
			time.Sleep(20 * time.Millisecond)
			abort(from)
			must(t, waitBroken(p, to))
		})
	})
	t.Run("by the other one", func(t *testing.T) {
		bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
			must(t, transferAll(to, from, 1000))
			time.Sleep(20 * time.Millisecond)
			abort(from)
			wantReset(t, p, to)
		})
	})
}

// resetWhileStopped: an end that doesn't read is told of a reset all the same, within the time that is
// allowed for the delivery of what is on its way.
func resetWhileStopped(t *testing.T, p Path, s Size) {
	bothRolesAtOnce(t, p, func(t *testing.T, from, to net.Conn) {
		fill(from, newStream())
		abort(from)
		must(t, waitBroken(p, to))
	})
}

// closeUnread: close with unread bytes is a reset in TCP.
func closeUnread(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
		must(t, newStream().send(to, 1000))
		must(t, waitAcked(to))
		time.Sleep(20 * time.Millisecond)
		from.Close()
		must(t, waitBroken(p, to))
	})
}
