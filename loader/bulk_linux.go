package loader

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A flow with a half that stays busy leaves the sockmap and goes on by splice(2), which costs less for each byte, until it may come in again: see
// outside_linux.go. See bpf/splice.bpf.c for why no byte is lost on the way. Each half leaves by itself. When both
// have left, the sockets leave the map of peers, too: the kernel wakes a worker for each socket in there whenever it takes bytes again.
const (
	bulkWithin = time.Second           // leave: 4 MiB (BULK_SHIFT) came in less, twice in a row
	leavePause = 2 * time.Millisecond  // at least, between two walks
	leaveCost  = 10                    // so many times what they take, in the long run
	leaveBurst = 50 * time.Millisecond // what they may take at once
	leaveOffer = 20 * time.Millisecond // a half that has not left after this one stays
	handSlack  = 64 << 10              // bytes that may come between the look at how many there are and the read
)

// bulk is what a half has for it. Only for who is running, but where it says otherwise.
type bulk struct {
	left   atomic.Bool // out of the sockmap: copying, by splice(2)
	behind bool        // and nothing that was redirected waits for the peer; under the flow's outsideMu
	pipe   *pipe       // nil: no bytes of ours are in one
	inPipe int
	unable bool // one of the sockets can't splice
	inHand bool // rest is what was read to leave

	told uint64 // what consumed was when talk was told of it

	asked bool                  // the leaver's, under its lock
	offer atomic.Pointer[offer] // it may leave now

	last int64 // the ring's: when EVENT_BULK came, nanoseconds
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
	l, last := h.f.l, h.bulk.last
	h.bulk.last = now.UnixNano()
	if l.leaver != nil && l.rules.bulk && h.f.process == nil && h.bulk.last-last <= int64(bulkWithin) {
		l.leaver.ask(h.f)
	}
}

// ask makes both halves leave soon.
func (v *leaver) ask(f *flow) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range f.halves {
		if h := &f.halves[i]; !h.bulk.asked && !h.copying.Load() && !h.done.Load() {
			h.bulk.asked = true
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
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, h := range asked {
			h.setLeaving(spliceLeavingSTAYS)
			h.bulk.asked = false
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
	h.bulk.offer.Store(o)
	h.wake(0)
	select {
	case <-o.taken:
		return
	case <-time.After(leaveOffer):
	}
	h.bulk.offer.Store(nil)
	o.mu.Lock()
	o.over = true
	o.mu.Unlock()
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
	h.bulk.offer.Store(nil)
	defer close(o.taken)
	defer h.source().kick()
	v := h.f.l.leaver
	if _, err := v.next(o.at, spliceLeaveCall{Half: h.index(), Read: h.consumed + uint64(len(h.rest))}); err != nil {
		return nil // the walk finds it, too
	}
	if spliceLeaving(m.Leaving) == spliceLeavingHAS_LEFT {
		h.bulk.left.Store(true)
		h.copying.Store(true)
		h.f.talk.turns.Store(talkNot)
		h.f.l.counts.bulk.Add(1)
	}
	return nil
}

// takeInHand reads up to n bytes, behind those that are to be written already. err: the source is broken.
func (h *half) takeInHand(n int) error {
	if h.bulk.inHand {
		return nil
	}
	h.bulk.inHand = true
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
	if h.bulk.inHand {
		h.bulk.inHand, h.shared().InHand = false, 0
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

// splice moves bytes from the source to the peer, one pipe full at most. n == 0: read instead, or wait if isAgain(err).
func (h *half) splice() (n int, err error) {
	b := &h.bulk
	if b.unable {
		return 0, nil
	}
	if b.pipe == nil {
		if b.pipe = getPipe(); b.pipe == nil {
			return 0, nil
		}
	}
	most := b.pipe.size
	if limit := int(h.shared().Limit); limit > 0 {
		most = min(most, limit)
	}
	n, err = b.pipe.fill(h.source(), most)
	switch {
	case n > 0:
		b.inPipe = n
		return n, nil
	case isAgain(err):
		// An urgent byte stops splice(2) for good, and read(2) not.
		if at, err := unix.IoctlGetInt(int(h.source()), unix.SIOCATMARK); err == nil && at != 0 {
			return 0, nil
		}
		return 0, err
	case err != nil:
		b.unable = true // read says what is wrong
	}
	return 0, nil
}

// releasePipe gives the pipe back, or away if bytes are in it.
func (h *half) releasePipe() {
	if b := &h.bulk; b.pipe != nil {
		b.pipe.release(b.inPipe)
		b.pipe, b.inPipe = nil, 0
	}
}
