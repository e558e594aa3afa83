package main

import (
	"context"
	"errors"
	"os"
	"syscall"

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

var errEnding = errors.New("the daemon is told to end")

// drain lets the flows end; a signal that comes a second time, or the deadline, cuts them. One of another
// kind does not: some supervisors send INT, and TERM after a while.
func (d *process) drain(first os.Signal, signals <-chan os.Signal) error {
	daemon.SdNotify(false, daemon.SdNotifyStopping)
	f, timeout, log := d.server, d.options.drain, d.log
	d.endKeeping()
	log.Info("draining: no new connections; the same signal again ends at once", "signal", first.String(),
		"flows", f.Flows().Len(), "deadline", timeout.String())
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	d.elders.End(timeout)
	go func() {
		had := map[os.Signal]bool{first: true}
		for s := range signals {
			if had[s] {
				d.elders.End(0)
				cancel()
				return
			}
			if s != syscall.SIGHUP {
				had[s] = true
				log.Info("still draining: the same signal again ends at once", "signal", s.String())
			}
		}
	}()
	err := f.Drain(ctx)
	d.elders.Wait(ctx)
	if err != nil {
		log.Warn("ended", "err", err)
		return nil
	}
	log.Info("ended: all flows had finished")
	return nil
}
