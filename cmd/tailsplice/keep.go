package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/handover"
)

// keeper has the service manager keep what the next process needs should this one crash, and tells the
// manager that this one has not, while this is the main process.
type keeper struct {
	store *handover.Store
	moved chan struct{} // gets a value when what is bound has changed

	flows    *handover.Queue    // that live
	hasLeft  bool               // a process that has ended has left a queue of them
	adopted  chan struct{}      // closed when none of these is still to go on
	adopting context.Context    // ends when those that are still to go on are reset
	giveUp   context.CancelFunc // ends adopting
	endFlows context.CancelFunc // has no more flows kept; guarded by mu
	left     []handover.Socket  // the ends of the queue of the process that this one has taken over from
	elders   []handover.Socket  // to be followed once that one has handed over

	mu sync.Mutex
	// +checklocks:mu
	isMain bool
	// +checklocks:mu
	isOver bool // what is kept stays as it is
	// +checklocks:mu
	isOffered bool // the ends of flows stay as they are
	// +checklocks:mu
	isSilent bool // the manager, which may take another process for the main one, is told nothing
}

// taker has sockets of a process before this one.
type taker interface {
	Take(want func(handover.Socket) bool) []handover.Socket
}

// openStore returns a keeper, and where this process gets sockets from: from old, which may be nil, or from
// what a process left that has ended.
func (d *process) openStore(old *handover.Predecessor) (from taker, state json.RawMessage, more []json.RawMessage) {
	store, wrong := handover.OpenStore()
	d.keeper = keeper{store: store, endFlows: func() {},
		moved: make(chan struct{}, 1), adopted: make(chan struct{})}
	d.keeper.adopting, d.keeper.giveUp = context.WithCancel(context.Background())
	ends := store.Take(handover.IsOfFlows)
	d.keeper.hasLeft = len(ends) > 0
	d.keeper.flows = handover.OpenQueue(ends, d.keepFlows)
	for _, err := range wrong {
		d.log.Warn("something that an ended process has left is not used", "err", err)
	}
	if old != nil {
		close(d.keeper.adopted)
		store.Note(old.All())
		return old, old.State(), old.More()
	}
	if n := store.Len(); n > 0 {
		d.log.Info("the process before this one has left its sockets", "sockets", n)
	}
	return store, store.State(), nil
}

// wake has what is bound now kept.
func (k *keeper) wake() {
	select {
	case k.moved <- struct{}{}:
	default:
	}
}

// offer is copies of the ends of the queue of flows, for a process that takes over. The caller closes them.
// Until resume there are no others: that process would not know of them.
func (k *keeper) offer() []handover.Socket {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.isOffered = true
	if !k.isMain {
		return nil
	}
	ends, _ := k.flows.Sockets() // they are for the worst case alone
	return ends
}

// resume is for when no process has taken over.
func (k *keeper) resume() {
	k.mu.Lock()
	k.isOffered, k.isSilent = false, false
	k.mu.Unlock()
	k.store.Resume()
	k.wake()
}

// mayRenew reports whether the queue of flows may be renewed.
func (k *keeper) mayRenew() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.isOffered && !k.isAdopting()
}

// isToBeMain reports whether the process before this one has not handed over yet. Were another one to take
// over from this one before that, the manager could hear of the two in the wrong order.
func (k *keeper) isToBeMain() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.isMain && !k.isOver
}

// succeed is called when the process that this one has taken over from has made it the main one, or has ended
// before it could (isAlone). What that one had is this one's then.
func (d *process) succeed(ctx context.Context, isAlone bool) {
	d.control.isLent.Store(false)
	d.keeper.store.Note(d.keeper.left)
	if isAlone && d.keeper.store.Keeps() {
		// First of all: the manager may see the end of the other one next.
		_ = d.keeper.store.Notify(fmt.Sprintf("MAINPID=%d", os.Getpid()))
		d.log.Warn("the process before this one has ended before it could say which is the main one: it is this one",
			"pid", os.Getpid())
		// The queue stays: the manager may not listen to this process, and start another.
		d.keeper.mu.Lock()
		d.keeper.hasLeft = len(d.keeper.left) > 0
		d.keeper.flows = handover.OpenQueue(d.keeper.left, d.keepFlows)
		d.keeper.mu.Unlock()
		recall, end := d.openOrphans()
		d.adopt(d.keeper.flows, recall)
		end()
		if err := loader.RemoveDead("", d.log); err != nil {
			d.log.Warn("what ended daemons left in the kernel can't be removed", "err", err)
		}
	} else {
		handover.Close(d.keeper.left)
	}
	for _, s := range d.keeper.elders {
		if err := d.elders.AddFile(s.File); err != nil {
			d.log.Warn("an older process can't be followed", "err", err)
		}
	}
	d.beMain(ctx)
}

