package relay

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

var errMoving = errors.New("it is on its way from one who moves its bytes to another")

// Copies are descriptors of both sockets of the flow that is counted, which go on as if there were none: the
// caller closes them. The error says that there is no flow, or not now.
func (c *Counters) Copies() (down, up int, err error) {
	f := c.flow.Load()
	if f == nil {
		return -1, -1, errNoFlow
	}
	f.mu.Lock() // nobody closes a socket on a loop before he has taken the flow off that
	defer f.mu.Unlock()
	switch {
	case f.state == onLoop:
		return copyBoth(f.down.socket.FD(), f.up.socket.FD())
	case f.state == handedOff && f.handed != nil:
		return f.handed.copy()
	case f.hasPumps():
		return f.copyConns()
	}
	return -1, -1, errMoving
}

// copyConns is Copies for pumps.
//
// +checklocks:f.mu
func (f *flow) copyConns() (down, up int, err error) {
	if !f.parkable() {
		return -1, -1, errWrapped
	}
	if down, err = tcpsock.Dup(f.down.sock); err != nil {
		return -1, -1, err
	}
	if up, err = tcpsock.Dup(f.up.sock); err != nil {
		unix.Close(down)
		return -1, -1, err
	}
	return down, up, nil
}

// handed are the sockets that a datapath has, or is offered. It may have closed them before that is known
// here, and their numbers may be those of others then.
type handed struct {
	fds     [2]int
	cookies [2]uint64
}

// hand makes a handed of both sockets; nil: they can't be told from others.
func hand(down, up *loop.Socket) *handed {
	h := &handed{fds: [2]int{down.FD(), up.FD()}}
	for i, fd := range h.fds {
		cookie, err := tcpsock.Cookie(fd)
		if err != nil {
			return nil
		}
		h.cookies[i] = cookie
	}
	return h
}

func (h *handed) copy() (down, up int, err error) {
	down, up, err = copyBoth(h.fds[0], h.fds[1])
	for i, fd := range []int{down, up} {
		if err != nil {
			break
		}
		var cookie uint64
		cookie, err = tcpsock.Cookie(fd)
		if err == nil && cookie != h.cookies[i] {
			err = errNoFlow
		}
	}
	if err != nil && down >= 0 {
		unix.Close(down)
		unix.Close(up)
		return -1, -1, err
	}
	return down, up, err
}

func copyBoth(of, and int) (down, up int, err error) {
	if down, err = tcpsock.DupFD(of); err != nil {
		return -1, -1, err
	}
	if up, err = tcpsock.DupFD(and); err != nil {
		unix.Close(down)
		return -1, -1, err
	}
	return down, up, nil
}
