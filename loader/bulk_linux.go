package loader

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A half that stays busy leaves the sockmap and goes on by splice(2), which costs less for each byte; when it is quiet it comes back, since
// an idle or a chatty flow costs less there. See bpf/splice.bpf.c for why no byte is lost on the way.
const (
	bulkWithin = time.Second          // leave: 4 MiB (BULK_SHIFT) came in less, twice in a row
	quietBytes = 1 << 20              // come back: so many at most in quietAfter
	quietAfter = time.Second          //
	leavePause = 2 * time.Millisecond // at least, between two looks at all sockets
	leaveCost  = 10                   // and so many times what the last one took
	leaveLooks = 20                   // give up when the half was never at rest
	narrowFrom = 2                    // looks, after which it is made to come to rest
)

// bulk is what a half has for it. Only for who is running, but where it says otherwise.
type bulk struct {
	left   atomic.Bool // out of the sockmap: copying, by splice(2)
	pipe   *pipe       // nil: no bytes of ours are in one
	inPipe int
	unable bool // one of the sockets can't splice

	asked bool // the leaver's, under its lock

	last    int64  // the ring's: when EVENT_BULK came, nanoseconds
	checked int64  // the sweeper's, likewise
	was     uint64 // what had moved then
}

// leaver takes halves out of the sockmap that ask for it.
type leaver struct {
	iter *link.Iter
	poke chan struct{}
	quit chan struct{}

	mu    sync.Mutex
	asked []*leaving
}

// leaving is a half that asks.
type leaving struct {
	*half
	looks int
	clamp int // TCP_WINDOW_CLAMP before the window was made small; 0: it was not
	locks int // SO_BUF_LOCK before
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
	return &leaver{iter: it, poke: make(chan struct{}, 1), quit: make(chan struct{})}, nil
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
		l.leaver.ask(h)
	}
}

// ask makes the half leave soon, if it comes to rest for a moment.
func (v *leaver) ask(h *half) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if h.bulk.asked {
		return
	}
	h.bulk.asked = true
	v.asked = append(v.asked, &leaving{half: h})
	select {
	case v.poke <- struct{}{}:
	default:
	}
}

// run looks at those that ask, until stop.
func (v *leaver) run(l *Loader) {
	for {
		select {
		case <-v.quit:
			return
		case <-v.poke:
		}
		for more := true; more; {
			start := time.Now()
			more = v.look(l)
			// All sockets are looked at, which must not become the work of this machine.
			select {
			case <-v.quit:
				return
			case <-time.After(max(leavePause, leaveCost*time.Since(start))):
			}
		}
	}
}

// look runs the iterator for those that ask. more: some still do.
func (v *leaver) look(l *Loader) (more bool) {
	v.mu.Lock()
	asked := v.asked
	v.asked = nil
	v.mu.Unlock()
	for _, h := range asked {
		h.setLeaving(spliceLeavingLEAVING)
		if h.looks++; h.looks >= narrowFrom {
			h.narrow()
		}
	}
	err := v.iterate()
	if err != nil {
		l.log.Debug("take bulk flows out of the sockmap", "error", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, h := range asked {
		if h.hasLeft() {
			l.counts.bulk.Add(1)
		} else if err == nil && h.looks < leaveLooks && !h.isOver() {
			v.asked = append(v.asked, h)
			continue
		}
		h.setLeaving(spliceLeavingSTAYS)
		h.restore()
		h.bulk.asked = false
	}
	return len(v.asked) > 0
}

// narrow makes the window small, so that the sender goes on slowly and passed == consumed comes about: while
// the peer is the slower one, bytes wait here all the time.
func (h *leaving) narrow() {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	var i unix.TCPInfo
	if h.f.closed || h.source().info(&i) != nil {
		return
	}
	if h.clamp == 0 {
		h.clamp, h.locks = h.source().windowClamp(), h.source().bufferLocks()
	}
	h.source().setBufferLocks(h.locks | unix.SOCK_RCVBUF_LOCK) // else the kernel makes both larger
	h.source().setWindowClamp(4 * int(i.Advmss))
}

func (h *leaving) restore() {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if h.clamp > 0 && !h.f.closed {
		h.source().setBufferLocks(h.locks)
		h.source().setWindowClamp(h.clamp)
	}
}

func (v *leaver) iterate() error {
	r, err := v.iter.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r) // the program prints nothing
	return err
}

func (h *half) isOver() bool {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	return h.f.closed
}

func (h *half) setLeaving(to spliceLeaving) {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if !h.f.closed {
		h.shared().Leaving = uint16(to)
	}
}

// hasLeft looks whether the iterator took the half out, and makes userspace copy if so.
func (h *half) hasLeft() bool {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if h.f.closed || spliceLeaving(h.shared().Leaving) != spliceLeavingHAS_LEFT {
		return false
	}
	h.bulk.left.Store(true)
	h.copying.Store(true)
	h.wake(0)
	return true
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

// isQuiet is the sweeper's look at a half that has left: has so little moved that it may come back?
func (h *half) isQuiet(now time.Time) bool {
	b, moved, at := &h.bulk, h.moved(), now.UnixNano()
	if at-b.checked < int64(quietAfter) {
		return false
	}
	quiet := b.checked != 0 && moved-b.was <= quietBytes
	b.checked, b.was = at, moved
	return quiet
}

// comeBack puts the source under the verdict again. Userspace holds no byte of the half, and has read all there was.
// false: its stream is about to end, and it stays as it is.
func (h *half) comeBack() bool {
	m, f := h.shared(), h.f
	h.releasePipe()
	m.Passed = m.Consumed
	if f.l.objects.Sources.Put(2*f.slot+h.i, uint64(h.source())) != nil {
		return false
	}
	h.calm = false
	h.bulk.left.Store(false)
	h.copying.Store(false)
	h.source().kick() // for what came meanwhile
	return true
}
