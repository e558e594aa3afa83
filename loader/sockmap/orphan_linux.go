package sockmap

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// Orphan is what a dead process has left of its Engine: the maps. Where somebody else has a flow's sockets as
// well, the verdict goes on with the flow in there, but nobody copies what is passed, or passes an end on.
//
// The dead process was the writer of some fields of a half, and whoever recalls a flow is that now.
type Orphan struct {
	places, sources, peers *ebpf.Map
	pastTCP                *ebpf.Map // the sources of skmsg; nil: there are none
	memory                 []byte    // the halves map
	halves                 []sockmapHalf
}

// OpenOrphan opens the maps that are pinned in a folder. They live until Close, also if they are unpinned.
func OpenOrphan(dir string) (_ *Orphan, err error) {
	o := &Orphan{}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	var halves *ebpf.Map
	for _, p := range []struct {
		name      string
		kind      ebpf.MapType
		valueSize uintptr
		to        **ebpf.Map
	}{
		{"places", ebpf.Hash, unsafe.Sizeof(sockmapPlace{}), &o.places},
		{"halves", ebpf.Array, unsafe.Sizeof(sockmapHalf{}), &halves},
		{"sources", ebpf.SockMap, 8, &o.sources},
		{"peers", ebpf.SockMap, 8, &o.peers},
		{"local_sources", ebpf.SockMap, 8, &o.pastTCP},
	} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, p.name), nil)
		if p.to == &o.pastTCP && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open the pinned map %s: %w", p.name, err)
		}
		if *p.to = m; p.to == &halves {
			defer m.Close()
		}
		if m.Type() != p.kind || m.ValueSize() != uint32(p.valueSize) {
			return nil, fmt.Errorf("the pinned map %s is that of another version: %v", p.name, m)
		}
	}
	o.memory, o.halves, err = Mapped[sockmapHalf](halves)
	return o, err
}

// Close is called when nobody recalls.
func (o *Orphan) Close() (err error) {
	for _, m := range []*ebpf.Map{o.places, o.sources, o.peers, o.pastTCP} {
		if m != nil {
			err = errors.Join(err, m.Close())
		}
	}
	if o.memory != nil {
		err = errors.Join(err, unix.Munmap(o.memory))
	}
	*o = Orphan{}
	return err
}

// find gives the slot of a flow.
func (o *Orphan) find(cookies [2]uint64) (slot uint32, ok bool) {
	for i, cookie := range cookies {
		var at sockmapPlace
		if o.places.Lookup(cookie, &at) == nil && at.Half < uint32(len(o.halves)) && at.Half&1 == uint32(i) &&
			load64(&o.halves[at.Half].Source) == cookie {
			return at.Half / 2, true
		}
	}
	return 0, false
}

// isIn reports whether a sockmap has the socket at an index.
func isIn(m *ebpf.Map, index uint32, cookie uint64) bool {
	var there uint64
	return m != nil && m.Lookup(index, &there) == nil && there == cookie
}

const (
	recallRest    = 64 << 10 // bytes that a recalled flow may bring along each way
	recallPause   = 200 * time.Microsecond
	recallPauses  = 20 * time.Millisecond  // at most
	recallRoom    = 10 * time.Millisecond  // that bytes may wait for room in a send buffer
	recallAtRest  = 500 * time.Millisecond // bytes that have not come by then, don't come
	recallTapShut = 1 << 40                // more bytes than a flow's bound: `ingress_clamp` lets no payload in
)

// errLost is what a recall fails with where bytes were in the hands of the process that died.
var errLost = errors.New("bytes were lost with the process that had the flow")

var errPastTCP = errors.New("bytes of the flow may have gone past TCP")

// Recall takes the flow between two sockets out of the sockmaps, in an instant: it does not wait for the
// flow's ends. rest is what was read of downstream, and of upstream, and is to be written to the other one
// before anything else. found: it was in there; if not, nothing was done.
//
// offsets say how far each way was when nothing of it was in anybody's hands: what upstream had written less
// what downstream had read, and the same the other way (see [tcpsock.Position]). With an error the streams
// are not whole, or it can't be known: the flow is to be reset. Without one they are, but for rest.
//
//   - Both ways pass all that comes. What was redirected before is written by the kernel's worker, for which
//     a send buffer may have to be made larger.
//   - Then no more payload is let in, and what was passed is read: with the socket out of the sockmap nobody
//     could. It is written as far as there is room, and that is made where rest would be too large.
//   - Then the sockets are taken out. Doing that by the system call races with an skb that is on its way to
//     the verdict, which is dropped then. So the verdict is kept from what comes, and in the end the streams'
//     positions say whether all is there.
func (o *Orphan) Recall(ctx context.Context, down, up int, offsets [2]uint64) (rest [2][]byte, found bool, err error) {
	r := recall{o: o, sockets: [2]socket{socket(down), socket(up)}}
	for i, s := range r.sockets {
		if r.cookies[i], err = s.cookie(); err != nil {
			return rest, false, err
		}
	}
	slot, ok := o.find(r.cookies)
	if !ok {
		return rest, false, nil
	}
	for i := range r.ways {
		at := 2*slot + uint32(i)
		if isIn(o.pastTCP, at, r.cookies[i]) {
			return rest, true, errPastTCP
		}
		m := &o.halves[at]
		r.ways[i] = way{shared: m, index: at, source: r.sockets[i], peer: r.sockets[1-i], offset: offsets[i],
			consumed: load64(&m.Consumed), hasVerdict: isIn(o.sources, at, r.cookies[i])}
	}
	if err := r.run(ctx); err != nil {
		return rest, true, err
	}
	for i := range r.ways {
		rest[i] = r.ways[i].rest
	}
	return rest, true, nil
}

