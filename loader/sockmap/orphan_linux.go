package sockmap

import (
	"bytes"
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
	recallRest   = 64 << 10 // bytes that a recalled flow may bring along in each direction
	recallPause  = 200 * time.Microsecond
	recallPauses = 20 * time.Millisecond  // at most
	recallRoom   = 10 * time.Millisecond  // that bytes may wait for room in a send buffer
	recallAtRest = 500 * time.Millisecond // bytes that have not come by then, don't come
	recallLooks  = 20                     // on a machine that is busy, at least so often
	// more bytes than a flow's bound: `ingress_clamp` lets no payload in
	recallTapShut = 1 << 40
)

// errLost is what a recall fails with where bytes were in the hands of the process that died.
var errLost = errors.New("bytes were lost with the process that had the flow")

var errPastTCP = errors.New("bytes of the flow may have gone past TCP")

// Recall takes the flow between two sockets out of the sockmaps, in an instant: it does not wait for the
// flow's ends. rest is what was read of downstream, and of upstream, and is to be written to the other one
// before anything else. found: it was in there; if not, nothing was done.
//
// offsets say how far each direction was when nothing of it was in anybody's hands: what upstream had written
// less what downstream had read, and the same the other way (see [tcpsock.Position]). With an error the
// streams are not whole, or it can't be known: the flow is to be reset. Without one they are, but for rest.
//
//   - Both ways pass all that comes. What was redirected before is written by the kernel's worker, for which
//     a send buffer may have to be made larger.
//   - Then no more payload is let in, and what was passed is copied: with the socket out of the sockmap
//     nobody could read it. Where there is no room for it, that is made, if it is more than rest may be.
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
	for i := range r.directions {
		at := 2*slot + uint32(i)
		if isIn(o.pastTCP, at, r.cookies[i]) {
			return rest, true, errPastTCP
		}
		m := &o.halves[at]
		r.directions[i] = recalled{shared: m, index: at, source: r.sockets[i], peer: r.sockets[1-i],
			offset: offsets[i], consumed: load64(&m.Consumed), hasVerdict: isIn(o.sources, at, r.cookies[i])}
	}
	if err := r.run(ctx); err != nil {
		return rest, true, err
	}
	for i := range r.directions {
		if b := r.directions[i].rest; len(b) > 0 {
			rest[i] = bytes.Clone(b)
		}
	}
	return rest, true, nil
}

// recall is one flow's.
type recall struct {
	o          *Orphan
	sockets    [2]socket
	cookies    [2]uint64
	directions [2]recalled // 0: downstream to upstream
	isShut     bool        // no more payload is let in
}

// recalled is one direction of a flow that is recalled.
type recalled struct {
	shared       *sockmapHalf
	index        uint32
	source, peer socket
	offset       uint64
	hasVerdict   bool   // the source is in the sockmap
	consumed     uint64 // what the dead process had said that it was

	rest      []byte // read, not yet written
	read      uint64
	left      int64     // bytes that were redirected and are not written
	isSettled bool      // left is 0
	isShut    bool      // no more payload is let in for the source
	hasRoom   bool      // room was made for all that the peer may have to take
	last      int64     // what there was to wait for
	since     time.Time // when that was seen first
	looks     int       // how often it was seen since
}

