package relay

import (
	"net"
	"syscall"
)

// canOffer reports whether a kernel datapath could have the flow.
func (f *flow) canOffer() bool { return f.isTCP() && len(f.o.Datapaths) > 0 }

// isTCP: both conns are bare TCP.
func (f *flow) isTCP() bool {
	_, ok1 := f.down.conn.(*net.TCPConn)
	_, ok2 := f.up.conn.(*net.TCPConn)
	return ok1 && ok2
}

// offer offers the flow to the kernel datapaths, and reports whether one of them has it. One that takes flows while they
// are ping-pong or quiet records it first.
func (f *flow) offer() bool {
	f.disarm() // who has the flow looks after its end
	for _, d := range f.o.Datapaths {
		if f.ending() {
			return false
		}
		if s, ok := d.(Sockets); ok && haveWatches {
			if f.prefer(s, fdOf(f.down.sock), fdOf(f.up.sock)) {
				break
			}
		} else if f.offerTo(d) {
			return true
		}
	}
	f.arm()
	return false
}

func (f *flow) offerTo(d Datapath) bool {
	h := &handoff{f: f, to: d}
	count, err := d.Splice(f.ctx, f.down.conn.(*net.TCPConn), f.up.conn.(*net.TCPConn), h.record())
	return h.answered(count, err)
}

// prefer has d record the flow, which is d's from then on whoever moves its bytes: while it is ping-pong or quiet d does.
func (f *flow) prefer(d Sockets, down, up int) bool {
	own := func() (up, down int64) { return f.counters.up.Load(), f.counters.down.Load() }
	forget, err := d.Record(down, up, (&handoff{f: f, to: d}).record(), own)
	if err != nil {
		f.refused(d, err)
		return false
	}
	f.preferred, f.o.WhenTalking = &holder{d.Name(), own}, []Sockets{d}
	f.counters.kernel.Store(f.preferred)
	done := f.done
	f.done = func(r Result) {
		forget()
		r.Datapath = d.Name()
		done(r)
	}
	return true
}

// A handoff is a flow's stay in a datapath, from the offer on.
type handoff struct {
	f       *flow
	to      Datapath
	settled bool // it is over; guarded by f.mu
}

// record is what the datapath is told of the flow.
func (h *handoff) record() Flow {
	f := h.f
	return Flow{
		ID: f.o.ID, Route: f.o.Route,
		Up: f.counters.up.Load(), Down: f.counters.down.Load(),
		Buffer: f.o.Buffer, Idle: f.o.Idle, Busy: busyBytes,
		Ended: func(up, down int64, end string, err error) {
			h.settle(up, down, nil)
			f.done(Result{Up: up, Down: down, End: End(end), Err: err, Datapath: h.to.Name()})
		},
		Returned: func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, reason error) {
			h.settle(upBytes, downBytes, f.preferred)
			f.refused(h.to, reason)
			f.resumed().takeBack(down, up, downRest, upRest)
		},
	}
}

// resumed is f with nothing of what it was before: nobody has a hand in that any more but for those who come late.
func (f *flow) resumed() *flow {
	g := newFlow(f.ctx, nil, nil, f.o, f.done)
	g.counters, g.preferred = f.counters, f.preferred
	return g
}

// answered takes the datapath's answer, and reports whether it has the flow, or has had it.
func (h *handoff) answered(count func() (up, down int64), err error) bool {
	if err != nil {
		h.f.refused(h.to, err)
		return false
	}
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if !h.settled {
		h.f.counters.kernel.Store(&holder{h.to.Name(), count})
	}
	return true
}

// settle ends the time in which the datapath counts. It may come before Splice has returned.
func (h *handoff) settle(up, down int64, next *holder) {
	c := h.f.counters
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	h.settled = true
	c.up.Store(up)
	c.down.Store(down)
	c.kernel.Store(next)
}

func (f *flow) refused(d Datapath, reason error) {
	if f.o.Refused != nil {
		f.o.Refused(d.Name(), reason)
	}
}

// fdOf is the descriptor of a socket that nobody closes meanwhile.
func fdOf(sock syscall.RawConn) (fd int) {
	sock.Control(func(n uintptr) { fd = int(n) })
	return fd
}
