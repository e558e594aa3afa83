package sockmap

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// flow is one spliced pair. It has no goroutine while nothing happens.
type flow struct {
	l          *Engine
	slot       uint32
	generation uint32 // tells events of this flow from those of an earlier one in its slot
	sockets    [2]socket
	cookies    [2]uint64
	// 0: downstream to upstream, whose source is downstream's socket; 1: back
	directions [2]direction
	before     [2]int64                    // bytes that had moved when we got it
	o          Flow                        // what Splice was told of it
	record     *record                     // of the ledger; nil: the flow is only here
	stop       atomic.Pointer[func() bool] // unhooks the context
	bypass     Bypass
	counts     *Counts // those that it is counted in

	mu       sync.RWMutex // held for reading while the sockets are used, for writing to close them
	isClosed bool
	// +checklocks:watchMu
	watched [2]uint32 // what each socket is watched for besides baseEvents
	total   [2]uint64 // the counts when closed

	// settled is how many bytes had moved back when downstream's TCP was last seen to have all of them. Only
	// for the sweeper.
	settled uint64

	isRecalled atomic.Bool  // it is to be given back as soon as possible
	isStopped  atomic.Bool  // it is recalled, and nothing more of it goes past TCP
	recalls    atomic.Int32 // how often it was offered to leave the sockmap since it was recalled

	watchMu sync.Mutex
	isOver  atomic.Bool // somebody has seen to the flow's end, or gives it back
	broken  atomic.Pointer[breakage]
}

// breakage is the error that a side died of. The other one is reset when it has got what came before.
type breakage struct {
	side uint32
	err  error

	// Only for who is running the direction of side.
	taken   uint64    // what the reader had taken, when that had last changed
	takenAt time.Time // when that was seen
}

func (b *breakage) end() (string, error) {
	end := prove.EndError
	if tcpsock.IsReset(b.err) {
		end = [2]string{prove.EndDownstreamReset, prove.EndUpstreamReset}[b.side]
	}
	return end, fmt.Errorf("%s: %w", sideName(b.side), b.err)
}

func sideName(side uint32) string {
	if side == 0 {
		return "downstream"
	}
	return "upstream"
}

// count gives the bytes that went each way, also after the end.
func (f *flow) count() (up, down int64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n := f.total
	if !f.isClosed {
		n = [2]uint64{f.directions[0].moved(), f.directions[1].moved()}
	}
	return f.before[0] + int64(n[0]), f.before[1] + int64(n[1])
}

// checkSocket finds out whether a side that epoll complains of is broken.
func (f *flow) checkSocket(side uint32) {
	f.mu.RLock()
	if f.isClosed {
		f.mu.RUnlock()
		return
	}
	err := f.sockets[side].fault()
	if err != nil {
		f.breaks(side, err)
	}
	f.mu.RUnlock()
	if err != nil {
		f.breakUp(side, err)
	}
}

// breaks notes that a side is dead. The socket has told its error and won't again, so the note is made under
// the lock that the error was taken under: a flow that is given back has none.
func (f *flow) breaks(side uint32, err error) {
	f.broken.CompareAndSwap(nil, &breakage{side: side, err: err})
}

// breakUp ends the flow since a side is dead: what it sent before still goes to the other one, for as long as
// that goes on reading.
func (f *flow) breakUp(side uint32, err error) {
	f.breaks(side, err)
	if first := f.broken.Load(); first.side != side { // there is nobody left to deliver to
		f.finish(first.end())
		return
	}
	f.setState(sockmapFlowStateFLOW_ENDING)
	f.directions[side].wake(0)
}

// directionDone is told that the end of a direction was passed on.
func (f *flow) directionDone() {
	if f.directions[0].isDone.Load() && f.directions[1].isDone.Load() {
		f.finish(prove.EndEOF, nil)
		return
	}
	f.setState(sockmapFlowStateFLOW_HALF_CLOSED)
	if f.isRecalled.Load() {
		f.recall()
		f.directions[0].wake(0)
		f.directions[1].wake(0)
	}
}

// finish closes both sockets, with a reset unless both streams have ended, and reports the end. Once.
func (f *flow) finish(end string, err error) {
	if !f.isOver.CompareAndSwap(false, true) {
		return
	}
	f.hide()
	f.mu.Lock()
	f.bypass.Disable()
	for _, s := range f.sockets {
		f.poller().remove(s)
		if end == prove.EndEOF {
			s.close()
		} else {
			s.reset()
		}
	}
	f.close()
	f.record.forget()
	f.mu.Unlock()
	f.l.alive.Done()
	if f.o.Ended != nil {
		up, down := f.count()
		f.o.Ended(up, down, end, err)
	}
}

