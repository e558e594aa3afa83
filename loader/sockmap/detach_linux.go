package sockmap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// A flow with a direction that is busier than it was told to bear goes back to userspace/relay: splice(2)
// costs less for each byte. Each direction leaves the sockmap by itself; see bpf/verdict.h for why no byte is
// lost on the way. When both have left, and the peers have all that was redirected, the flow is given back.
// In between, and when a direction has ended, what comes for a direction that has left is copied.
const (
	leavePause = 2 * time.Millisecond  // between two walks of the iterator, at least
	leaveCost  = 10                    // walks take one in so many parts of the time, in the long run
	leaveBurst = 50 * time.Millisecond // time that walks may take in one go
	leaveOffer = 20 * time.Millisecond // a direction that has not left after this time stays
	// bytes that may come between the look at how many there are and the read
	handSlack = 64 << 10
)

// Why a flow is given back.
var (
	errBusy     = errors.New("it is busy: splice(2) moves its bytes for less")
	errRecalled = errors.New("it was recalled, to leave this process")
)

// recallsAtOnce is how often a recalled flow is offered to leave before it waits for the next sweep each
// time.
const recallsAtOnce = 16

// detaching is how far a direction has come with leaving the sockmap.
type detaching struct {
	isDetached atomic.Bool // out of the sockmap; it is copying then
	isReady    atomic.Bool // out of it, and the peer has all that was redirected
	inHand     bool        // rest is what was read to leave; only for who is running

	looksAgain atomic.Bool   // a timer will wake it, to see what is past TCP
	lookPause  time.Duration // before that; only for who is running

	wasAsked bool                  // the detacher's, under its lock
	offer    atomic.Pointer[offer] // it may leave now; until what came meanwhile has a verdict again

	last   time.Time // when EVENT_BULK came last; only for the reader of the ring
	lastAt uint64    // how many bytes had been handled then
}

// detacher takes directions out of the sockmap that ask for it.
type detacher struct {
	iter *link.Iter
	call *ebpf.Variable // sockmapLeaveCall
	poke chan struct{}  // has one while somebody asks
	quit chan struct{}  // closed at the end

	mu sync.Mutex
	// +checklocks:mu
	asked []*direction
}

// offer is made to a direction whose socket the iterator stands at.
type offer struct {
	at io.Reader // of the iterator
	mu sync.Mutex
	// +checklocks:mu
	isHeld bool // the verdict is kept from what comes
	// +checklocks:mu
	isOver bool
	taken  chan struct{}
}

func newDetacher(l *Engine) (*detacher, error) {
	it, err := link.AttachIter(link.IterOptions{Program: l.leave.iter})
	if err != nil {
		return nil, fmt.Errorf("attach the iterator of sockets: %w", host.Translate(err))
	}
	return &detacher{iter: it, call: l.leave.call, poke: make(chan struct{}, 1), quit: make(chan struct{})}, nil
}

// noteRate asks for the flow to leave if it has become too busy. Only the reader of the ring calls it, when
// EVENT_BULK comes.
func (d *direction) noteRate(now time.Time) {
	f := d.f
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return
	}
	n, took := d.handled(), now.Sub(d.last)
	if f.o.Busy > 0 && float64(n-d.lastAt) >= float64(f.o.Busy)*took.Seconds() {
		f.l.detacher.ask(f)
	}
	d.last, d.lastAt = now, n
}

