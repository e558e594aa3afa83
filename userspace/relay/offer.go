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

// prefer has d record the flow, which d is to have whenever it is ping-pong or quiet.
func (f *flow) prefer(d Sockets, down, up int) bool {
	forget, err := d.Record(down, up, (&handoff{f: f, to: d}).record())
	if err != nil {
		f.refused(d, err)
		return false
	}
	f.prefers, f.o.WhenTalking = true, []Sockets{d}
	f.isRecorded(d, forget)
	f.counters.kernel.Store(f.recorded)
	return true
}

// isRecorded makes f one of d's to the end, whoever moves its bytes.
func (f *flow) isRecorded(d Datapath, forget func()) {
	f.recorded = &holder{d.Name(), f.counters.own}
	done := f.done
	f.done = func(r Result) {
		forget()
		r.Datapath = d.Name()
		done(r)
	}
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
		Buffer: f.o.Buffer, Idle: f.o.Idle, Busy: busyBytes, Moved: f.counters.own,
		Ended: func(up, down int64, end string, err error) {
			h.settle(up, down, nil)
			f.report(Result{Up: up, Down: down, End: End(end), Err: err, Datapath: h.to.Name()})
		},
		Returned: func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, forget func(), reason error) {
			g := f.resumed()
			if forget != nil && g.recorded == nil {
				g.isRecorded(h.to, forget)
			}
			h.settle(upBytes, downBytes, g.recorded)
			f.refused(h.to, reason)
			g.takeBack(down, up, downRest, upRest)
		},
	}
}

// resumed is f with nothing of what it was before: nobody has a hand in that any more but for those who come late.
func (f *flow) resumed() *flow {
	o := f.o
	o.Counters = f.counters
	g := f.relay.newFlow(f.ctx, nil, nil, o, f.done)
	g.recorded, g.prefers = f.recorded, f.prefers
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
