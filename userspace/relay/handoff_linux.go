package relay

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// offerTalk hands the flow off if a message of s makes it ping-pong, and a datapath has room for all that are. It is
// called with the loop held.
func (s *side) offerTalk(n int) (then func()) {
	f := s.flow
	if f.prefers {
		if !f.talk.prefers(s, n) {
			return nil
		}
		return f.handOff(f.o.WhenTalking[0], func() {})
	}
	talking := f.talk.says(s, n, &f.relay.talkers)
	if talking == 0 {
		return nil
	}
	for _, d := range f.o.WhenTalking {
		if room(d) >= talking {
			return f.handOff(d, f.relay.talkers.gone)
		}
	}
	return nil
}

// handOff takes f off the loop and offers it to d. taken is called if d has it then. It is called with the loop held.
func (f *flow) handOff(d Sockets, taken func()) (then func()) {
	f.relay.calm.remove(f)
	f.onLoop.Store(false)
	down, up := f.down.socket, f.up.socket
	for _, s := range f.sides() {
		s.socket.Detach()
		s.socket = nil // a ctx that ends meanwhile is seen by who has the flow then
	}
	return func() {
		f.disarm()
		h := &handoff{f: f, to: d}
		count, err := d.SpliceSockets(f.ctx, down.FD(), up.FD(), h.record())
		if h.answered(count, err) {
			taken()
			return
		}
		f.talk.turns = -talkAgain
		f.attachTo(down, up)
	}
}

// takeBack goes on with a flow that a datapath gives back.
func (f *flow) takeBack(down, up int, downRest, upRest []byte) {
	f.down.rest, f.up.rest = downRest, upRest
	l := f.relay.loops.Loop()
	f.attachTo(l.NewSocket(down), l.NewSocket(up))
}

// calmDown gives f, both of whose sides are parked, back to a loop, where a datapath may have it again. It is called
// by the last pump, which still counts as one.
func (f *flow) calmDown() {
	unwatch(&f.down)
	unwatch(&f.up)
	var down, up *loop.Socket
	if f.disarm() {
		down, up = f.socketsOnLoop()
	}
	f.mu.Lock()
	if up == nil || f.end != "" {
		f.noCalm = true
		if f.grace != nil { // a side broke just before disarm, which has stopped the timer
			f.grace.Reset(resetGrace)
		}
		f.mu.Unlock()
		for _, s := range []*loop.Socket{down, up} {
			if s != nil {
				s.Close()
			}
		}
		f.arm()
		f.userspace()
		return
	}
	f.over = true
	f.mu.Unlock()
	f.down.conn.Close()
	f.up.conn.Close()
	f.resumed().attachTo(down, up)
}

// calmFlows are the flows on loops that prefer a datapath. Those that are quiet are handed off: they may never be
// ping-pong.
type calmFlows struct {
	mu    sync.Mutex
	flows map[*flow]*calmFlow
	looks bool // run does, and ends when there are no flows
}

type calmFlow struct {
	on     *loop.Loop
	moved  int64 // at the last look
	looked bool  // there was one since it came
}

// add is called with the loop held when f is on l.
func (c *calmFlows) add(f *flow, l *loop.Loop) {
	if !f.prefers {
		return
	}
	up, down := f.counters.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flows == nil {
		c.flows = make(map[*flow]*calmFlow)
	}
	c.flows[f] = &calmFlow{on: l, moved: up + down}
	if !c.looks {
		c.looks = true
		time.AfterFunc(calmWithin, c.look)
	}
}

// remove is called with f's loop held when f leaves that.
func (c *calmFlows) remove(f *flow) {
	if !f.prefers {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.flows, f)
}

// look hands off the flows that are quiet, and looks again later while there are flows.
func (c *calmFlows) look() {
	for f, l := range c.quiet() {
		f.offerQuiet(l)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.looks = len(c.flows) > 0; c.looks {
		time.AfterFunc(calmWithin, c.look)
	}
}

// quiet gives the flows that have moved something since the last look, but little, and were there then. One that has
// come since may be in the middle of bulk, and has had no time to move much.
func (c *calmFlows) quiet() map[*flow]*loop.Loop {
	quiet := make(map[*flow]*loop.Loop)
	c.mu.Lock()
	defer c.mu.Unlock()
	for f, at := range c.flows {
		up, down := f.counters.Load()
		if moved := up + down - at.moved; at.looked && moved > 0 && moved <= calmBytes {
			quiet[f] = at.on
		}
		at.moved, at.looked = up+down, true
	}
	return quiet
}

// offerQuiet hands f off, if it is still on l and both its streams go on.
func (f *flow) offerQuiet(l *loop.Loop) {
	l.Do(func() (then func()) {
		if !f.onLoop.Load() || f.down.state != flowing || f.up.state != flowing || f.talk.turns < 0 {
			return nil
		}
		for _, s := range f.sides() {
			if n, err := unix.IoctlGetInt(s.socket.FD(), unix.SIOCINQ); n > 0 || err != nil {
				return nil // it has just come here, and may have been read in the middle of an skb
			}
		}
		return f.handOff(f.o.WhenTalking[0], func() {})
	})
}