// hide lets nobody find the flow any more who does not know it already, nor cancel it.
func (f *flow) hide() {
	if stop := f.stop.Load(); stop != nil {
		(*stop)()
	}
	f.l.live[f.slot].Store(nil)
}

// close gives back all that the flow has in the loader. The sockets have left the sockmaps, so no verdict
// runs for them any more. Called with mu held for writing.
func (f *flow) close() {
	f.total = [2]uint64{f.directions[0].moved(), f.directions[1].moved()}
	f.record.leave(f)
	f.isClosed = true
	for i := range f.directions {
		f.directions[i].release()
	}
	f.bypass.Release()
	f.forget()
	f.bypass.FreeSlot(f.slot)
	f.l.inside.Add(-1)
}

// watchFor adds what a socket is watched for, or takes it away. Adding tells at once what is already so.
// What was there before is edge-triggered, and needs no second telling.
func (f *flow) watchFor(side, events uint32, on bool) {
	f.watchMu.Lock()
	defer f.watchMu.Unlock()
	was := f.watched[side]
	now := was &^ events
	if on {
		now = was | events
	}
	if now == was {
		return
	}
	f.watched[side] = now
	_ = f.poller().control(unix.EPOLL_CTL_MOD, f.sockets[side], 2*f.slot+side, f.generation, now)
}

// rearm has epoll tell again what it told before the flow was live. A direction may have been woken
// meanwhile: what it waits for stays watched.
func (f *flow) rearm(side uint32) {
	f.watchMu.Lock()
	defer f.watchMu.Unlock()
	if !f.l.hooks.Keeps(ruleQuiet) {
		f.watched[side] = unix.EPOLLIN | unix.EPOLLOUT // as Go's poller does
	}
	_ = f.poller().control(unix.EPOLL_CTL_MOD, f.sockets[side], 2*f.slot+side, f.generation, f.watched[side])
}

// setState is for those who look at the flows map.
func (f *flow) setState(state sockmapFlowState) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	f.publish(func(t *sockmapFlow) { t.State = state })
}

// publish changes the flow's entry in the flows map. That writes its counters too, which the verdict may be
// changing, so it is repeated until they have not changed meanwhile. Called with mu held.
func (f *flow) publish(change func(*sockmapFlow)) {
	if f.isClosed {
		return
	}
	for range 100 {
		var t sockmapFlow
		if err := f.l.objects.Flows.Lookup(f.cookies[0], &t); err != nil {
			return
		}
		change(&t)
		a, b := f.fill(&t)
		if err := f.l.objects.Flows.Put(f.cookies[0], t); err != nil {
			return
		}
		if a == f.directions[0].snapshot() && b == f.directions[1].snapshot() {
			return
		}
	}
}

// fill writes the flow's counters into its entry in the flows map.
func (f *flow) fill(t *sockmapFlow) (up, down snapshot) {
	up, down = f.directions[0].snapshot(), f.directions[1].snapshot()
	up.into(t.Up.Before, &t.Up.Bytes, &t.Up.Redirected, &t.Up.Passed, &t.Up.Trimmed, &t.Up.Local)
	down.into(t.Down.Before, &t.Down.Bytes, &t.Down.Redirected, &t.Down.Passed, &t.Down.Trimmed, &t.Down.Local)
	return up, down
}

// fault is told that the verdict gave up: bytes are missing, and both sides have to know.
func (f *flow) fault(side uint32, why sockmapFault) {
	if why == sockmapFaultFAULT_PEER {
		// The peer died, and its event is on its way; what it sent before is still delivered.
		f.checkSocket(1 - side)
		f.breakUp(1-side, unix.ECONNRESET)
		return
	}
	name := faultName(why)
	f.counts.countFailure(f.l.log, name)
	f.finish(prove.EndError, errors.New("the verdict gave up: "+name))
}

func faultName(why sockmapFault) string {
	switch why {
	case sockmapFaultFAULT_GAP:
		return "gap in sequence numbers"
	case sockmapFaultFAULT_TRIM:
		return "overlap could not be trimmed"
	case sockmapFaultFAULT_REDIRECT:
		return "redirect was refused"
	}
	return fmt.Sprintf("fault %d", why)
}
