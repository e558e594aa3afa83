package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/userspace/handover"
)

// tellEvery is how often a process that another one has taken over from tells what it has left.
const tellEvery = time.Second

// outlive lets the flows end after next has taken over. It returns next where this process is waited for,
// by a supervisor that knows of no other.
func (d *process) outlive(next *successor, signals <-chan os.Signal) (*supervised, error) {
	after := &supervised{Successor: next.Successor, newest: next.PID, told: make(chan *handover.Message)}
	stays := d.isFirst && !isSupervised()
	deadline := time.Now().Add(next.drain)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cut := time.AfterFunc(next.drain, cancel)
	defer cut.Stop()
	shorten := func(to time.Duration) {
		if at := time.Now().Add(to); at.Before(deadline) {
			deadline = at
			cut.Reset(to)
		}
	}
	d.log.Info("another process has taken over: no new connections here", "pid", next.PID,
		"flows", d.server.Flows().Len(), "deadline", next.drain.String())
	told, gives := after.told, giving{process: d}
	after.note(next.newest)
	gives.follow(ctx, next.Link, next.newest)
	go after.listen()
	for isQueued := true; isQueued; { // signals for the daemon that came before
		select {
		case s := <-signals:
			next.Signal(s)
		default:
			isQueued = false
		}
	}
	drained := make(chan error, 1)
	go func() { drained <- d.server.Drain(ctx) }()
	tellLate := func() {
		d.server.TellLate(func(late json.RawMessage) error {
			return next.Send(handover.Message{Step: handover.State, State: late})
		})
	}
	tell := func(isOver bool) {
		tellLate()
		flows, connections := d.server.Remaining()
		next.Send(handover.Message{Step: handover.Left, Ended: isOver, Remains: &handover.Remains{PID: os.Getpid(),
			Version: version(), Flows: flows, Connections: connections, Deadline: deadline}})
	}
	tell(false)
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	had := map[os.Signal]bool{}
	var lost error // the newest process has ended
	isToEnd := false
	for {
		select {
		case err := <-drained:
			d.control.finish()
			if err != nil {
				d.log.Warn("ended", "err", err)
			} else {
				d.log.Info("ended: all flows had finished")
			}
			if !stays {
				tellLate()
				next.Close()
				return nil, lost
			}
			tell(true)
			return after, nil
		case <-tick.C:
			tell(false)
		case m, ok := <-told:
			switch {
			case !ok: // the newest one has ended, or crashed
				told = nil
				shorten(d.options.drain)
				if !isToEnd { // nobody accepts connections until another daemon is started
					lost = fmt.Errorf("the process that had taken over from %d has ended without a word",
						os.Getpid())
					if isSupervised() {
						shorten(0)
					}
				}
			case m.Step == handover.End:
				isToEnd = true
				shorten(time.Duration(m.Within) * time.Millisecond)
			default:
				after.note(m)
				gives.follow(ctx, next.Link, m)
				tell(false) // to the newest one, if it is another
			}
		case s := <-signals:
			switch {
			case stays && told != nil: // which has us end as well
				after.signal(s)
			case s == syscall.SIGHUP:
				d.server.ReopenLogs()
			case had[s]:
				cancel()
			default:
				had[s] = true
				shorten(d.options.drain)
				d.log.Info("still draining: the same signal again ends at once", "signal", s.String())
			}
		}
	}
}

// giving has the flows of a process go to the newest one.
type giving struct {
	process *process
	newest  int                // its process id
	stop    context.CancelFunc // nil: nothing goes to it
	ended   chan struct{}      // closed when nothing goes to the one before
}

// follow learns from m, which came by l, which process is the newest, and whether it takes flows: two say so,
// and one of them does not know.
func (g *giving) follow(ctx context.Context, l *handover.Link, m *handover.Message) {
	if m.Step != handover.Newest {
		return
	}
	if m.PID != g.newest && g.stop != nil {
		g.stop()
		g.stop = nil
	}
	if g.newest = m.PID; !m.TakesFlows || g.stop != nil {
		return
	}
	before := g.ended
	g.ended = make(chan struct{})
	ctx, g.stop = context.WithCancel(ctx)
	go func(ended chan struct{}) {
		defer close(ended)
		if before != nil {
			<-before
		}
		g.process.giveFlows(ctx, l)
	}(g.ended)
}

