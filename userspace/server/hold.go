package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

const (
	// heldMost bounds the connections and requests that wait, in all, and heldPerSource those of one source:
	// who reloads a page doesn't queue up for ever, nor take the places of others.
	heldMost      = 256
	heldPerSource = 32
	// holdFirst bounds the first try, which is often the only one.
	holdFirst = 4 * time.Second
	// holdTry bounds each further try: one that began before the node was back would wait for TCP's next,
	// later and later, repetition.
	holdTry = 2 * time.Second
	// holdPause is the longest pause after a try that fails at once, and how often it is looked whether the
	// client still waits. Pauses begin with holdPauseMin, also when something has changed.
	holdPause    = 250 * time.Millisecond
	holdPauseMin = 50 * time.Millisecond
)

// errLeft is why a connection waits no more.
var errLeft = errors.New("the client has left while its connection waited for the target")

// held is a connection or a request that may wait for its target.
type held struct {
	what     string // "connection" or "request"
	listener string
	rule     *plan.Rule
	who      plan.Visitor
	until    time.Time
	left     func() bool // whether its client has left
}

// room is where those wait who want the same target. One of them tries to connect, the others wait for that.
type room struct {
	turn    chan struct{} // has one value while somebody tries
	back    chan struct{} // closed and replaced when somebody was connected: guarded by rooms.mu
	waiting int           // guarded by rooms.mu
}

// rooms are the rooms in which somebody waits.
type rooms struct {
	mu sync.Mutex
	// +checklocks:mu
	all map[string]*room
	// +checklocks:mu
	moved chan struct{} // closed and replaced when what is tried may do now
}

func newRooms() *rooms { return &rooms{all: map[string]*room{}, moved: make(chan struct{})} }

// enter returns the room of that name, which leave leaves.
func (rs *rooms) enter(name string) *room {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.all[name]
	if r == nil {
		r = &room{turn: make(chan struct{}, 1), back: make(chan struct{})}
		rs.all[name] = r
	}
	r.waiting++
	return r
}

func (rs *rooms) leave(name string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.all[name]
	if r.waiting--; r.waiting == 0 {
		delete(rs.all, name)
	}
}

// signals are closed when somebody in r was connected, and when something has changed.
func (rs *rooms) signals(r *room) (back, moved <-chan struct{}) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return r.back, rs.moved
}

// isBack has all in r try for themselves.
func (rs *rooms) isBack(r *room) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	close(r.back)
	r.back = make(chan struct{})
}

// move has those who try do so at once: the tailnet or the containers have changed, or a target is healthy.
func (rs *rooms) move() {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if len(rs.all) > 0 {
		close(rs.moved)
		rs.moved = make(chan struct{})
	}
}

// hold calls try, which connects to w's target, until it succeeds, w's time is up or its client has left.
func (srv *Server) hold(ctx context.Context, w *held, try func(context.Context) error) error {
	ctx, stop := w.whileThere(ctx)
	defer stop()
	first := holdFirst
	if w.rule.Wake.IsLAN() {
		first = lanFirst
	}
	err := tryFor(ctx, first, try)
	if err == nil {
		return nil
	}
	return srv.await(ctx, w, err, try)
}

// await is hold for who has tried already, with err.
func (srv *Server) await(ctx context.Context, w *held, err error, try func(context.Context) error) error {
	switch {
	case context.Cause(ctx) == errLeft:
		return fmt.Errorf("%w: %w", errLeft, err)
	case !mayComeBack(err) || !time.Now().Before(w.until):
		return err
	}
	place, full := srv.heldBy.Acquire(w.who.Source())
	if full != nil {
		srv.tellFull(w, full)
		return err
	}
	defer place.Release()
	srv.limited.Warn("held "+w.rule.Written, "a "+w.what+" waits for a target that can't be reached", "listener", w.listener,
		"route", w.rule.Name, "target", w.rule.Written, "hold", w.rule.Hold.String(), "err", err)
	inTime, cancel := context.WithDeadline(ctx, w.until)
	defer cancel()
	err = srv.rooms.wait(inTime, w.room(), err, func(ctx context.Context) error {
		srv.wakeMachine(ctx, w.rule)
		return try(ctx)
	})
	if err != nil && context.Cause(ctx) == errLeft {
		return fmt.Errorf("%w: %w", errLeft, err)
	}
	return err
}

// tellFull says in the log that w can't wait.
func (srv *Server) tellFull(w *held, full error) {
	key, msg, most := "hold", "too many wait for targets that can't be reached: this "+w.what+" does not wait", heldMost
	if errors.Is(full, limit.ErrSource) {
		key, msg, most = "hold_source", "too many of one source wait for targets that can't be reached: this "+w.what+" does not wait", heldPerSource
	}
	srv.limited.Warn(key, msg, "listener", w.listener, "route", w.rule.Name, "client", w.who.Client, "waiting", most)
}

// room is the name of the room in which w waits: of its target, and with the client's own address its own.
func (w *held) room() string {
	if w.rule.Transparent {
		return w.rule.Written + " from " + w.who.Client.String()
	}
	return w.rule.Written
}

