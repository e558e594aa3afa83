package loader

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

	"github.com/tailsplice/tailsplice/tcpsock"
)

// A flow with a direction that is busier than it was told to bear goes back to userspace/relay: splice(2) costs less
// for each byte. Each half leaves the sockmap by itself; see bpf/splice.bpf.c for why no byte is lost on the way. When
// both have left, and the peers have all that was redirected, the flow is given back. In between, and when a
// direction has ended, what comes for a half that has left is copied.
const (
	leavePause = 2 * time.Millisecond  // at least, between two walks
	leaveCost  = 10                    // so many times what they take, in the long run
	leaveBurst = 50 * time.Millisecond // what they may take at once
	leaveOffer = 20 * time.Millisecond // a half that has not left after this one stays
	handSlack  = 64 << 10              // bytes that may come between the look at how many there are and the read
)

// errBusy is why a flow is given back.
var errBusy = errors.New("it is busy: splice(2) moves its bytes for less")

// leaving is what a half has for it.
type leaving struct {
	left   atomic.Bool // out of the sockmap; it is copying then
	ready  atomic.Bool // and the peer has all that was redirected
	inHand bool        // rest is what was read to leave; only for who is running

	asked bool                  // the leaver's, under its lock
	offer atomic.Pointer[offer] // it may leave now; until what came meanwhile has a verdict again

	last   time.Time // the ring's: when EVENT_BULK came
	lastAt uint64    // and how many bytes had been handled then
}

// leaver takes halves out of the sockmap that ask for it.
type leaver struct {
	iter *link.Iter
	call *ebpf.Variable // spliceLeaveCall
	poke chan struct{}
	quit chan struct{}

	mu    sync.Mutex
	asked []*half
}

// offer is made to a half whose socket the iterator stands at.
type offer struct {
	at    io.Reader // of the iterator
	mu    sync.Mutex
	held  bool // the verdict is kept from what comes
	over  bool
	taken chan struct{}
}

// leastBulk is the first kernel whose iterator of TCP sockets locks them.
var leastBulk = version{5, 15, 0}

// newLeaver gives nil where halves can't leave.
func newLeaver(l *Loader) (*leaver, error) {
	if v, _, err := runningKernel(); err != nil || v.less(leastBulk) {
		return nil, nil
	}
	it, err := link.AttachIter(link.IterOptions{Program: l.objects.Leave})
	if err != nil {
		return nil, fmt.Errorf("attach the iterator of sockets: %w", translate(err))
	}
	return &leaver{iter: it, call: l.objects.Call, poke: make(chan struct{}, 1), quit: make(chan struct{})}, nil
}

func (v *leaver) stop() {
	if v != nil {
		close(v.quit)
	}
}

// close comes after run has ended.
func (v *leaver) close() error {
	if v == nil {
		return nil
	}
	return v.iter.Close()
}

// isBulk is told of EVENT_BULK, by one goroutine.
func (h *half) isBulk(now time.Time) {
	f := h.f
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return
	}
	n, took := h.handled(), now.Sub(h.last)
	if f.busy > 0 && float64(n-h.lastAt) >= float64(f.busy)*took.Seconds() {
		f.l.leaver.ask(f)
	}
	h.last, h.lastAt = now, n
}