// recall is one flow's.
type recall struct {
	o       *Orphan
	sockets [2]socket
	cookies [2]uint64
	ways    [2]way // 0: downstream to upstream
}

// way is one direction of a flow that is recalled.
type way struct {
	shared       *sockmapHalf
	index        uint32
	source, peer socket
	offset       uint64
	hasVerdict   bool   // the source is in the sockmap
	consumed     uint64 // what the dead process had said that it was

	rest      []byte // read, not yet written
	read      uint64
	written   uint64
	left      int64     // how many bytes that were redirected are not written
	isSettled bool      // none
	isShut    bool      // no more payload is let in
	hasRoom   bool      // room was made for all that the peer may have to take
	last      int64     // what there was to wait for
	since     time.Time // when that was seen first
}

func (r *recall) run(ctx context.Context) error {
	for i := range r.ways {
		w := &r.ways[i]
		w.source.kick() // the dead process may have held it
		w.publish()
	}
	for pause := recallPause; ; pause = min(2*pause, recallPauses) {
		for i := range r.ways {
			if err := r.ways[i].move(); err != nil {
				return err
			}
		}
		switch {
		case !r.ways[0].isShut && r.ways[0].isSettled && r.ways[1].isSettled:
			for i := range r.ways {
				r.ways[i].shutTap()
			}
			continue
		case r.ways[0].isShut && r.ways[0].isEmpty() && r.ways[1].isEmpty():
			if hasLeft, err := r.leave(); hasLeft || err != nil {
				return err
			}
		}
		if r.ways[0].isStuck() || r.ways[1].isStuck() {
			return r.mismatch()
		}
		select {
		case <-ctx.Done():
			return errors.Join(r.mismatch(), context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// isStuck reports whether what the way waits for has not come for long, though nothing holds it up.
func (w *way) isStuck() bool {
	left := w.left
	if w.isSettled {
		left = int64(w.unread())
	}
	if left != w.last || w.since.IsZero() || w.isSettled && !w.isShut {
		w.last, w.since = left, time.Now()
	}
	return time.Since(w.since) >= recallAtRest && (w.hasRoom || w.peer.writable()) && !tcpsock.IsShort("/proc")
}

// mismatch says what is missing.
func (r *recall) mismatch() error {
	err := errLost
	for i := range r.ways {
		w := &r.ways[i]
		n, perr := w.missing()
		if perr != nil {
			return errors.Join(errLost, perr)
		}
		if n != 0 {
			err = fmt.Errorf("%w; from %s: %d", err, sideName(uint32(i)), n)
		} else if n := w.unread(); n != 0 {
			err = fmt.Errorf("%w; from %s: %d, or they can't be read", err, sideName(uint32(i)), n)
		}
	}
	return err
}

// publish makes the verdict pass what comes, and `ingress_clamp` count as before: passed grows, and never is
// what consumed is.
func (w *way) publish() {
	if w.hasVerdict && !w.isShut {
		w.shared.InHand = uint16((len(w.rest) + 4095) >> 12)
		store64(&w.shared.Consumed, w.consumed+w.written-1)
	}
}

// shutTap lets in no more payload. What is left out, its sender sends again.
func (w *way) shutTap() {
	if w.isShut = true; w.hasVerdict {
		store64(&w.shared.Consumed, load64(&w.shared.Passed)-recallTapShut)
	}
}

// unread is how many bytes were passed and not read. It is too large where the dead process has written some
// without saying so.
func (w *way) unread() uint64 {
	if !w.hasVerdict {
		return 0
	}
	return load64(&w.shared.Passed) - w.consumed - w.read
}

// missing is how many bytes have left the source and are neither at the peer nor in rest.
func (w *way) missing() (int64, error) {
	to, err := tcpsock.PositionOf(int(w.peer))
	if err != nil {
		return 0, err
	}
	read, err := w.readOf()
	return int64(w.offset + read - to.Written - uint64(len(w.rest))), err
}

// readOf is how many bytes have left the source's receive queue. For a socket in a sockmap some kernels (those
// with "bpf, sockmap: Fix FIONREAD for sockmap", of 2026) count as unread only what was passed and can be read:
// here it is too large then while passed bytes are on their way to there. Where there is no verdict nothing is
// passed, and the queue itself is asked.
func (w *way) readOf() (uint64, error) {
	for {
		before, err := w.source.received()
		if err != nil {
			return 0, err
		}
		p, err := tcpsock.PositionOf(int(w.source))
		if err != nil || w.hasVerdict {
			return p.Read, err
		}
		n := before - w.source.queued()
		if p.IsEnded {
			n--
		}
		if after, err := w.source.received(); err != nil || after == before {
			return n, err
		}
	}
}

// isEmpty reports whether there is nothing that could be read only while the socket is in the sockmap.
func (w *way) isEmpty() bool {
	if w.unread() == 0 {
		return true
	}
	n, err := w.source.unread()
	if err != nil || n > 0 {
		return false
	}
	missing, err := w.missing()
	return err == nil && missing == 0
}

// move reads what was passed, and writes it when what was redirected is written.
func (w *way) move() error {
	if why := sockmapFault(load32((*uint32)(&w.shared.Fault))); why != sockmapFaultFAULT_NONE {
		return fmt.Errorf("%w: the verdict had given up: %s", errLost, faultName(why))
	}
	if err := w.settle(); err != nil {
		return err
	}
	for w.unread() > 0 || len(w.rest) > 0 {
		took, err := w.take()
		if err != nil {
			return err
		}
		wrote, err := w.put()
		if err != nil {
			return err
		}
		if took+wrote == 0 {
			break
		}
	}
	return nil
}

// settle finds out whether the peer's TCP has all that was redirected. That waits for room only where TCP has
// cut the buffer down since, as its reader may for long not read.
func (w *way) settle() error {
	if w.isSettled {
		return nil
	}
	n, err := w.missing()
	if err != nil {
		return err
	}
	w.left, w.isSettled = n, n == 0
	switch {
	case n < 0:
		return fmt.Errorf("%w: %d bytes too many", errLost, -n)
	case n > 0 && !w.since.IsZero() && time.Since(w.since) > recallRoom && !w.hasRoom && !w.peer.writable():
		w.hasRoom = true
		w.peer.widen(int(n))
	}
	return nil
}

// take reads what there is, and what rest has room for.
func (w *way) take() (n int, err error) {
	if w.rest == nil {
		w.rest = make([]byte, 0, recallRest)
	}
	have := len(w.rest)
	if have == cap(w.rest) || w.unread() == 0 {
		return 0, nil
	}
	// 0 is not the stream's end, while what was passed waits behind bytes that go the other way.
	n, err = w.source.read(w.rest[have:cap(w.rest)])
	if err != nil && !isAgain(err) {
		return 0, err
	}
	w.rest, w.read = w.rest[:have+n], w.read+uint64(n)
	return n, nil
}

// put writes what was read, when all that comes before it is written. Where there is no room for more than
// rest may hold, room is made: bytes of the source's receive buffer are in the peer's send buffer then.
func (w *way) put() (n int, err error) {
	if !w.isSettled || len(w.rest) == 0 {
		return 0, nil
	}
	n, err = w.peer.write(w.rest)
	if isAgain(err) && w.isShut && len(w.rest)+int(w.unread()) > recallRest {
		w.hasRoom = true
		w.peer.widen(len(w.rest) + int(w.unread()))
		n, err = w.peer.write(w.rest)
	}
	if err != nil && !isAgain(err) && !isShortOfMemory(err) {
		return 0, err
	}
	w.rest, w.written = w.rest[:copy(w.rest, w.rest[n:])], w.written+uint64(n)
	w.publish()
	return n, nil
}

// leave takes both sockets out of the sockmaps, if nothing more was passed meanwhile.
func (r *recall) leave() (hasLeft bool, err error) {
	for i := range r.ways {
		r.ways[i].source.hold() // under the socket's lock: whatever was on its way to the verdict has come
	}
	defer func() {
		for _, s := range r.sockets {
			s.kick()
		}
	}()
	if !r.ways[0].isEmpty() || !r.ways[1].isEmpty() {
		return false, nil
	}
	for _, m := range []*ebpf.Map{r.o.sources, r.o.peers} {
		for i := range r.ways {
			if err := m.Delete(r.ways[i].index); err != nil && !errors.Is(err, unix.EINVAL) { // it is not there
				return false, fmt.Errorf("take a socket out of %v: %w", m, err)
			}
		}
	}
	for i, s := range r.sockets {
		s.detach()
		_ = r.o.places.Delete(r.cookies[i])
	}
	for i := range r.ways {
		if n, err := r.ways[i].missing(); err != nil || n != 0 {
			return false, r.mismatch()
		}
	}
	return true, nil
}