// run is Recall, for a flow that is in the sockmap.
func (r *recall) run(ctx context.Context) error {
	r.passAll()
	for pause := recallPause; ; pause = min(2*pause, recallPauses) {
		if err := r.move(); err != nil {
			return err
		}
		switch a, b := &r.directions[0], &r.directions[1]; {
		case !r.isShut && a.isSettled && b.isSettled:
			r.shutTaps()
			continue
		case r.isShut && a.toCome() == 0 && b.toCome() == 0:
			if hasLeft, err := r.leave(); hasLeft || err != nil {
				return err
			}
		}
		if r.directions[0].isStuck() || r.directions[1].isStuck() {
			return r.lost()
		}
		select {
		case <-ctx.Done():
			return errors.Join(r.lost(), context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// passAll has both directions pass all that comes.
func (r *recall) passAll() {
	for i := range r.directions {
		d := &r.directions[i]
		d.source.kick() // the dead process may have held it
		if d.hasVerdict && load64(&d.shared.Passed) == d.consumed {
			store64(&d.shared.Consumed, d.consumed-1) // so passed, which grows, never is what consumed is
		}
	}
}

// move goes on with both directions.
func (r *recall) move() error {
	for i := range r.directions {
		if err := r.directions[i].move(); err != nil {
			return err
		}
	}
	return nil
}

// toCome is how many bytes the direction waits for.
func (d *recalled) toCome() int64 {
	switch {
	case !d.isSettled:
		return d.left
	case d.isShut && d.hasVerdict:
		return int64(d.unread())
	}
	return 0
}

// isStuck reports whether what the direction waits for has not come for long, though nothing holds it up.
func (d *recalled) isStuck() bool {
	if n := d.toCome(); n == 0 || n != d.last {
		d.last, d.since, d.looks = n, time.Now(), 0
		return false
	}
	d.looks++
	if time.Since(d.since) < recallAtRest || d.looks < recallLooks {
		return false
	}
	if d.isSettled && len(d.rest) < recallRest { // there is nothing to read
		return true
	}
	return (d.hasRoom || d.peer.writable()) && !d.isShortOfMemory()
}

// isShortOfMemory reports whether TCP may take nothing for the peer though there seems to be room. Some it
// always takes, where nothing is queued.
func (d *recalled) isShortOfMemory() bool {
	n, err := d.peer.unacked()
	return err == nil && n > 0 && tcpsock.IsShort("/proc")
}

// lost says what is missing.
func (r *recall) lost() error {
	err := errLost
	for i := range r.directions {
		if n := r.directions[i].toCome(); n != 0 {
			err = fmt.Errorf("%w; %d bytes from %s", err, n, sideName(uint32(i)))
		}
	}
	return err
}

// shutTaps lets in no more payload, and what was passed is copied. What is left out, its sender sends again.
func (r *recall) shutTaps() {
	r.isShut = true
	for i := range r.directions {
		d := &r.directions[i]
		if d.isShut = true; d.hasVerdict {
			store64(&d.shared.Consumed, load64(&d.shared.Passed)-recallTapShut)
		}
	}
}

// unread is how many bytes were passed and not read; of a source without a verdict, what its queue has.
func (d *recalled) unread() uint64 {
	if !d.hasVerdict {
		return d.source.queued()
	}
	return load64(&d.shared.Passed) - d.consumed - d.read
}

// missing is how many bytes have come to the source, and are not unread, nor in rest, nor at the peer. What
// the dead process has read is unread for the protocol, unless it has said that it was written: so this is
// less than 0 by what it has written without saying so.
//
// SIOCINQ would not do: of a socket in a sockmap some kernels (those with "bpf, sockmap: Fix FIONREAD for
// sockmap", of 2026) don't count what is on its way to where it can be read.
func (d *recalled) missing() (int64, error) {
	for {
		before, err := d.source.received()
		if err != nil {
			return 0, err
		}
		from, err := tcpsock.PositionOf(int(d.source))
		if err != nil {
			return 0, err
		}
		unread := d.unread()
		switch after, err := d.source.received(); {
		case err != nil:
			return 0, err
		case after != before:
			continue
		}
		if from.IsEnded {
			before--
		}
		to, err := tcpsock.PositionOf(int(d.peer))
		return int64(d.offset + before - unread - uint64(len(d.rest)) - to.Written), err
	}
}

// fault says that the verdict has given up, or that the source was reset and TCP does not know.
func (d *recalled) fault() error {
	if why := sockmapFault(load32((*uint32)(&d.shared.Fault))); why != sockmapFaultFAULT_NONE {
		return fmt.Errorf("%w: the verdict had given up: %s", errLost, faultName(why))
	}
	return nil
}

// move waits until what was redirected is written. When that is so of both ways, it copies what was passed.
func (d *recalled) move() error {
	if err := d.fault(); err != nil {
		return err
	}
	if !d.isShut {
		return d.settle()
	}
	for d.hasVerdict && d.unread() > 0 || len(d.rest) > 0 {
		took, err := d.take()
		if err != nil {
			return err
		}
		wrote, err := d.put()
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
func (d *recalled) settle() (err error) {
	if d.isSettled {
		return nil
	}
	if d.left, err = d.missing(); err != nil {
		return err
	}
	switch {
	case d.left < 0 && (!d.hasVerdict || uint64(-d.left) > d.unread()):
		return fmt.Errorf("%w, or %d have come from nowhere", errLost, -d.left)
	case d.left <= 0:
		d.isSettled = true
		d.consumed += uint64(-d.left)
	case !d.since.IsZero() && time.Since(d.since) > recallRoom && !d.hasRoom && !d.peer.writable():
		d.hasRoom = true
		d.peer.widen(int(d.left))
	}
	return nil
}

// take reads what there is, and what rest has room for.
func (d *recalled) take() (n int, err error) {
	if d.rest == nil {
		d.rest = make([]byte, 0, recallRest)
	}
	have := len(d.rest)
	if have == cap(d.rest) || d.unread() == 0 {
		return 0, nil
	}
	// 0 is not the stream's end, while what was passed waits behind bytes that go the other way.
	n, err = d.source.read(d.rest[have:cap(d.rest)])
	if err != nil && !isAgain(err) {
		return 0, err
	}
	d.rest, d.read = d.rest[:have+n], d.read+uint64(n)
	return n, nil
}

// put writes what was read. Where there is no room for more than rest may hold, room is made: bytes of the
// source's receive buffer are in the peer's send buffer then.
func (d *recalled) put() (n int, err error) {
	if len(d.rest) == 0 {
		return 0, nil
	}
	n, err = d.peer.write(d.rest)
	if isAgain(err) && len(d.rest)+int(d.unread()) > recallRest {
		d.hasRoom = true
		d.peer.widen(len(d.rest) + int(d.unread()))
		n, err = d.peer.write(d.rest)
	}
	if err != nil && !isAgain(err) && !isShortOfMemory(err) {
		return 0, err
	}
	d.rest = d.rest[:copy(d.rest, d.rest[n:])]
	return n, nil
}

// leave takes both sockets out of the sockmaps, if nothing more was passed meanwhile.
func (r *recall) leave() (hasLeft bool, err error) {
	for i := range r.directions {
		// Under the socket's lock: whatever was on its way to the verdict has come.
		r.directions[i].source.hold()
	}
	defer func() {
		for _, s := range r.sockets {
			s.kick()
		}
	}()
	if r.directions[0].toCome() > 0 || r.directions[1].toCome() > 0 {
		return false, nil
	}
	for _, m := range []*ebpf.Map{r.o.sources, r.o.peers} {
		for i := range r.directions {
			if err := m.Delete(r.directions[i].index); err != nil && !errors.Is(err, unix.EINVAL) {
				// it is not there
				return false, fmt.Errorf("take a socket out of %v: %w", m, err)
			}
		}
	}
	for i, s := range r.sockets {
		s.detach()
		_ = r.o.places.Delete(r.cookies[i])
	}
	for i := range r.directions {
		d := &r.directions[i]
		d.hasVerdict = false
		if d.left, err = d.missing(); err != nil {
			return false, err
		}
		if err := d.fault(); err != nil {
			return false, err
		}
		d.isSettled = d.left == 0
	}
	if !r.directions[0].isSettled || !r.directions[1].isSettled {
		return false, r.lost()
	}
	return true, nil
}