// beMain is called once, when this is the main process.
func (d *process) beMain(ctx context.Context) {
	d.keeper.mu.Lock()
	d.keeper.isMain = !d.keeper.isOver
	if d.keeper.isMain && d.keeper.store.Keeps() {
		var flows context.Context
		flows, d.keeper.endFlows = context.WithCancel(ctx)
		go d.server.KeepFlows(flows, d.keeper.flows, d.keeper.mayRenew)
	}
	d.keeper.mu.Unlock()
	d.keep()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-d.keeper.moved:
				d.keep()
			}
			select { // many targets may go down at a time
			case <-ctx.Done():
			case <-time.After(keepPause):
			}
		}
	}()
	if every, err := watchdogEvery(); err != nil {
		d.log.Warn("the service manager's watchdog can't be told that the daemon is well", "err", err)
	} else if every > 0 {
		go d.feedWatchdog(ctx, every)
	}
}

// keepPause is how long what has moved may wait for what moves next.
const keepPause = 100 * time.Millisecond

// keep has what is bound now, and what an operator has said, kept.
func (d *process) keep() {
	d.keeper.mu.Lock()
	defer d.keeper.mu.Unlock()
	_ = d.keepAll(nil) // which says so
}

// keepFlows has the ends of the queue of flows kept, as they are now.
func (d *process) keepFlows() error {
	d.keeper.mu.Lock()
	defer d.keeper.mu.Unlock()
	if !d.keeper.isMain || d.keeper.isOffered {
		return handover.ErrQueueClosed
	}
	err := d.keepAll(nil)
	if own, ownErr := d.keeper.flows.Sockets(); ownErr == nil {
		if d.keeper.store.Has(own) {
			err = nil // what failed is of others
		}
		handover.Close(own)
	}
	return err
}

// endKeeping is for a process that ends as it was told to. Connections that come until the next process is
// there wait for it. What an operator has said ends with this one, and so do the control socket, whose file
// is removed, and the flows.
func (d *process) endKeeping() {
	d.keeper.endAdopting()
	d.keeper.mu.Lock()
	defer d.keeper.mu.Unlock()
	_ = d.keepAll(func(s handover.Socket) bool { return s.Kind != handover.KindControl && !handover.IsOfFlows(s) })
	d.keeper.isOver = true
	d.keeper.endFlows()
	d.keeper.flows.Close()
}

// keepAll has all that is bound kept, with the orders of an operator; where only is there, that alone.
//
// +checklocks:d.keeper.mu
func (d *process) keepAll(only func(handover.Socket) bool) error {
	if !d.keeper.isMain || d.keeper.isOver || d.keeper.isSilent {
		return nil
	}
	bound, err := d.server.Bound()
	control, err2 := d.control.sockets()
	flows, err3 := d.keeper.flows.Sockets()
	all := slices.Concat(bound, control, flows)
	defer func() { handover.Close(all) }()
	kept := all
	orders, err4 := d.server.Orders()
	if only != nil {
		kept, orders = nil, nil
		for _, s := range all {
			if only(s) {
				kept = append(kept, s)
			}
		}
	}
	if err = errors.Join(err, err2, err3, err4); err == nil {
		err = d.keeper.store.Keep(kept, orders)
	}
	if err != nil {
		d.log.Warn("not all that the next process needs after a crash is kept: connections may be refused then", "err", err)
	}
	return err
}

// nameMain tells the manager that process pid is the main one, and returns when it has heard that, but does
// not wait for long: it does not take a process that has ended. It hears nothing of this one then.
// seesToKept: pid removes what is kept of flows, which is done here else.
func (k *keeper) nameMain(pid int, seesToKept bool) (err error) {
	k.endAdopting()
	k.mu.Lock()
	k.isSilent = true
	if k.isMain && !seesToKept {
		err = k.store.Forget(handover.IsOfFlows)
	}
	k.mu.Unlock()
	return errors.Join(err, k.store.Notify(fmt.Sprintf("MAINPID=%d", pid)), k.store.Sync())
}

// leave is called when another process is the main one. Flows that go there are kept by that one, and those
// that stay here no more: two processes must not go on with a flow.
func (k *keeper) leave() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.isMain, k.isOver = false, true
	k.endFlows()
	k.flows.Close()
}

// recallWait is how long a flow may wait for being taken out of a sockmap: while TCP is short of memory, it
// is reset then.
const recallWait = 5 * time.Second

// adoptTogether is how many flows are looked at at a time.
const adoptTogether = 256

