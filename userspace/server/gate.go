package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/userspace/dial"
)

const whileDownClose = "close" // the word of the config

const (
	// checkEvery is how often the targets of a default are connected to. With checkFall a target that does
	// not answer any more is found in less than 2.5 s, and one that refuses in 1.5 s.
	checkEvery = 500 * time.Millisecond
	// checkLate is when a check that has not been answered counts as one that failed. An answer after that
	// counts, too: a slow line is no dead one.
	checkLate = time.Second
	// checkTimeout is when nobody waits for an answer any more.
	checkTimeout = 4 * time.Second
	checkFall    = 3 // failures in a row that shut the listener
	checkRise    = 2 // successes in a row that open it again; at the start 1
)

// A gate shuts the sockets of a listener while no target of its default can be reached (while_down: close),
// and opens them again.
type gate struct {
	server   *Server
	listener *listener
	cancel   context.CancelFunc
	why      atomic.Pointer[error] // the last failure while it is shut

	mu sync.Mutex // held while the listener is shut or opened
	// +checklocks:mu
	checked
}

// checked is what a gate's checks have led to.
type checked struct {
	isShut     bool
	wasOpen    bool // once at least
	rise, fall int  // checks in a row that succeeded, or failed
}

// errUnchecked is why a new listener is shut.
var errUnchecked = errors.New("no target of default has answered yet")

// watchDefaults starts and ends the gates of the listeners that there are.
//
// +checklocks:srv.mu
func (srv *Server) watchDefaults() {
	for _, c := range srv.plan.Config.Listeners {
		l := srv.listeners[c.Name]
		if c.WhileDown != whileDownClose {
			l.gate.stop()
			l.gate, l.isShut = nil, false
			continue
		}
		if l.gate == nil {
			g := &gate{server: srv, listener: l, checked: checked{isShut: l.isShut, wasOpen: !l.isShut}}
			if g.isShut {
				g.why.Store(&errUnchecked)
			}
			if s, ok := srv.orders.Shut[l.name]; ok && l.isShut && slices.Equal(s.Targets, l.defaultTargets()) {
				why := errors.New(s.Why)
				l.wasOpen, g.wasOpen = true, true
				g.why.Store(&why)
			}
			var ctx context.Context
			ctx, g.cancel = context.WithCancel(srv.ctx)
			l.gate = g
			go g.run(ctx)
		}
	}
}

// stop ends the checks. A nil gate makes none.
func (g *gate) stop() {
	if g != nil {
		g.cancel()
	}
}

// defaultTargets are those of l's default.
func (l *listener) defaultTargets() []string {
	if r := l.service.Load().Fallback; r != nil {
		return targetsOf(r)
	}
	return nil
}

// closed is why the listener is shut, or nil.
func (g *gate) closed() error {
	if g == nil {
		return nil
	}
	if why := g.why.Load(); why != nil {
		return *why
	}
	return nil
}

func (g *gate) run(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		go g.check(ctx) // the next one doesn't wait for its answer
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (g *gate) check(ctx context.Context) {
	call, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	late := time.AfterFunc(checkLate, func() { g.note(ctx, context.DeadlineExceeded, true) })
	err := g.reach(call)
	if late.Stop() || err == nil {
		g.note(ctx, err, false)
	} // else it has been counted
}

// reach connects to the targets of default, all at once. It is nil once one has answered.
func (g *gate) reach(ctx context.Context) error {
	r := g.listener.service.Load().Fallback
	if r == nil {
		return errUnchecked
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan error, len(r.All))
	for _, to := range r.All {
		go func() {
			c, err := r.Dialer.Dial(ctx, dial.Target(to.To), netip.Addr{})
			if err == nil {
				c.Close()
			}
			g.server.targets.Note(to.To.String(), err)
			answers <- err
		}()
	}
	var errs []error
	var unclear error
	for range r.All {
		err := <-answers
		switch {
		case err == nil:
			return nil
		case !tells(err):
			unclear = err
		}
		errs = append(errs, err)
	}
	if unclear != nil { // that one may be well
		return unclear
	}
	return errors.Join(errs...)
}

// shortages are errors of this host alone, which pass: a stranger can use up descriptors, ports, memory and
// the firewall's table of connections (EPERM), and must not shut the listener for everybody by that. EAGAIN
// is that of a unix socket whose server is there, and has many waiting.
var shortages = []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.EADDRNOTAVAIL, syscall.EAGAIN, syscall.EPERM, syscall.EACCES, syscall.EINTR}

// tells reports whether a check that failed says that connections do not get from here to the target, as they
// may from another edge: it refuses, is silent or unknown, or there is no way to it, be it for want of a
// route here. What is not known to say so does not.
func tells(err error) bool {
	for _, e := range shortages {
		if errors.Is(err, e) {
			return false
		}
	}
	if name, ok := errors.AsType[*net.DNSError](err); ok && name.IsTemporary && !name.IsTimeout {
		return false // the name server's trouble, or a descriptor that the question lacked
	}
	failed, ok := errors.AsType[*dial.Error](err)
	if !ok {
		return true
	}
	switch failed.Reason {
	case dial.Exhausted, dial.Denied, dial.Canceled, dial.Failed:
		return false
	}
	return true
}

// note counts a check, and shuts or opens the listener. late: there may yet be an answer, which is only a
// reason against a listener that is open. A check that tells nothing changes neither.
func (g *gate) note(ctx context.Context, err error, late bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case ctx.Err() != nil || late && g.isShut:
		return
	case err != nil && !tells(err):
		if g.isShut {
			g.why.Store(&err)
		}
		return
	case err == nil:
		g.rise, g.fall = g.rise+1, 0
	default:
		g.rise, g.fall = 0, g.fall+1
	}
	if late {
		err = errors.New("no target of default answers")
	}
	srv, l := g.server, g.listener
	switch {
	case !g.isShut && g.fall >= checkFall:
		g.isShut = true
		g.why.Store(&err)
		srv.log.Warn("a listener is closed: no target of its default can be reached",
			"listener", l.name, "err", err)
		srv.setShut(g, true)
	case g.isShut && (g.rise >= checkRise || g.rise > 0 && !g.wasOpen):
		g.isShut, g.wasOpen = false, true
		g.why.Store(nil)
		srv.log.Info("a listener is open: a target of its default answers", "listener", l.name)
		srv.rooms.move()
		srv.setShut(g, false)
	case g.isShut && err != nil:
		if g.fall == checkFall && !g.wasOpen {
			srv.log.Warn("a listener stays closed: no target of its default can be reached",
				"listener", l.name, "err", err)
		}
		g.why.Store(&err)
	}
}

// setShut closes the sockets of g's listener, or opens them.
func (srv *Server) setShut(g *gate, shut bool) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if g.listener.gate != g { // no longer asked for
		return
	}
	g.listener.isShut, g.listener.wasOpen = shut, true
	srv.rebindNow(srv.tailnetErr)
	if srv.lacksAddresses() {
		srv.addressesMoved.wake()
	}
}
