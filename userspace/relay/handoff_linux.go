package relay

import (
	"errors"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// attach gives f, which is in transit, to a datapath or a loop, if there can be one.
func (f *flow) attach() bool {
	if !f.parkable() {
		return false
	}
	_, isUnix := f.down.conn.(*net.UnixConn)
	if _, ok := f.up.conn.(*net.UnixConn); ok || isUnix {
		f.o.Datapaths, f.choice = nil, datapath.Choice{}
	}
	if len(f.o.Datapaths) > 0 && f.counters.Killed() == nil {
		if err := f.writeHead(); err != nil {
			f.broken(&f.up, err)
			return false
		}
	}
	if !f.disarm() {
		return false
	}
	down, up := f.socketsOnLoop()
	if up == nil {
		f.arm()
		return false
	}
	f.down.conn.Close() // out of Go's poller, which would wake for each message
	f.up.conn.Close()
	f.begin(down, up)
	return true
}

// socketsOnLoop makes new descriptors of both sockets, for a loop; nil if there can be none.
func (f *flow) socketsOnLoop() (down, up *loop.Socket) {
	downFD, err := tcpsock.Dup(f.down.sock)
	if err != nil {
		return nil, nil
	}
	upFD, err := tcpsock.Dup(f.up.sock)
	if err != nil {
		unix.Close(downFD)
		return nil, nil
	}
	l := f.relay.loops.Loop()
	return l.NewSocket(downFD), l.NewSocket(upFD)
}

// begin writes what comes first, and gives f, which is in transit, to the datapath that takes it as it
// begins, or to the loop of its sockets. One that may have it later records it first.
func (f *flow) begin(down, up *loop.Socket) {
	if f.counters.Killed() != nil {
		f.attachTo(down, up) // which ends it
		return
	}
	if err := f.writeFirst(up.FD()); err != nil && err != unix.EAGAIN { // else attachTo sees to what is left
		down.Loop().Do(func() (then func()) { return f.pumpsAfter(down, up, f.breaking("write to", &f.up, err)) })
		return
	}
	for _, d := range f.o.Datapaths {
		if r, ok := d.(datapath.Returner); ok {
			if f.prefer(r, down, up) {
				break
			}
		} else if f.elsewhere != nil && f.elsewhere.isWet {
			f.addLater(d)
		} else if f.offer(d, down, up) {
			return
		}
	}
	f.attachTo(down, up)
}

// offerLater offers f again to those that may take it now.
func (f *flow) offerLater(down, up *loop.Socket) (accepted bool) {
	if f.elsewhere == nil {
		return false
	}
	for range f.elsewhere.later { // those that refuse for now come behind
		d := f.elsewhere.later[0]
		f.elsewhere.later = f.elsewhere.later[1:]
		if f.offer(d, down, up) {
			return true
		}
	}
	return false
}

// mayLater reports whether a datapath that has refused f, with err, may take it later.
func (f *flow) mayLater(err error) bool {
	var later interface{ Later(isNew bool) bool }
	return errors.As(err, &later) && later.Later(f.elsewhere == nil)
}

// preferAny has the first datapath that gives flows back record f, which another one has had.
func (f *flow) preferAny(down, up *loop.Socket) {
	for _, d := range f.o.Datapaths {
		if r, ok := d.(datapath.Returner); ok && f.prefer(r, down, up) {
			return
		}
	}
}

// prefer has d record the flow, which d is to have whenever it is ping-pong or quiet.
func (f *flow) prefer(d datapath.Returner, down, up *loop.Socket) bool {
	forget, err := d.Record(down.FD(), up.FD(), f.handoff(d))
	if err != nil {
		f.o.Refused(d.Name(), err)
		return false
	}
	f.choice = datapath.Choice{Of: []datapath.Returner{d}, Prefers: true}
	f.keepRecord(d, forget)
	f.counters.kernel.Store(f.recorded)
	return true
}

// keepRecord makes f one of d's to the end, whoever moves its bytes.
func (f *flow) keepRecord(d datapath.Datapath, forget func()) {
	f.recorded = &holder{d.Name(), f.counters.own, forget}
}

// offer asks d to take f, which is in transit, and is so again if d refuses it. Nobody has the sockets in a
// poller.
func (f *flow) offer(d datapath.Datapath, down, up *loop.Socket) (accepted bool) {
	f.mu.Lock()
	ctx := f.cancelable()
	if f.o.Copied {
		f.handed = hand(down, up)
	}
	f.enter(handedOff)
	cancel := f.cancel
	f.mu.Unlock()
	if f.counters.Killed() != nil {
		cancel(errKilled)
	}
	count, err := d.Splice(ctx, down.FD(), up.FD(), f.handoff(d))
	if err != nil {
		cancel(nil)
		f.o.Refused(d.Name(), err)
		if f.mayLater(err) {
			f.addLater(d)
		}
	}
	f.mu.Lock()
	if err != nil {
		f.enter(inTransit)
	} else if f.state == handedOff { // else it has had the flow
		f.counters.kernel.Store(&holder{name: d.Name(), count: count})
		f.isTaken = true
	}
	f.mu.Unlock()
	if err == nil {
		f.letLeave()
	}
	return err == nil
}

// learnShut is for the sockets of a flow that was recalled from a datapath, which may have passed the end
// of a stream on.
func (f *flow) learnShut(down, up int) {
	if tcpsock.IsShut(down) {
		f.down.isShut.Store(true)
		f.up.state = ended
	}
	if tcpsock.IsShut(up) {
		f.up.isShut.Store(true)
		f.down.state = ended
	}
}

// handoff is what d is told of the flow.
func (f *flow) handoff(d datapath.Datapath) datapath.Handoff {
	f.mu.Lock()
	f.beginIdle()
	lastMoved := f.since.Time()
	f.mu.Unlock()
	return datapath.Handoff{
		ID: f.o.ID, Route: f.o.Route,
		Up: f.counters.up.Load(), Down: f.counters.down.Load(),
		Buffer: f.o.Buffer, Idle: f.o.Idle, LastMoved: lastMoved, Busy: datapath.BusyBytes, Moved: f.counters.own,
		Ended: func(up, down int64, end string, err error) {
			f.settle(up, down, nil)
			result := Result{Up: up, Down: down, Datapath: d.Name()}
			result.End, result.Err = f.endOf(End(end), err)
			f.report(result)
		},
		Recallable: func(recall func()) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.recall = recall
		},
		Returned: func(down, up int, downRest, upRest []byte, upBytes, downBytes int64, lastMoved time.Time,
			forget func(), reason error) {
			g := f.resumed()
			g.seen, g.since = upBytes+downBytes, sinceHere(lastMoved)
			if forget != nil && g.recorded == nil {
				g.keepRecord(d, forget)
			}
			f.settle(upBytes, downBytes, g.recorded)
			g.down.rest, g.up.rest = downRest, upRest
			if f.isRecalled.Load() {
				g.learnShut(down, up)
			} else {
				f.o.Refused(d.Name(), reason)
			}
			l := g.relay.loops.Loop()
			downSocket, upSocket := l.NewSocket(down), l.NewSocket(up)
			if _, ok := d.(datapath.Returner); !ok && !g.counters.isAsked() { // it was to leave, and stays
				g.addLater(d)
				g.preferAny(downSocket, upSocket)
			}
			g.attachTo(downSocket, upSocket)
		},
	}
}