// ask makes both directions leave soon, if the flow can be given back then. Called with the flow's mu held.
func (v *detacher) ask(f *flow) {
	if v == nil || f.o.Returned == nil || !f.isByTCP() && !f.isStopped.Load() ||
		!f.isRecalled.Load() && (f.directions[0].hasFIN() || f.directions[1].hasFIN()) {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range f.directions {
		if d := &f.directions[i]; !d.wasAsked && !d.isCopying.Load() {
			d.wasAsked = true
			v.asked = append(v.asked, d)
		}
	}
	select {
	case v.poke <- struct{}{}:
	default:
	}
}

// run walks for those that ask, until stop.
func (v *detacher) run(l *Engine) {
	spent, last := time.Duration(0), time.Now()
	for {
		select {
		case <-v.quit:
			return
		case <-v.poke:
		}
		took, err := v.walk()
		if err != nil {
			l.log.Debug("take bulk flows out of the sockmap", "error", err)
		}
		// All sockets are looked at, which must not become the work of this machine.
		now := time.Now()
		spent, last = max(spent-now.Sub(last)/leaveCost, 0)+took, now
		select {
		case <-v.quit:
			return
		case <-time.After(max(leavePause, leaveCost*(spent-leaveBurst))):
		}
	}
}

// walk makes one offer to each direction that asks. took is how long the walk itself took, without the time
// that the directions had to take their offers.
func (v *detacher) walk() (took time.Duration, err error) {
	v.mu.Lock()
	asked := v.asked
	v.asked = nil
	v.mu.Unlock()
	for _, d := range asked {
		d.setDetaching(sockmapLeavingLEAVING)
	}
	defer func() {
		for _, d := range asked {
			d.setDetaching(sockmapLeavingSTAYS)
		}
		v.mu.Lock()
		for _, d := range asked {
			d.wasAsked = false
		}
		v.mu.Unlock()
		for _, d := range asked {
			if d.f.isRecalled.Load() && !d.isDetached.Load() && d.f.recalls.Add(1) < recallsAtOnce {
				d.f.recall()
			}
		}
	}()
	r, err := v.iter.Open()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	// No further than it has to: the kernel looks at each socket, and some kernels do harm to connection
	// requests on the way (docs/kernel.md).
	for slices.ContainsFunc(asked, (*direction).isLeaving) {
		start := time.Now()
		at, err := v.next(r, sockmapLeaveCall{Half: ^uint32(0)})
		took += time.Since(start)
		if err != nil || at == ^uint32(0) {
			return took, err
		}
		i := slices.IndexFunc(asked, func(d *direction) bool { return d.index() == at })
		if i < 0 {
			return took, fmt.Errorf("direction %d leaves, and did not ask", at)
		}
		asked[i].offered(&offer{at: r, taken: make(chan struct{})})
		asked[i].setDetaching(sockmapLeavingSTAYS)
	}
	return took, nil
}

// next goes on with the iterator, and says which direction it stands at then; ^0: it has come to the end.
func (v *detacher) next(r io.Reader, call sockmapLeaveCall) (at uint32, err error) {
	if err := v.call.Set(call); err != nil {
		return 0, err
	}
	switch _, err := r.Read(make([]byte, 1)); { // the program prints nothing
	case err == io.EOF:
		return ^uint32(0), nil
	case !isAgain(err):
		return 0, err
	}
	err = v.call.Get(&call)
	return call.Half, err
}

// offered waits until the direction has taken the offer, if it does at all.
func (d *direction) offered(o *offer) {
	d.offer.Store(o)
	d.wake(0)
	select {
	case <-o.taken:
		return
	case <-time.After(leaveOffer):
	}
	o.mu.Lock()
	o.isOver = true
	o.mu.Unlock()
	defer d.offer.Store(nil)
	d.f.mu.RLock()
	defer d.f.mu.RUnlock()
	if !d.f.isClosed {
		d.source().kick()
	}
}

// takeOffer takes the direction out of the sockmap if that was offered, and if what was passed and not read
// yet is within the flow's bound: it reads that, and the direction is out if nothing else has been passed by
// then. If more has, that is copied first; see hold for why less and less comes meanwhile. err: the source is
// broken.
func (d *direction) takeOffer() error {
	o := d.offer.Load()
	if o == nil || d.isCopying.Load() || d.sawEOF || d.f.broken.Load() != nil {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isOver {
		return nil
	}
	if !o.isHeld {
		o.isHeld = true
		d.source().hold()
	}
	m := d.shared()
	if n := d.unread(); n > 0 {
		room := int(load32(&m.Limit)) - len(d.rest)
		if n > room || d.f.l.hooks.Keeps(ruleOrder) && load64(&m.Redirected) != d.settled && !d.redirectedIsWritten() {
			return nil
		}
		if err := d.takeInHand(min(n+handSlack, room)); err != nil || d.unread() > 0 {
			return err
		}
	}
	defer close(o.taken)
	defer d.offer.Store(nil)
	defer d.source().kick()
	v := d.f.l.detacher
	if _, err := v.next(o.at, sockmapLeaveCall{Half: d.index(), Read: d.consumed + uint64(len(d.rest))}); err != nil {
		return nil // the walk finds it, too
	}
	if sockmapLeaving(m.Leaving) == sockmapLeavingHAS_LEFT {
		d.isDetached.Store(true)
		d.isCopying.Store(true)
	}
	return nil
}

// unread is how many bytes were passed and not read yet.
func (d *direction) unread() int { return int(load64(&d.shared().Passed)-d.consumed) - len(d.rest) }

// takeInHand reads up to n bytes, behind those that are to be written already. err: the source is broken.
func (d *direction) takeInHand(n int) error {
	if d.inHand {
		return nil
	}
	d.inHand = true
	d.shared().InHand = uint16((n + 4095) >> 12)
	b := make([]byte, len(d.rest)+n)
	m, err := d.source().read(b[copy(b, d.rest):])
	if m == 0 {
		d.openHand()
		if isAgain(err) {
			return nil
		}
		return err
	}
	d.rest, d.mustWait = b[:len(d.rest)+m], d.f.l.hooks.Keeps(ruleOrder)
	return nil
}

// openHand ends what takeInHand has begun, when rest has been written or never will be.
func (d *direction) openHand() {
	if d.inHand {
		d.inHand, d.shared().InHand = false, 0
	}
}

func (d *direction) index() uint32 { return 2*d.f.slot + d.side }

func (d *direction) setDetaching(to sockmapLeaving) {
	d.f.mu.RLock()
	defer d.f.mu.RUnlock()
	if !d.f.isClosed {
		d.shared().Leaving = uint8(to)
	}
}

// isLeaving reports whether the iterator has still to come to the direction.
func (d *direction) isLeaving() bool {
	d.f.mu.RLock()
	defer d.f.mu.RUnlock()
	return !d.f.isClosed && sockmapLeaving(d.shared().Leaving) == sockmapLeavingLEAVING
}

// readyToReturn is asked by a direction that has left and holds nothing, with all written that was
// redirected. It is true for the direction that is the last to be so.
func (d *direction) readyToReturn() bool {
	if d.isReady.Load() || load64(&d.shared().Redirected) != d.settled && !d.redirectedIsWritten() || d.isPastTCP() {
		return false
	}
	d.isReady.Store(true)
	return d.f.directions[1-d.side].isReady.Load()
}

// isPastTCP reports whether bytes that went past TCP have not come to whoever reads them. Then the direction,
// which has left, is woken to look again.
func (d *direction) isPastTCP() bool {
	if d.f.isByTCP() || d.redirectedIsWritten() && (d.side == 1 || !d.f.bypass.HasUnread()) {
		return false
	}
	if !d.looksAgain.Swap(true) { // once, however often something else wakes it
		d.lookPause = min(max(2*d.lookPause, time.Millisecond), shortPause)
		time.AfterFunc(d.lookPause, func() {
			d.looksAgain.Store(false)
			d.wake(0)
		})
	}
	return true
}

// recall makes the flow be given back soon, though it is not busy, and also if one of its streams has ended.
// Nothing goes past TCP any more before it leaves.
func (f *flow) recall() {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return
	}
	switch wasRecalled := f.isRecalled.Swap(true); {
	case f.isByTCP() || f.isStopped.Load():
		f.l.detacher.ask(f)
	case !wasRecalled:
		f.bypass.Disable()
		f.bypass.WhenDisabled(func() {
			f.isStopped.Store(true)
			f.recall()
		})
	}
}

// isReadyToo is asked when the end of the direction was passed on: may its flow be given back now? Where the
// other direction is about to end too, the flow ends.
func (d *direction) isReadyToo() bool {
	other := &d.f.directions[1-d.side]
	d.isReady.Store(d.isCopying.Load() && !d.isPastTCP())
	return d.isReady.Load() && other.isReady.Load() && !other.isAtEnd.Load()
}

// giveBack gives the flow back, if both its streams go on, or if it was recalled and one does. What a
// direction has read and not written goes with it.
func (f *flow) giveBack() {
	f.mu.Lock()
	ended := 0
	for i := range f.directions {
		if f.directions[i].hasEnded() {
			ended++
		}
	}
	isHalfClosed := ended == 1 && f.isRecalled.Load() && (f.directions[0].isDone.Load() || f.directions[1].isDone.Load())
	if f.isClosed || f.broken.Load() != nil || ended > 0 && !isHalfClosed || !f.isOver.CompareAndSwap(false, true) {
		f.mu.Unlock()
		return
	}
	f.hide()
	var rest [2][]byte
	for i, s := range f.sockets {
		d := &f.directions[i]
		rest[i], d.rest = bytes.Clone(d.rest), nil
		f.poller().remove(s)
	}
	f.withdraw()
	f.bypass.Leave()
	lastMoved := f.lookLast(time.Now())
	f.close()
	f.mu.Unlock()
	f.l.alive.Done()
	up, down := f.count()
	why := errBusy
	if f.isRecalled.Load() {
		why = errRecalled
	}
	f.o.Returned(int(f.sockets[0]), int(f.sockets[1]), rest[0], rest[1], up, down, lastMoved,
		f.record.forgetter(), why)
}

// hasFIN reports whether the source's stream has ended, or its end was passed on. Called with the flow's mu
// held.
func (d *direction) hasFIN() bool {
	return d.isDone.Load() || !tcpsock.IsEstablished(int(d.source()))
}

// hasEnded reports whether the end of the direction's stream was read, or passed on.
func (d *direction) hasEnded() bool { return d.sawEOF || d.isDone.Load() }