// ask makes both halves leave soon, if the flow can be given back then. Called with the flow's mu held.
func (v *leaver) ask(f *flow) {
	if v == nil || f.returned == nil || f.process != nil || f.halves[0].hasFIN() || f.halves[1].hasFIN() {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range f.halves {
		if h := &f.halves[i]; !h.asked && !h.copying.Load() {
			h.asked = true
			v.asked = append(v.asked, h)
		}
	}
	select {
	case v.poke <- struct{}{}:
	default:
	}
}

// run walks for those that ask, until stop.
func (v *leaver) run(l *Loader) {
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

// walk makes one offer to each half that asks. took is without the time that those had.
func (v *leaver) walk() (took time.Duration, err error) {
	v.mu.Lock()
	asked := v.asked
	v.asked = nil
	v.mu.Unlock()
	for _, h := range asked {
		h.setLeaving(spliceLeavingLEAVING)
	}
	defer func() {
		for _, h := range asked {
			h.setLeaving(spliceLeavingSTAYS)
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, h := range asked {
			h.asked = false
		}
	}()
	r, err := v.iter.Open()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	for {
		start := time.Now()
		at, err := v.next(r, spliceLeaveCall{Half: ^uint32(0)})
		took += time.Since(start)
		if err != nil || at == ^uint32(0) {
			return took, err
		}
		i := slices.IndexFunc(asked, func(h *half) bool { return h.index() == at })
		if i < 0 {
			return took, fmt.Errorf("half %d leaves, and did not ask", at)
		}
		asked[i].offered(&offer{at: r, taken: make(chan struct{})})
		asked[i].setLeaving(spliceLeavingSTAYS)
	}
}

// next goes on with the iterator, and says which half it stands at then; ^0: it has come to the end.
func (v *leaver) next(r io.Reader, call spliceLeaveCall) (at uint32, err error) {
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

// offered waits until the half has taken the offer, if it does at all.
func (h *half) offered(o *offer) {
	h.offer.Store(o)
	h.wake(0)
	select {
	case <-o.taken:
		return
	case <-time.After(leaveOffer):
	}
	o.mu.Lock()
	o.over = true
	o.mu.Unlock()
	defer h.offer.Store(nil)
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if !h.f.closed {
		h.source().kick()
	}
}

// leave takes the offer when what was passed and not read yet is within the flow's bound: it reads that, and is out of the sockmap if nothing else
// has been passed by then. Until then it is copied, and less is passed, in larger pieces: see hold. err: the source is broken.
func (h *half) leave(o *offer) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over {
		return nil
	}
	if !o.held {
		o.held = true
		h.source().hold()
	}
	m := h.shared()
	unread := func() int { return int(load64(&m.Passed)-h.consumed) - len(h.rest) }
	if n := unread(); n > 0 {
		room := int(atomic.LoadUint32(&m.Limit)) - len(h.rest)
		if n > room || h.f.l.rules.order && load64(&m.Redirected) != h.settled && !h.redirectedIsWritten() {
			return nil
		}
		if err := h.takeInHand(min(n+handSlack, room)); err != nil || unread() > 0 {
			return err
		}
	}
	defer close(o.taken)
	defer h.offer.Store(nil)
	defer h.source().kick()
	v := h.f.l.leaver
	if _, err := v.next(o.at, spliceLeaveCall{Half: h.index(), Read: h.consumed + uint64(len(h.rest))}); err != nil {
		return nil // the walk finds it, too
	}
	if spliceLeaving(m.Leaving) == spliceLeavingHAS_LEFT {
		h.left.Store(true)
		h.copying.Store(true)
		h.f.l.counts.bulk.Add(1)
	}
	return nil
}

// takeInHand reads up to n bytes, behind those that are to be written already. err: the source is broken.
func (h *half) takeInHand(n int) error {
	if h.inHand {
		return nil
	}
	h.inHand = true
	h.shared().InHand = uint16((n + 4095) >> 12)
	b := make([]byte, len(h.rest)+n)
	m, err := h.source().read(b[copy(b, h.rest):])
	if m == 0 {
		h.openHand()
		if isAgain(err) {
			return nil
		}
		return err
	}
	h.rest, h.held = b[:len(h.rest)+m], h.f.l.rules.order
	return nil
}

// openHand is for when rest has been written, or never will be.
func (h *half) openHand() {
	if h.inHand {
		h.inHand, h.shared().InHand = false, 0
	}
}

func (h *half) index() uint32 { return 2*h.f.slot + h.i }

func (h *half) setLeaving(to spliceLeaving) {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if !h.f.closed {
		h.shared().Leaving = uint8(to)
	}
}

// takeOffer leaves if that was offered. err: the source is broken.
func (h *half) takeOffer() error {
	o := h.offer.Load()
	if o == nil || h.copying.Load() || h.eof || h.f.broken.Load() != nil {
		return nil
	}
	return h.leave(o)
}

// readyToReturn is asked by a half that has left and holds nothing, with all written that was redirected. It is true
// for the half that is the last to be so.
func (h *half) readyToReturn() bool {
	if h.ready.Load() || load64(&h.shared().Redirected) != h.settled && !h.redirectedIsWritten() {
		return false
	}
	h.ready.Store(true)
	return h.f.halves[1-h.i].ready.Load()
}

// giveBack gives the flow back, if both its streams go on. What a half has read and not written goes with it.
func (f *flow) giveBack() {
	f.mu.Lock()
	if f.closed || f.broken.Load() != nil || f.halves[0].hasEnded() || f.halves[1].hasEnded() ||
		!f.over.CompareAndSwap(false, true) {
		f.mu.Unlock()
		return
	}
	if stop := f.stop.Load(); stop != nil {
		(*stop)()
	}
	f.l.live[f.slot].Store(nil)
	var rest [2][]byte
	for i, s := range f.sockets {
		h := &f.halves[i]
		rest[i], h.rest = bytes.Clone(h.rest), nil
		f.watcher().remove(s)
	}
	f.withdraw()
	f.close()
	f.mu.Unlock()
	f.l.alive.Done()
	up, down := f.count()
	f.returned(int(f.sockets[0]), int(f.sockets[1]), rest[0], rest[1], up, down, f.record.forgetter(), errBusy)
}

// hasFIN: the source's stream has ended, or its end was passed on. Called with the flow's mu held.
func (h *half) hasFIN() bool {
	return h.done.Load() || !tcpsock.IsEstablished(int(h.source()))
}

// hasEnded: the end of the half's stream was read, or passed on.
func (h *half) hasEnded() bool { return h.eof || h.done.Load() }