// isAdopting reports whether flows of the process before this one are still to go on.
func (k *keeper) isAdopting() bool {
	select {
	case <-k.adopted:
		return false
	default:
		return true
	}
}

// endAdopting has flows that are still to go on reset, and returns when they are: once they are kept no more,
// their ends would take them for ended. It may be called several times.
func (k *keeper) endAdopting() {
	k.giveUp()
	<-k.adopted
}

// openOrphans opens what a process that has ended has left of the sockmap datapath, in which its flows still
// are, before it is removed for being dead. end is called when no flow is recalled any more.
func (d *process) openOrphans() (recall handover.Recall, end func()) {
	if !d.keeper.hasLeft {
		return nil, func() {}
	}
	orphans := loader.OpenOrphans("", d.log)
	return d.keeper.recallBy(orphans.Recall), func() { orphans.Close() }
}

// recallBy is recall, which has its time, and ends with the adoption.
func (k *keeper) recallBy(
	recall func(_ context.Context, down, up int, offsets [2]uint64) (_, _ []byte, _ error),
) handover.Recall {
	return func(down, up int, b *handover.Balance) (downRest, upRest []byte, err error) {
		ctx, cancel := context.WithTimeout(k.adopting, recallWait)
		defer cancel()
		return recall(ctx, down, up, [2]uint64{uint64(b.Up), uint64(b.Down)})
	}
}

// adopt goes on with the flows that a process has left in a queue which has ended. None of them waits for
// another, unless many do for something.
func (d *process) adopt(left *handover.Queue, recall handover.Recall) {
	began := time.Now()
	var flows, goOn, gone, over, lost, failed atomic.Int64
	var all sync.WaitGroup
	room := make(chan struct{}, adoptTogether) // each takes descriptors, and may bring bytes along
	wrong := left.Flows(d.keeper.adopting, func(k *handover.KeptFlow) {
		flows.Add(1)
		room <- struct{}{}
		all.Go(func() {
			defer func() { <-room }()
			err := d.adoptOne(k, recall, left == d.keeper.flows)
			switch {
			case err == nil:
				goOn.Add(1)
			case errors.Is(err, handover.ErrGone): // before the process that had it
				gone.Add(1)
			case errors.Is(err, handover.ErrOver):
				over.Add(1)
			case errors.Is(err, handover.ErrLostBytes):
				lost.Add(1)
			default:
				failed.Add(1)
			}
			if err != nil {
				d.log.Debug("a flow of an ended process does not go on", "id", k.Flow.ID, "err", err)
			}
		})
	})
	all.Wait()
	for _, err := range wrong {
		d.log.Warn("something that an ended process has left is not used", "err", err)
	}
	if n := flows.Load() - gone.Load(); n > 0 {
		d.log.Info("the process before this one has left its flows", "flows", n, "go_on", goOn.Load(), "half_ended", over.Load(),
			"lost_bytes", lost.Load(), "unusable", failed.Load(), "duration", time.Since(began).Seconds())
	}
}

// adoptOne goes on with k. isKept: its queue is that of this process from now on.
func (d *process) adoptOne(k *handover.KeptFlow, recall handover.Recall, isKept bool) error {
	defer k.Close()
	f, err := k.Take(recall)
	if err != nil {
		return err
	}
	if !isKept {
		f.Kept = nil
	}
	begin, _, err := d.server.AdoptFlow(f)
	if err != nil {
		k.Reset()
		return err
	}
	begin()
	return nil
}

// watchdogEvery is within what time the manager wants to hear of this process; 0: it does not.
func watchdogEvery() (time.Duration, error) {
	// The manager names the first process of the daemon. Whoever asks is the main one.
	os.Unsetenv("WATCHDOG_PID")
	return daemon.SdWatchdogEnabled(false)
}

// feedWatchdog tells the manager that connections are served, as long as they are and this is the main
// process.
func (d *process) feedWatchdog(ctx context.Context, within time.Duration) {
	tick := time.NewTicker(within / 3)
	defer tick.Stop()
	said := ""
	for {
		try, cancel := context.WithTimeout(ctx, within/3)
		err := d.server.Serves(try)
		cancel()
		if ctx.Err() != nil {
			return
		}
		d.keeper.mu.Lock()
		isMain := d.keeper.isMain
		if isMain && err == nil && !d.keeper.isSilent {
			err = d.keeper.store.Notify(daemon.SdNotifyWatchdog)
		}
		d.keeper.mu.Unlock()
		if !isMain {
			return
		}
		if now := fmt.Sprint(err); err != nil && now != said {
			d.log.Error("the service manager can't be told that the daemon serves, and restarts it unless that ends",
				"err", err, "deadline", within.String())
			said = now
		} else if err == nil {
			said = ""
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
