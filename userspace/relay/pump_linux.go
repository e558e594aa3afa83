package relay

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	fullReads    = 2        // bulk begins after so many reads in a row that have filled the buffer
	smallSplices = 8        // bulk ends after so many splices in a row of less than smallSplice
	smallSplice  = 16 << 10 // bytes
)

// A pump moves the bytes of one direction.
//
// The whole run is one call of src.sock.Read: its callback moves all there is and then asks to wait, so that
// an idle pump is a parked goroutine and nothing else.
type pump struct {
	relay    *Relay
	src, dst *side
	moved    *atomic.Int64
	limit    int // bytes that may be held here

	isBulk       bool // splice instead of copying
	count        int  // reads in a row that speak for the other mode
	cannotSplice bool // one of the sockets can't

	flush, drain func(fd uintptr) bool
	out          []byte // read and not yet written
	pipe         *pipe  // with bytes in it, or nil
	inPipe       int    // bytes

	// lost is what splice(2) has told of. There may be bytes yet that only read(2) gives: those behind an
	// urgent one.
	lost error

	bad *side
	err error
}

func (p *pump) run() (bad *side, err error) {
	if !p.src.isBare || !p.dst.isBare {
		return p.copyAny()
	}
	p.flush, p.drain = p.flushOut, p.drainPipe
	rest := p.src.rest
	p.src.rest = nil
	if p.write(rest); p.err == nil {
		if err := p.src.sock.Read(p.turn); err != nil {
			p.fail("read from", p.src, err)
		}
	}
	if p.pipe != nil {
		p.relay.pipes.close(p.pipe) // there are bytes in it
	}
	p.src.hold(0)
	p.src.grow()
	return p.bad, p.err
}

func (p *pump) fail(op string, s *side, err error) {
	if p.err == nil {
		p.bad, p.err = s, &sideError{op, s.name(), err}
	}
}

// turn moves what src has. false: wait for more.
func (p *pump) turn(fd uintptr) (done bool) {
	for {
		p.tryLeave()
		if p.src.flow.stops.Load() {
			p.fail("read from", p.src, os.ErrDeadlineExceeded)
			return true
		}
		if saves := p.relay.holding.saves.Load(); saves != p.src.isShrunk {
			p.src.shrink(saves, int(fd), p.dst)
		}
		var n int
		var err error
		if p.isBulk {
			n, err = p.splice(int(fd))
		} else {
			n, err = p.copy(int(fd))
		}
		switch {
		case p.err != nil:
			return true
		case err == unix.EAGAIN:
			return false
		case err != nil:
			p.fail("read from", p.src, err)
			return true
		case n == 0:
			if p.lost != nil {
				p.fail("read from", p.src, p.lost)
			}
			return true
		}
	}
}

// copy does one read, and writes what it gave.
func (p *pump) copy(fd int) (n int, err error) {
	b := p.relay.buffers.Get().(*[bufferSize]byte)
	defer p.relay.buffers.Put(b)
	buf := b[:min(len(b), p.limit)]
	isOnTrial := false
	if !p.src.isTried {
		p.dst.sock.Control(func(dst uintptr) { buf, isOnTrial = p.src.piece(buf, int(dst)) })
	}
	n, err = noEINTR(func() (int, error) { return unix.Read(fd, buf) })
	if n <= 0 {
		return 0, err
	}
	p.write(buf[:n])
	if isOnTrial {
		runtime.Gosched()
	}
	if isOnTrial || n < len(buf) || p.limit < bufferSize || p.cannotSplice {
		p.count = 0
	} else if p.count++; p.count >= fullReads {
		p.isBulk, p.count = true, 0
	}
	return n, nil
}

// write gives b to dst.
func (p *pump) write(b []byte) {
	if len(b) == 0 {
		return
	}
	p.out = b
	p.give(p.flush)
	p.out = nil
}

// give calls do, until that is done, for dst to be written to. Where the pump was told to return meanwhile,
// what is held goes along.
func (p *pump) give(do func(fd uintptr) bool) {
	for {
		err := p.dst.sock.Write(do)
		switch {
		case err == nil:
			return
		case !errors.Is(err, os.ErrDeadlineExceeded):
		case p.held() <= maxRest:
			p.keep()
		case p.src.flow.stayAwhile(p.src):
			continue
		}
		p.fail("write to", p.dst, err)
		return
	}
}

// held is how many bytes were read and not yet written.
func (p *pump) held() int { return len(p.out) + p.inPipe }

