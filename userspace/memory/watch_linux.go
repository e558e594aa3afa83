package memory

import (
	"errors"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

const (
	lookEvery = time.Second / 4  // a few readers that stop fill small machines within a second
	restEvery = time.Second      // the same while so little is taken that this takes a second as well
	fillRate  = 256 << 20        // bytes a second, at which readers who stop fill memory
	idleEvery = 15 * time.Second // while nobody is connected, and whole while little is taken
	lookRest  = 20               // times the CPU time of a look, which is a twentieth of a CPU at most
	shortRest = 2                // the same while TCP is short, and next to nothing else can be done
	calmRest  = 4000             // the same while half is taken, but nothing refused or ended

	// How long no byte of a flow must have moved before it may be ended for what it holds: from 3/4 of the
	// memory on, and from 7/8 on.
	stoppedFor      = 15 * time.Second
	stoppedForShort = time.Second
	slowFor         = 30 * time.Second // who needs longer for what is held for him stands still as well
	stoppedMin      = 16 << 10         // bytes that such a flow holds at least
	stoppedLeast    = 2 << 10          // the same where TCP's memory is short: of these many are as bad
	greedyFor       = 30 * time.Second // that a source is refused after it held much when memory was short
	greedyMost      = 16 * time.Minute // that it is refused if it comes back again: twice as long each time
	greedyMin       = 1 << 20          // bytes that a source holds at least before it may be refused
	mostGreedy      = 4096             // such sources that are remembered
)

// state is what a Watch knows. What is no atomic is that of the goroutine that looks.
type state struct {
	proc, cgroups string // where procfs and the cgroups are

	last     time.Time                   // when it looked whole
	isShort  bool                        // half of the memory was taken then
	calm     calm                        // while that is so, and nothing else
	progress map[netip.AddrPort]progress // of connections, by the peer's address, while that is so

	greedy map[netip.Prefix]greed // sources that are refused, or were

	saidRights bool // that it may reset no sockets

	savesMemory, savesTCP atomic.Bool  // less is buffered for want of OfBudget, or of OfTCP
	sparesTCP             atomic.Bool  // as spareTCP has said last
	socketsFound          atomic.Int64 // bytes that our sockets held when they were listed last, else 0
}

// A calm is the time after a look that had nothing to refuse and nothing to end. It is over at once where
// more is taken than most, or more by TCP than mostTCP, in bytes.
type calm struct {
	until         time.Time
	most, mostTCP int64
}

func (c calm) lasts(taken, byTCP int64, now time.Time) bool {
	return now.Before(c.until) && taken <= c.most && byTCP <= c.mostTCP
}

// run looks until Close.
func (w *Watch) run() {
	for timer := time.NewTimer(lookEvery); ; {
		select {
		case <-w.ctx.Done():
			timer.Stop()
			return
		case <-w.wake:
		case <-timer.C:
		}
		timer.Reset(w.glance(time.Now()))
	}
}

// glance looks whole each time while half of the budget or of TCP's memory may be taken, but while that is
// calm, each restEvery while a source is refused, and else each idleEvery. It gives the time until the next
// glance. While nobody is connected, and nothing is to be given back, that is idleEvery, or until wake says
// that somebody has connected.
func (w *Watch) glance(now time.Time) (pause time.Duration) {
	used, short := tcpsock.Memory(w.proc)
	taken, budget := used+w.ownMemory(), w.Budget()
	w.spareTCP(short > 0 && used >= short/4, used, short)
	mayBeShort, room := short > 0 && used >= short/2, roomOf(used, short)
	if budget > 0 {
		mayBeShort, room = mayBeShort || taken >= budget/2, min(room, roomOf(taken, budget))
	}
	whole := idleEvery
	if len(w.greedy) > 0 {
		whole = restEvery
	}
	pause = min(max(lookEvery, time.Duration(float64(room)/fillRate*float64(time.Second))), restEvery)
	if now.Sub(w.last) >= whole || w.isShort && !mayBeShort || mayBeShort && !w.calm.lasts(taken, used, now) {
		w.last = now
		var u Use
		took := threadTime(func() {
			u = w.use()
			w.Look(now, u)
		})
		pause = max(pause, restAfter(took, short > 0 && used >= short/4*3))
		if w.calm = (calm{}); len(w.greedy) == 0 && !u.over(5, 8) {
			w.calm = calm{now.Add(min(took*calmRest, idleEvery)), taken + budget/32, used + short/32}
		}
	}
	if w.isShort || len(w.greedy) > 0 {
		return pause
	}
	w.isIdle.Store(true)
	if w.opts.Connections() > 0 {
		w.isIdle.Store(false)
		return pause
	}
	return idleEvery
}

// save has the relay hold less for each flow while memory is short, or as much as else, and says so.
func (w *Watch) save(u Use) {
	isShort, wasShort := u.over(1, 2), w.isShort
	w.isShort = isShort
	w.opts.Relay.SaveMemory(isShort && u.What == OfBudget)
	w.opts.Relay.SaveSockets(isShort)
	w.savesMemory.Store(isShort && u.What == OfBudget)
	w.savesTCP.Store(isShort && u.What != OfBudget)
	switch {
	case isShort && !wasShort:
		w.limited.Warn("memory_saving", "half of the memory is taken (limits.memory, net.ipv4.tcp_mem): "+
			"buffers of flows grow no more until it is less",
			"what", u.What, "used", u.Used, "total", u.Total)
	case wasShort && !isShort:
		w.limited.Info("memory_saved", "less than half of the memory is taken again: "+
			"buffers of flows grow as they need", "what", u.What, "used", u.Used, "total", u.Total)
	}
}

// saveNothing has the relay save nothing any more, if it does.
func (w *Watch) saveNothing() {
	if w.savesMemory.Load() || w.savesTCP.Load() {
		w.opts.Relay.SaveMemory(false)
		w.opts.Relay.SaveSockets(false)
	}
	if w.sparesTCP.Load() {
		w.opts.Relay.SpareTCP(false)
	}
}

// spareTCP is save for what all sockets of the machine have of the kernel's memory for TCP, in bytes.
func (w *Watch) spareTCP(isScarce bool, used, total int64) {
	w.opts.Relay.SpareTCP(isScarce)
	switch wasScarce := w.sparesTCP.Swap(isScarce); {
	case isScarce && !wasScarce:
		w.log.Debug("a quarter of TCP's memory is taken (net.ipv4.tcp_mem): "+
			"readers that have not shown that they read are written less until it is less", "used", used,
			"total", total)
	case wasScarce && !isScarce:
		w.log.Debug("less than a quarter of TCP's memory is taken again: "+
			"readers are written as much as else", "used", used, "total", total)
	}
}

// Status is what is taken now, as far as that is cheap to know: of sockets that no cgroup counts it is
// what the last look has found to be ours, or at most as much as the machine has.
func (w *Watch) Status() *Status {
	used, short := tcpsock.Memory(w.proc)
	own, ok := cgroupSockets(w.proc, w.cgroups)
	if !ok {
		own = used
		if found := w.socketsFound.Load(); found > 0 {
			own = min(own, found)
		}
	}
	return &Status{Used: own + w.ownMemory(), Budget: w.Budget(), Saving: w.savesMemory.Load(),
		TCPUsed: used, TCPBudget: short, TCPSaving: w.savesTCP.Load() || w.sparesTCP.Load()}
}

// restAfter is for how long nothing is looked at after a look, however many flows there are. While TCP is
// short readers who stop leave nothing to the others until they are ended.
func restAfter(took time.Duration, isTCPShort bool) time.Duration {
	if isTCPShort {
		return took * shortRest
	}
	return took * lookRest
}

// threadTime is what f takes of a CPU: on a busy one what f waits for it is no cost of f.
func threadTime(f func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now := func() time.Duration {
		var t unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // there always is one
		return time.Duration(t.Nano())
	}
	began := now()
	f()
	return now() - began
}

// Look does what u calls for: from half of the memory on little is taken at a time, from 5/8 on sources that
// hold much open no more connections, and from 3/4 on flows that have stood still for longest are ended,
// first those of the source that holds most. It may be called before Start and after Close.
func (w *Watch) Look(now time.Time, u Use) {
	w.save(u)
	if !w.isShort {
		w.progress = nil
		w.refuse(now, u)
		return
	}
	w.opts.GiveUp()
	sockets := u.sockets
	diag, err := tcpsock.OpenDiag()
	if err == nil {
		defer diag.Close()
	}
	if sockets == nil {
		if w.opts.Relay.MeasureHeld(now); err == nil && u.over(5, 8) {
			sockets, err = diag.At(w.opts.Ports())
		}
	}
	all := w.stalled(now, sockets)
	if u.over(5, 8) {
		w.noteGreedy(now, all)
	}
	w.refuse(now, u)
	if err == nil && u.over(3, 4) {
		err = w.end(now, u, all, sockets, diag)
	}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP):
		if !w.saidRights {
			w.saidRights = true
			w.log.Warn("memory is short, and what flows that have ended left to the kernel can't be taken back: "+
				"that needs CAP_NET_ADMIN, and a kernel with CONFIG_INET_DIAG_DESTROY", "err", err)
		}
	case err != nil:
		w.limited.Warn("memory_err",
			"memory is short, and flows that make no progress can't be ended", "err", err)
	}
}