// settle ends the time in which a datapath has f and counts. It may come before Splice has returned.
func (f *flow) settle(up, down int64, next *holder) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enter(done)
	f.cancel(nil)
	f.counters.up.Store(up)
	f.counters.down.Store(down)
	f.counters.kernel.Store(next)
}

// resumed is the flow that goes on where f is done.
func (f *flow) resumed() *flow {
	o := f.o
	o.Counters = f.counters
	g := f.relay.newFlow(f.ctx, nil, nil, o, f.done)
	g.seen, g.since = f.seen, f.since
	if e := f.elsewhere; e != nil {
		g.elsewhere = &elsewhere{later: e.later}
	}
	g.recorded, g.choice = f.recorded, datapath.Choice{Of: f.choice.Of, Prefers: f.choice.Prefers}
	g.down.lasting, g.up.lasting = f.down.lasting, f.up.lasting
	return g
}

// handOff takes f off its loop, which the caller has to itself, and offers it to d.
func (f *flow) handOff(d datapath.Returner) (then func()) {
	down, up := f.leave(inTransit)
	down.Detach()
	up.Detach()
	return func() {
		f.disarm() // a ctx that ends meanwhile is seen by who has the flow then
		if f.offerLater(down, up) || f.offer(d, down, up) {
			f.relay.chooser.Taken(&f.choice)
			return
		}
		f.choice.Refused()
		f.attachTo(down, up)
	}
}