// giveFlows has flows go by l until ctx ends. Where nobody takes them it tries again.
func (d *process) giveFlows(ctx context.Context, l *handover.Link) {
	for ctx.Err() == nil {
		if g, err := l.Give(); err != nil {
			d.log.Debug("no flows can go to the process that has taken over", "err", err)
		} else {
			d.server.GiveFlows(ctx, g)
			g.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(tellEvery):
		}
	}
}

// supervised is the newest process of a daemon, for the first one, which a supervisor waits for.
type supervised struct {
	*handover.Successor     // the process after this one, and by it the newest one's messages
	newest              int // its process id
	told                chan *handover.Message
}

// listen hears what the newest process says, until that has ended.
func (s *supervised) listen() {
	defer close(s.told)
	s.Hear(func(m *handover.Message) { s.told <- m })
}

// note learns from m which process is the newest.
func (s *supervised) note(m *handover.Message) {
	if m.Step == handover.Newest && m.PID > 0 {
		s.newest = m.PID
	}
}

// signal passes a signal on, to whichever process is the newest when it reads that.
func (s *supervised) signal(sig os.Signal) {
	if n, ok := sig.(syscall.Signal); ok {
		s.Send(handover.Message{Step: handover.Signal, Signal: int(n)})
	}
}

// follow passes signals on to the newest process until that has ended, and returns an error unless it has
// ended well.
func (s *supervised) follow(signals <-chan os.Signal) error {
	debug.FreeOSMemory()
	ends := make(chan ended)
	go reap(ends)
	gone := s.Gone()
	states := map[int]syscall.WaitStatus{}
	see := func() { // the process after this one is waited for by its own
		gone = nil
		if state := s.State(); state != nil {
			states[s.PID] = state.Sys().(syscall.WaitStatus)
		}
	}
	for {
		select {
		case sig := <-signals:
			s.signal(sig)
		case m, ok := <-s.told:
			s.hear(m, ok)
		case <-gone:
			see()
		case e, ok := <-ends:
			if ok {
				states[e.pid] = e.status
				break
			}
			<-s.Gone() // no child is left
			see()
			if _, isKnown := states[s.newest]; !isKnown {
				return fmt.Errorf("process %d, which had taken over, has ended", s.newest)
			}
		}
		if status, isOver := states[s.newest]; isOver {
			if s.isFollowed() {
				continue
			}
			if status != 0 {
				return fmt.Errorf("process %d, which had taken over, has ended: %s", s.newest, says(status))
			}
			return nil
		}
	}
}

// hear notes what was told, if something was.
func (s *supervised) hear(m *handover.Message, ok bool) {
	if !ok {
		s.told = nil
		return
	}
	s.note(m)
	if m.Step == handover.Newest { // which does not know yet that nothing is left here
		s.tellEnded()
		time.AfterFunc(tellEvery, s.tellEnded) // the one before it may have read the first
	}
}

// tellEnded tells the newest process that nothing is left here.
func (s *supervised) tellEnded() {
	s.Send(handover.Message{Step: handover.Left, Ended: true, Remains: &handover.Remains{PID: os.Getpid(), Version: version()}})
}

// isFollowed hears what has been said until now, and reports whether there was something: that a process is
// the newest may be known later here than that the one before it has ended.
func (s *supervised) isFollowed() bool {
	if s.told == nil {
		return false
	}
	select {
	case m, ok := <-s.told:
		s.hear(m, ok)
		return true
	case <-time.After(toldWait):
		return false
	}
}

// toldWait is how long the first process waits for word of another newest one when the newest has ended.
const toldWait = 100 * time.Millisecond

func says(status syscall.WaitStatus) string {
	if status.Signaled() {
		return status.Signal().String()
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}

// ended is a child that has ended.
type ended struct {
	pid    int
	status syscall.WaitStatus
}

// reap waits for all children, for as long as this process lives.
func reap(ends chan<- ended) {
	defer close(ends)
	for {
		var e ended
		var err error
		if e.pid, err = syscall.Wait4(-1, &e.status, 0, nil); err == nil {
			ends <- e
		} else if err != syscall.EINTR {
			return // there are none
		}
	}
}