// whileThere ends with the client, whom it asks about every holdPause.
func (w *held) whileThere(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(holdPause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if w.left() {
					cancel(errLeft)
				}
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// wait calls try until it succeeds or ctx ends. err is why it has failed before. Of all who wait in the room
// of that name one tries again and again, in the others' place, and each of them once that has succeeded.
func (rs *rooms) wait(ctx context.Context, name string, err error, try func(context.Context) error) error {
	r := rs.enter(name)
	defer rs.leave(name)
	for {
		back, _ := rs.signals(r)
		select {
		case <-ctx.Done():
			return err
		case r.turn <- struct{}{}:
			defer func() { <-r.turn }()
			return rs.lead(ctx, r, err, try)
		case <-back:
			again := tryFor(ctx, holdTry, try)
			switch {
			case again == nil:
				return nil
			case ctx.Err() != nil:
				return err
			case !mayComeBack(again):
				return again
			}
			err = again
		}
	}
}

// lead is wait for the one whose turn it is.
func (rs *rooms) lead(ctx context.Context, r *room, err error, try func(context.Context) error) error {
	for pause := holdPauseMin; ; pause = min(2*pause, holdPause) {
		_, moved := rs.signals(r)
		select {
		case <-ctx.Done():
			return err
		case <-moved:
			pause = holdPauseMin
		case <-time.After(pause):
		}
		again := tryFor(ctx, holdTry, try)
		switch {
		case again == nil:
			rs.isBack(r)
			return nil
		case ctx.Err() != nil:
			return err
		case !mayComeBack(again):
			return again
		}
		err = again
	}
}

func tryFor(ctx context.Context, d time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return try(ctx)
}

// mayComeBack says whether an error of dialling a target, or of all of several, is that of one which is known
// and does not answer: asleep, between networks, stopped or starting.
func mayComeBack(err error) bool {
	if several, ok := errors.AsType[targetErrors](err); ok {
		return slices.ContainsFunc(several, mayComeBack)
	}
	de, ok := errors.AsType[*dial.Error](err)
	if !ok {
		return false
	}
	switch de.Reason {
	case dial.NodeOffline, dial.Timeout, dial.Unreachable, dial.Refused, dial.NoSocket, dial.ContainerStopped,
		dial.ContainerStarting, dial.UnknownContainer, dial.ContainerUnreachable:
		// one is removed before it is made anew
		return true
	}
	return false
}

// hasLeft reports whether nobody waits for in any more. On a tcp listener a client may have ended its stream
// and wait for the answer.
func (in *stream) hasLeft() bool {
	if in.service.Mode != "tcp" {
		return in.Gone()
	}
	closed := false
	open := tcpsock.Control(in.TCPConn, func(fd int) { closed = tcpsock.IsClosed(fd) })
	return closed || !open
}

// dialTarget connects to r's target, or to one of several, which it returns as a rule with that one alone.
// Where the route has hold, the connection waits while none can be reached.
func (srv *Server) dialTarget(in *stream, r *plan.Rule) (one *plan.Rule, up net.Conn, err error) {
	try := func(ctx context.Context) error {
		one, up, err = srv.tryTarget(ctx, in.conn, r)
		return err
	}
	if r.Hold == 0 {
		try(srv.ctx)
		return one, up, err
	}
	err = srv.hold(srv.ctx, &held{"connection", in.listener.name, r, in.visitor(), time.Now().Add(r.Hold), in.hasLeft}, try)
	return one, up, err
}

// dialUpstream connects to the upstream of a request. Where the route has hold and no other upstream, the
// request waits for one that can't be reached as long as nothing of its body has been read and the client is
// there.
func (srv *Server) dialUpstream(ctx context.Context, listener string, r *plan.Rule, who plan.Visitor) (up net.Conn, err error) {
	try := func(ctx context.Context) error {
		up, err = srv.dialRule(ctx, listener, r, who)
		return err
	}
	switch {
	case r.Hold == 0:
		try(ctx)
	case r.Health != nil: // one of several
		tryFor(ctx, holdFirst, try)
	default:
		err = srv.hold(ctx, heldRequest(ctx, listener, r, who, time.Now()), try)
	}
	return up, err
}

func heldRequest(ctx context.Context, listener string, r *plan.Rule, who plan.Visitor, since time.Time) *held {
	return &held{"request", listener, r, who, since.Add(r.Hold), func() bool { return vhost.ClientLeft(ctx) }}
}

// awaitUpstreams is what requests of r do that none of several upstreams has taken: they wait for one.
func (srv *Server) awaitUpstreams(listener string, r *plan.Rule) func(ctx context.Context, since time.Time, errs []error) bool {
	return func(ctx context.Context, since time.Time, errs []error) bool {
		w := heldRequest(ctx, listener, r, requesterOf(ctx), since)
		ctx, stop := w.whileThere(ctx)
		defer stop()
		return srv.await(ctx, w, targetErrors(errs), func(ctx context.Context) error { return srv.reachOne(ctx, w) }) == nil
	}
}

// reachOne connects to all targets of w's rule at once, until one has answered, which gets the next request.
func (srv *Server) reachOne(ctx context.Context, w *held) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan error, len(w.rule.Several))
	for _, one := range w.rule.Several {
		go func() {
			up, err := srv.dialRule(ctx, w.listener, one, w.who)
			if err == nil {
				up.Close()
				one.Health.Worked()
			}
			answers <- err
		}()
	}
	var errs targetErrors
	for range w.rule.Several {
		err := <-answers
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errs
}