// reattach gives f, whose pumps are gone, to a loop, where a datapath may have it again.
func (f *flow) reattach() {
	unwatch(&f.down)
	unwatch(&f.up)
	var down, up *loop.Socket
	if f.disarm() {
		down, up = f.socketsOnLoop()
	}
	f.mu.Lock()
	if up == nil || f.end != "" {
		f.cannotReattach = true
		f.mu.Unlock()
		if up != nil {
			down.Close()
			up.Close()
		}
		f.goOn()
		return
	}
	f.enter(done)
	f.mu.Unlock()
	f.down.conn.Close()
	f.up.conn.Close()
	f.resumed().attachTo(down, up)
}

// quietSweep hands off the flows on loops that prefer a datapath and are quiet: they may never be ping-pong.
type quietSweep struct {
	mu sync.Mutex
	// +checklocks:mu
	flows map[*flow]int64 // bytes moved when it was swept last; negative: it has come since
	// +checklocks:mu
	isRunning bool // run is called again and again, until there are no flows
}

// add is called when f is on a loop, with that held.
func (q *quietSweep) add(f *flow) {
	if !f.choice.Prefers {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.flows == nil {
		q.flows = make(map[*flow]int64)
	}
	q.flows[f] = -1
	if !q.isRunning {
		q.isRunning = true
		time.AfterFunc(datapath.QuietWithin, q.run)
	}
}

// remove is called with f's loop held when f leaves that.
func (q *quietSweep) remove(f *flow) {
	if !f.choice.Prefers {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.flows, f)
}

func (q *quietSweep) run() {
	for f, l := range q.quiet() {
		f.offerQuiet(l)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.isRunning = len(q.flows) > 0; q.isRunning {
		time.AfterFunc(datapath.QuietWithin, q.run)
	}
}

// quiet gives the flows that have moved something since the last time, but little, and were there then. One
// that has come since may be in the middle of bulk, and has had no time to move much.
func (q *quietSweep) quiet() map[*flow]*loop.Loop {
	quiet := make(map[*flow]*loop.Loop)
	q.mu.Lock()
	defer q.mu.Unlock()
	for f, was := range q.flows {
		up, down := f.counters.Load()
		moved := up + down - was
		if was >= 0 && moved > 0 && datapath.IsQuiet(moved, datapath.QuietWithin) {
			quiet[f] = f.down.socket.Loop()
		}
		q.flows[f] = up + down
	}
	return quiet
}

// offerQuiet hands f off, if it is still on l and both its streams go on.
func (f *flow) offerQuiet(l *loop.Loop) {
	l.Do(func() (then func()) {
		if !f.isIn(onLoop) || f.down.state != flowing || f.up.state != flowing || !f.choice.MayBeOffered(time.Now()) ||
			f.down.hasUnread() || f.up.hasUnread() {
			// it has just come here, and may have been read in part of an skb
			return nil
		}
		return f.handOff(f.choice.Of[0])
	})
}