// keep leaves what is held to whoever has src next.
func (p *pump) keep() {
	rest := make([]byte, p.held())
	n := copy(rest, p.out)
	for p.inPipe > 0 {
		m, err := noEINTR(func() (int, error) { return unix.Read(p.pipe.r, rest[n:]) })
		if err != nil || m == 0 {
			p.fail("read from", p.src, fmt.Errorf("its pipe: %w", err))
			return
		}
		n += m
		p.inPipe -= m
	}
	p.src.rest, p.out = rest, nil
}

// noRoom is for when dst has none for what is held.
func (p *pump) noRoom() (done bool) {
	p.src.hold(p.held())
	watchForReset(p.src)
	if p.held() <= maxRest {
		p.tryLeave()
	}
	return false
}

// tryLeave lets the flow leave, which was put off when more was held.
func (p *pump) tryLeave() {
	if p.src.isPutOff {
		p.src.isPutOff = false
		p.src.flow.letLeave()
	}
}

func (p *pump) flushOut(fd uintptr) (done bool) {
	for len(p.out) > 0 {
		n, err := noEINTR(func() (int, error) { return unix.Write(int(fd), p.out) })
		if err == unix.EAGAIN {
			return p.noRoom()
		}
		if err != nil {
			p.fail("write to", p.dst, err)
			return true
		}
		p.moved.Add(int64(n))
		p.out = p.out[n:]
	}
	p.src.hold(p.inPipe)
	return true
}

// splice moves up to a pipe full.
func (p *pump) splice(fd int) (n int, err error) {
	pipe := p.relay.pipes.get()
	if pipe == nil {
		p.isBulk = false
		return p.copy(fd)
	}
	most := min(p.limit, pipe.size)
	if p.relay.holding.short.Load() || p.src.flow.counters.isAsked() {
		most = min(most, minPipe) // which is at most maxRest
	}
	n, err = splice(fd, pipe.w, most)
	if n <= 0 {
		p.relay.pipes.put(pipe)
		switch {
		case isUnspliceable(err):
			p.isBulk, p.cannotSplice = false, true
			return p.copy(fd)
		case err == nil:
			return p.copy(fd) // to be told that the stream has ended: before an urgent byte it only looks so
		case err == unix.EAGAIN:
			// An urgent byte stops splice(2) for good, and read(2) not.
			if at, err := unix.IoctlGetInt(fd, unix.SIOCATMARK); err == nil && at != 0 {
				return p.copy(fd)
			}
			return 0, err
		}
		p.isBulk, p.cannotSplice, p.lost = false, true, err
		return p.copy(fd)
	}
	p.pipe, p.inPipe = pipe, n
	p.give(p.drain)
	if p.inPipe == 0 {
		p.src.hold(0)
		p.pipe = nil
		p.relay.pipes.put(pipe)
	}
	if n >= smallSplice {
		p.count = 0
	} else if p.count++; p.count >= smallSplices {
		p.isBulk, p.count = false, 0
	}
	return n, nil
}

// drainPipe gives what is in the pipe to dst.
func (p *pump) drainPipe(fd uintptr) (done bool) {
	for p.inPipe > 0 && !p.cannotSplice {
		n, err := splice(p.pipe.r, int(fd), p.inPipe)
		switch {
		case err == unix.EAGAIN:
			return p.noRoom()
		case isUnspliceable(err):
			p.isBulk, p.cannotSplice = false, true
		case err != nil:
			p.fail("write to", p.dst, err)
			return true
		default:
			p.moved.Add(int64(n))
			p.inPipe -= n
		}
	}
	return p.emptyPipe(fd)
}

// emptyPipe is drainPipe for a dst that can't splice.
func (p *pump) emptyPipe(fd uintptr) (done bool) {
	for p.inPipe > 0 || len(p.out) > 0 {
		if len(p.out) == 0 {
			buf := make([]byte, min(p.inPipe, bufferSize))
			n, err := noEINTR(func() (int, error) { return unix.Read(p.pipe.r, buf) })
			if err != nil || n == 0 {
				p.fail("read from", p.src, fmt.Errorf("its pipe: %w", err))
				return true
			}
			p.inPipe -= n
			p.out = buf[:n]
		}
		if !p.flushOut(fd) {
			return false
		}
		if p.err != nil {
			return true
		}
	}
	return true
}

func splice(from, to, most int) (n int, err error) {
	return noEINTR(func() (int, error) {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		return int(n), err
	})
}

func isUnspliceable(err error) bool {
	return err == unix.EINVAL || err == unix.ENOSYS || err == unix.EOPNOTSUPP
}

func noEINTR(f func() (int, error)) (n int, err error) {
	for {
		n, err = f()
		if err != unix.EINTR {
			return n, err
		}
	}
}
