package server

import (
	"context"
	"errors"
	"maps"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/handover"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

const (
	// Flows are measured this long after the first time, and then at longer intervals.
	measureSoon  = 50 * time.Millisecond
	measureEvery = 500 * time.Millisecond
	// interactiveBytes is how much a flow moves at most between two measurements that goes before bulk.
	interactiveBytes = 64 << 10

	// So many flows of each class at a time are asked to leave, or on their way: each waits for all of them,
	// and bulk takes its time.
	idleLeaving        = 64
	interactiveLeaving = 4
	bulkLeaving        = 16
	// mostMoving is for flows that move bytes: one more is asked to leave when fewer are on their way.
	mostMoving = 4
	// Idle flows go so many for each processor at a time. Then others have it for idlePause: the flows that
	// move bytes, here and in the other process, and what else runs on the machine.
	idleTogether = 16
	idlePause    = 4 * time.Millisecond

	leaveWait = 5 * time.Second // for a moment at which nothing of a flow is held here
	// giveAgain is for a flow that the other process did not take, since it stood still meanwhile: twice as
	// long each time, up to mostGiveAgain.
	giveAgain     = 2 * time.Second
	mostGiveAgain = 30 * time.Second
)

// giver is a [*handover.Giver].
type giver interface {
	Give(f *handover.Flow, gone func(error))
	Lost() <-chan struct{}
	Answers() bool
}

// GiveFlows gives the flows of sni and tcp listeners to another process, those that begin meanwhile, too,
// until ctx ends or to is lost. What can't go goes on here. It returns when no flow is on its way.
func (srv *Server) GiveFlows(ctx context.Context, to giver) {
	g := newGiving(ctx, srv, to)
	g.run()
	g.open.Wait()
	if n := g.given.Load(); n > 0 {
		srv.log.Info("flows have gone to the process that has taken over", "flows", n)
	}
}

// giving is one run of [Server.GiveFlows].
type giving struct {
	ctx   context.Context
	srv   *Server
	to    giver
	begin time.Time
	// Classes of flows, in the order in which they go: those that are idle first, and those that move much
	// last, for a flow on its way waits for those before it.
	idle, interactive, bulk class

	moved  map[*spliced]int64 // bytes of each flow when it was measured last
	moving atomic.Int32       // flows on their way, whose bytes nobody moves
	open   sync.WaitGroup     // flows of which it is not known yet whose they will be
	given  atomic.Int64
}

// class is flows that move alike.
type class struct {
	flows  []*spliced    // as measured last
	slots  chan struct{} // each flow that leaves has one; those in the channel are free
	moving int32         // flows of it go while fewer than so many of any class are on their way
	pauses bool          // others have the processors now and then
}

func newClass(slots int, moving int32, pauses bool) class {
	c := class{slots: make(chan struct{}, slots), moving: moving, pauses: pauses}
	for range slots {
		c.slots <- struct{}{}
	}
	return c
}

func newGiving(ctx context.Context, srv *Server, to giver) *giving {
	g := &giving{ctx: ctx, srv: srv, to: to, begin: time.Now(), moved: map[*spliced]int64{},
		idle:        newClass(idleLeaving, math.MaxInt32, true),
		interactive: newClass(interactiveLeaving, mostMoving, false),
		bulk:        newClass(bulkLeaving, mostMoving, false)}
	g.measure()
	return g
}

// run gives flows as they are measured, again and again, until ctx ends or the other process is lost.
func (g *giving) run() {
	for wait := measureSoon; await(g, time.After(wait)); wait = measureEvery {
		if !g.to.Answers() { // each would stand still for nothing
			continue
		}
		g.measure()
		if !g.giveClass(&g.idle) || !g.giveClass(&g.interactive) || !g.giveClass(&g.bulk) {
			return
		}
	}
}

// await waits for c. goesOn is false where ctx has ended, or the other process is lost, before.
func await[T any](g *giving, c <-chan T) (goesOn bool) {
	select {
	case <-g.ctx.Done():
		return false
	case <-g.to.Lost():
		return false
	case <-c:
		return true
	}
}

// measure sorts the flows that may be given by whether they have moved nothing, little or much since the last
// time. Those that could not leave count as bulk, and new ones as interactive.
func (g *giving) measure() {
	g.idle.flows, g.interactive.flows, g.bulk.flows = nil, nil, nil
	live := map[*spliced]bool{}
	for _, fl := range g.srv.flows.Live() {
		s, ok := fl.Killer.(*spliced)
		if !ok || s.isLeaving.Load() {
			continue
		}
		live[s] = true
		c := g.classOf(s)
		c.flows = append(c.flows, s)
	}
	maps.DeleteFunc(g.moved, func(s *spliced, _ int64) bool { return !live[s] })
}

// classOf is for measure.
func (g *giving) classOf(s *spliced) *class {
	up, down := s.Load()
	before, isKnown := g.moved[s]
	g.moved[s] = up + down
	switch n := up + down - before; {
	case s.stays.Load():
		return &g.bulk
	case isKnown && n == 0:
		return &g.idle
	case !isKnown || n <= interactiveBytes:
		return &g.interactive
	}
	return &g.bulk
}

// giveClass has the flows of c leave, and waits until each may. goesOn is as await's.
func (g *giving) giveClass(c *class) (goesOn bool) {
	together := 0
	for _, s := range c.flows {
		if n := s.notTaken.Load(); n != nil && n.at.After(g.begin) && !n.isOver(time.Now()) {
			continue
		}
		if together++; c.pauses && together > idleTogether*g.srv.opts.Loops.Len() {
			together = 1
			if !await(g, time.After(idlePause)) {
				return false
			}
		}
		if !g.takeSlot(c) {
			return false
		}
		g.open.Add(1)
		g.give(s, func(err error) {
			if err == nil {
				g.given.Add(1)
			} else {
				g.srv.log.Debug("a flow stays in this process", "id", s.flow.ID, "err", err)
			}
			c.slots <- struct{}{}
			g.open.Done()
		})
	}
	return true
}

// takeSlot waits until one more flow of c may leave. goesOn is as await's.
func (g *giving) takeSlot(c *class) (goesOn bool) {
	for g.moving.Load() >= c.moving {
		if !await(g, time.After(time.Millisecond)) {
			return false
		}
	}
	return await(g, c.slots)
}

// notTaken is when a flow was last not taken by another process, and how often that was so before.
type notTaken struct {
	at    time.Time
	times int
}

// isOver reports whether the flow may be offered again.
func (n *notTaken) isOver(now time.Time) bool {
	return now.Sub(n.at) >= min(giveAgain<<min(n.times, 10), mostGiveAgain)
}

// again is n for a flow that was not taken once more.
func (n *notTaken) again(now time.Time) *notTaken {
	if n == nil {
		return &notTaken{at: now}
	}
	return &notTaken{now, n.times + 1}
}

// give gives s away, and calls over when it is known whose it is.
func (g *giving) give(s *spliced, over func(error)) {
	if s.isLeaving.Swap(true) {
		over(errors.New("it is on its way"))
		return
	}
	ctx, cancel := context.WithTimeout(g.ctx, leaveWait)
	s.Leave(ctx, func(p *relay.Parcel, err error) {
		cancel()
		s.stays.Store(err != nil)
		if err != nil {
			s.isLeaving.Store(false)
			over(err)
			return
		}
		g.handOver(s, p, over)
	})
}

// handOver gives s, which has left as p, to the other process, unless it was killed meanwhile: then it ends
// here. It does not block.
func (g *giving) handOver(s *spliced, p *relay.Parcel, over func(error)) {
	stay := func(why error) {
		s.isLeaving.Store(false)
		g.srv.resume(s, p)
		over(why)
	}
	if why := s.Killed(); why != nil {
		go stay(why)
		return
	}
	g.moving.Add(1)
	r := s.record(p)
	r.IsKilled = func() bool { return s.Killed() != nil }
	g.to.Give(r, func(err error) {
		g.moving.Add(-1)
		if err != nil {
			s.notTaken.Store(s.notTaken.Load().again(time.Now()))
			stay(err)
			return
		}
		s.remove()
		if s.Killed() != nil { // just now: the other process learns it by its sockets
			tcpsock.ResetConn(p.Down.Conn)
			tcpsock.ResetConn(p.Up.Conn)
		}
		p.Down.Conn.Close()
		p.Up.Conn.Close()
		s.in.release()
		over(nil)
	})
}
