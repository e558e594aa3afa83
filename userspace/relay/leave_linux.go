package relay

import (
	"net"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// depart gives f, whose pumps are gone, to who has asked for it. If it can't leave, pumps go on.
func (f *flow) depart() {
	unwatch(&f.down)
	unwatch(&f.up)
	if !f.disarm() || !f.departFromPoller() {
		f.goOn()
	}
}

// departFromPoller gives f, which is in transit, away; nothing of it runs.
func (f *flow) departFromPoller() (hasLeft bool) {
	down, up, err := f.bareConns()
	if err != nil {
		f.counters.refuseLeave(f.counters.leave.Load(), err)
		return false
	}
	q, p := f.pack(down, up)
	for _, c := range [][2]net.Conn{{down, f.down.conn}, {up, f.up.conn}} {
		switch {
		case c[0] == c[1]:
			c[0].SetDeadline(time.Time{})
		case q == nil:
			c[0].Close()
		default:
			c[1].Close()
		}
	}
	if q == nil {
		return false
	}
	f.forgetRecord()
	q.gave(p, nil)
	return true
}

// bareConns gives the conns of both sides as those of package net: their own, or further ones.
func (f *flow) bareConns() (down, up net.Conn, err error) {
	if down, err = bareConn(f.down.conn); err != nil {
		return nil, nil, err
	}
	if up, err = bareConn(f.up.conn); err != nil && down != f.down.conn {
		down.Close()
	}
	return down, up, err
}

func bareConn(c net.Conn) (net.Conn, error) {
	s, ok := c.(sockConn)
	if !ok {
		return c, nil
	}
	c, err := net.FileConn(s.File)
	if t, ok := c.(*net.TCPConn); ok { // package net sets its own on the socket
		t.SetKeepAliveConfig(tcpsock.KeepAlive)
	}
	return c, err
}

// goOn has pumps go on with f, which is in transit, and was disarmed.
func (f *flow) goOn() {
	f.mu.Lock()
	if f.reader != nil { // a side broke just before disarm, which has stopped the timer
		f.reader.look.Reset(resetGrace)
	}
	f.mu.Unlock()
	f.arm()
	f.userspace()
}

// leaveLoop takes f off the loop of its socket, if it is still there and was asked to leave.
func (f *flow) leaveLoop(down *loop.Socket) {
	down.Loop().Do(func() (then func()) {
		if f.isIn(onLoop) && f.counters.isAsked() {
			then = f.departOn()
		}
		return then
	})
}

// departOn takes f off its loop, which the caller has to itself. then gives it to who has asked for it; if it
// can't leave, pumps go on.
func (f *flow) departOn() (then func()) {
	down, up := f.leave(inTransit)
	f.toPoller(down, up)
	return func() {
		if !f.disarm() || !f.departFromPoller() {
			f.goOn()
		}
	}
}
