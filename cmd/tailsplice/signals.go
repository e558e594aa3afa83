package main

import (
	"context"
	"errors"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/tailsplice/tailsplice/userspace/admin"
)

// hangUp reloads at SIGHUP, or has the process do it that has taken over meanwhile.
func (d *process) hangUp() {
	if _, err := d.reload(); !errors.Is(err, admin.ErrMoved) {
		return
	}
	d.changes.Lock()
	defer d.changes.Unlock()
	d.next.Signal(syscall.SIGHUP)
}

// endUpgrade ends an upgrade that is under way, and lets none begin any more. It returns the process that has
// taken over by then, or nil.
func (d *process) endUpgrade() *successor {
	d.isEnding.Store(true)
	if giveUp := d.giveUp.Load(); giveUp != nil {
		(*giveUp)(errEnding)
	}
	d.changes.Lock()
	defer d.changes.Unlock()
	return d.next
}

// passOn has a signal that the first process has got do here what it does there, or in the process that has
// taken over meanwhile.
func (d *process) passOn(s os.Signal, signals chan<- os.Signal) {
	if giveUp := d.giveUp.Load(); giveUp != nil && s != syscall.SIGHUP {
		(*giveUp)(errEnding)
	}
	d.changes.Lock()
	next := d.next
	d.changes.Unlock()
	if next != nil {
		next.Signal(s)
		return
	}
	select {
	case signals <- s:
	default: // as many are there that nobody has heard
	}
}

// drainListeners drains those that query names. With end, which needs all, the daemon ends with its last
// flow.
//
// d.changes is held, by change.
func (d *process) drainListeners(query url.Values) (any, error) {
	if query.Has("end") && !query.Has("all") {
		return nil, errors.New("a daemon ends when all of its listeners are drained: add --all")
	}
	drained, err := d.server.SetDrained(query, true)
	if err == nil && query.Has("end") {
		d.isEnding.Store(true)
		select {
		case d.ends <- struct{}{}:
		default: // it has been asked for already
		}
	}
	return drained, err
}

// undrainListeners opens listeners again that the query names. Nothing opens once the daemon is to end, which
// its server may learn a little later.
func (d *process) undrainListeners(query url.Values) (any, error) {
	if d.isEnding.Load() {
		return nil, errors.New("the daemon is stopping: its listeners stay closed")
	}
	return d.server.SetDrained(query, false)
}

var errEnding = errors.New("the daemon is told to end")

// drain lets the flows end. Asked for by `tailsplice drain --end` (first is nil) it takes as long as they do,
// and from a signal on until the deadline; a signal that comes a second time cuts them. One of another kind
// does not: some supervisors send INT, and TERM after a while.
func (d *process) drain(first os.Signal, signals <-chan os.Signal) error {
	f, timeout, log := d.server, d.options.drain, d.log
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	had := map[os.Signal]bool{}
	hear := func(s os.Signal) {
		if len(had) > 0 {
			log.Info("still draining: the same signal again ends at once", "signal", s.String())
		} else {
			d.endKeeping() // where `drain --end` was first, too: the next process is to be open
			daemon.SdNotify(false, daemon.SdNotifyStopping)
			log.Info("draining: no new connections; the same signal again ends at once", "signal", s.String(),
				"flows", f.Flows().Len(), "deadline", timeout.String())
			d.elders.End(timeout)
			time.AfterFunc(timeout, cancel)
		}
		had[s] = true
	}
	if first != nil {
		hear(first)
	} else { // systemd would end what has said that it stops
		log.Info("draining: no new connections; the daemon ends when the last flow has", "flows", f.Flows().Len())
	}
	go func() {
		for s := range signals {
			if had[s] {
				d.elders.End(0)
				cancel()
				return
			}
			if s != syscall.SIGHUP {
				hear(s)
			}
		}
	}()
	if first == nil {
		f.Withdraw(ctx)
		d.keep() // nothing is bound any more: nobody is to wait in the service manager's copies
	}
	err := f.Drain(ctx)
	d.elders.Wait(ctx)
	d.endKeeping()
	if first == nil { // who has asked for it is to have the answer
		d.control.leave(nil)
		d.control.finish()
	}
	if err != nil {
		log.Warn("ended", "err", err)
		return nil
	}
	log.Info("ended: all flows had finished")
	return nil
}
