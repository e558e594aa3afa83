package front

import (
	"context"
	"errors"
	"net"
	"net/netip"
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

// A gate shuts the sockets of a listener while no target of its default can be
// reached (while_down: close), and opens them again.
type gate struct {
	front    *Front
	listener *listener
	cancel   context.CancelFunc
	why      atomic.Pointer[error] // the last failure while it is shut

	mu         sync.Mutex // held while the listener is shut or opened; Front.mu is locked after it
	shut       bool
	opened     bool // once at least
	rise, fall int  // checks in a row that succeeded, or failed
}

// errUnchecked is why a new listener is shut.
var errUnchecked = errors.New("no target of default has answered yet")

// watchDefaults starts and ends the gates of the listeners that there are.
//
// f.mu is held.
func (f *Front) watchDefaults() {
	for i := range f.plan.Config.Listeners {
		c := &f.plan.Config.Listeners[i]
		l := f.listeners[c.Name]
		if c.WhileDown != whileDownClose {
			l.gate.stop()
			l.gate, l.shut = nil, false
			continue
		}
		if l.gate == nil {
			g := &gate{front: f, listener: l, shut: l.shut, opened: !l.shut}
			if g.shut {
				g.why.Store(&errUnchecked)
			}
			var ctx context.Context
			ctx, g.cancel = context.WithCancel(f.ctx)
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

// reach connects to the targets of default, all at once. It is nil once one has
// answered.
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
			g.front.targets.tried(to.To.String(), err)
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

// shortages are errors of this host alone, which pass: a stranger can use up descriptors, ports, memory and the
// firewall's table of connections (EPERM), and must not shut the listener for everybody by that. EAGAIN is that
// of a unix socket whose server is there, and has many waiting.
var shortages = []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.EADDRNOTAVAIL, syscall.EAGAIN, syscall.EPERM, syscall.EACCES, syscall.EINTR}

// tells reports whether a check that failed says that connections do not get from here to the target, as they
// may from another edge: it refuses, is silent or unknown, or there is no way to it, be it for want of a route
// here. What is not known to say so does not.
func tells(err error) bool {
	for _, e := range shortages {
		if errors.Is(err, e) {
			return false
		}
	}
	var name *net.DNSError
	if errors.As(err, &name) && name.IsTemporary && !name.IsTimeout {
		return false // the name server's trouble, or a descriptor that the question lacked
	}
	var failed *dial.Error
	if !errors.As(err, &failed) {
		return true
	}
	switch failed.Reason {
	case dial.Exhausted, dial.Denied, dial.Canceled, dial.Failed:
		return false
	}
	return true
}

// note counts a check, and shuts or opens the listener. late: there may yet be an
// answer, which is only a reason against a listener that is open. A check that
// tells nothing changes neither.
func (g *gate) note(ctx context.Context, err error, late bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case ctx.Err() != nil || late && g.shut:
		return
	case err != nil && !tells(err):
		if g.shut {
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
	f, l := g.front, g.listener
	switch {
	case !g.shut && g.fall >= checkFall:
		g.shut = true
		g.why.Store(&err)
		f.log.Warn("a listener is closed: no target of its default can be reached",
			"listener", l.name, "err", err)
		f.setShut(g, true)
	case g.shut && (g.rise >= checkRise || g.rise > 0 && !g.opened):
		g.shut, g.opened = false, true
		g.why.Store(nil)
		f.log.Info("a listener is open: a target of its default answers", "listener", l.name)
		f.setShut(g, false)
	case g.shut && err != nil:
		if g.fall == checkFall && !g.opened {
			f.log.Warn("a listener stays closed: no target of its default can be reached",
				"listener", l.name, "err", err)
		}
		g.why.Store(&err)
	}
}

// setShut closes the sockets of g's listener, or opens them.
func (f *Front) setShut(g *gate, shut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g.listener.gate != g { // no longer asked for
		return
	}
	g.listener.shut = shut
	f.rebindNow(f.tailnetErr)
	if f.lacksAddresses() {
		f.lookAtAddresses()
	}
}
