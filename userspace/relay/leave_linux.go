package relay

import (
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
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
	f.mu.Lock()
	down, up, err := f.copyConns()
	f.mu.Unlock()
	if err != nil {
		f.counters.refuseLeave(f.counters.leave.Load(), err)
		return false
	}
	q, p := f.pack(tcpsock.NewBare(down), tcpsock.NewBare(up))
	if q == nil {
		unix.Close(down)
		unix.Close(up)
		return false
	}
	f.down.conn.Close() // out of Go's poller
	f.up.conn.Close()
	f.forgetRecord()
	q.gave(p, nil)
	return true
}

// goOn has pumps go on with f, which is in transit, and was disarmed.
func (f *flow) goOn() {
	f.mu.Lock()
	if f.reader != nil { // a side broke just before disarm, which has stopped the timer
		f.reader.recheck.Reset(tcpsock.ResetGrace)
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
	down.Detach()
	up.Detach()
	return func() {
		if f.disarm() {
			if q, p := f.pack(tcpsock.NewBare(down.FD()), tcpsock.NewBare(up.FD())); q != nil {
				f.forgetRecord()
				q.gave(p, nil)
				return
			}
		}
		f.poll(down, up)
		f.goOn()
	}
}

// beginBare gives f, which goes on as p, to a datapath or a loop, unless a conn of p is in Go's poller.
func (f *flow) beginBare(p *Parcel) bool {
	down, ok := p.Down.Conn.(*tcpsock.Bare)
	up, ok2 := p.Up.Conn.(*tcpsock.Bare)
	if !ok || !ok2 {
		return false
	}
	if len(f.o.Datapaths)+len(f.choice.Of) > 0 && (down.IsUnix() || up.IsUnix()) {
		f.o.Datapaths, f.choice = nil, datapath.Choice{}
	}
	l := f.relay.loops.Loop()
	downSocket, upSocket := l.NewSocket(down.Take()), l.NewSocket(up.Take())
	tcpsock.KeepUrgent(downSocket.FD())
	tcpsock.KeepUrgent(upSocket.FD())
	f.begin(downSocket, upSocket)
	return true
}

// pollable is c, in Go's poller.
func pollable(c net.Conn) net.Conn {
	if b, ok := c.(*tcpsock.Bare); ok {
		return sockConn{os.NewFile(uintptr(b.Take()), "socket")}
	}
	return c
}
