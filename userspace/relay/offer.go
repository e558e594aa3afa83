package relay

import "net"

// canOffer reports whether a kernel datapath could have the flow.
func (f *flow) canOffer() bool { return f.isTCP() && len(f.o.Datapaths) > 0 }

// isTCP: both conns are bare TCP.
func (f *flow) isTCP() bool {
	_, ok1 := f.down.conn.(*net.TCPConn)
	_, ok2 := f.up.conn.(*net.TCPConn)
	return ok1 && ok2
}

// offer offers the flow to the kernel datapaths, and reports whether one of them has it.
func (f *flow) offer() bool {
	f.disarm() // who has the flow looks after its end
	for _, d := range f.o.Datapaths {
		if f.ending() {
			return false
		}
		if f.offerTo(d) {
			return true
		}
	}
	f.arm()
	return false
}

func (f *flow) offerTo(d Datapath) bool {
	count, err := d.Splice(f.ctx, f.down.conn.(*net.TCPConn), f.up.conn.(*net.TCPConn), f.told(d))
	return f.offered(d, count, err)
}

// told is what d is told of f.
func (f *flow) told(d Datapath) Flow {
	return Flow{
		ID: f.o.ID, Route: f.o.Route,
		Up: f.counters.up.Load(), Down: f.counters.down.Load(),
		Buffer: f.o.Buffer, Idle: f.o.Idle,
		Ended: func(up, down int64, end string, err error) {
			f.settle(up, down)
			f.done(Result{Up: up, Down: down, End: End(end), Err: err, Datapath: d.Name()})
		},
		Returned: func(downConn, upConn *net.TCPConn, up, down int64, reason error) {
			f.settle(up, down)
			f.refused(d, reason)
			f.down.init(f, downConn)
			f.up.init(f, upConn)
			go func() {
				f.arm()
				f.userspace()
			}()
		},
	}
}

// offered takes d's answer.
func (f *flow) offered(d Datapath, count func() (up, down int64), err error) bool {
	if err != nil {
		f.refused(d, err)
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.settled {
		f.counters.kernel.Store(&holder{d.Name(), count})
	}
	return true
}

func (f *flow) refused(d Datapath, reason error) {
	if f.o.Refused != nil {
		f.o.Refused(d.Name(), reason)
	}
}

// settle ends the time in which a datapath counts. It may come before Splice has returned.
func (f *flow) settle(up, down int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settled = true
	f.counters.up.Store(up)
	f.counters.down.Store(down)
	f.counters.kernel.Store(nil)
}
