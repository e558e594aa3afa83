package sockmap

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// Splice takes the flow between two non-blocking sockets that are in nobody's poller, or refuses it with an
// error; userspace/datapath says what the caller and it promise each other. It never waits for the flow. When
// it has taken the flow, it owns the sockets.
func (l *Engine) Splice(ctx context.Context, down, up int, o Flow) (count func() (up, down int64), err error) {
	count, err = l.SpliceBy(ctx, down, up, o, tcpOnly{l})
	l.counts.CountRefusal(l.log, err)
	return count, err
}

// SpliceBy is Splice with a way past TCP, and without the counting of refusals.
func (l *Engine) SpliceBy(ctx context.Context, down, up int, o Flow,
	bypass Bypass) (count func() (up, down int64), err error) {
	if l.counts.IsOff() {
		return nil, RefusedOff
	}
	slot, err := l.take()
	if err != nil {
		return nil, err
	}
	defer l.splicing.Done()
	f := &flow{l: l, slot: slot, generation: l.generation.Add(1),
		sockets: [2]socket{socket(down), socket(up)}, o: o, before: [2]int64{o.Up, o.Down}, bypass: bypass,
		counts: bypass.Counts()}
	undo := undo{func() { bypass.FreeSlot(slot) }}
	if err := f.enter(&undo); err != nil {
		undo.run()
		return nil, err
	}
	f.begin(ctx)
	if o.Recallable != nil && o.Returned != nil && l.detacher != nil {
		o.Recallable(f.recall)
	}
	return f.count, nil
}

// undo is what takes back the steps of something that fails in the end.
type undo []func()

func (u *undo) add(back func()) { *u = append(*u, back) }

func (u undo) run() {
	for _, back := range slices.Backward(u) {
		back()
	}
}

// enter makes all that a spliced flow needs, and puts it into the sockmap, or says why that can't be. undo
// gets what takes it back.
func (f *flow) enter(undo *undo) error {
	if f.sockets[0].isMultipath() || f.sockets[1].isMultipath() {
		return refusedMultipath // a sockmap takes none
	}
	for _, s := range f.sockets {
		if err := s.setOptions(undo); err != nil {
			return err
		}
	}
	if err := f.measure(); err != nil {
		return err
	}
	if err := f.list(undo); err != nil {
		return err
	}
	// Edge-triggered: what has happened before is told when the flow is live. An end of stream since the
	// measurement makes the insertion fail.
	for i, s := range f.sockets {
		if f.poller().control(unix.EPOLL_CTL_ADD, s, 2*f.slot+uint32(i), f.generation, 0) != nil {
			return refusedDescriptors
		}
		undo.add(func() { f.poller().remove(s) })
	}
	undo.add(f.withdraw)
	undo.add(f.bypass.Undo)
	if err := f.insert(); err != nil {
		return err
	}
	f.l.inside.Add(1)
	return nil
}

// list puts the flow into the flows map, where it goes on from what the ledger knows of it.
func (f *flow) list(undo *undo) (err error) {
	l, o := f.l, &f.o
	f.record = l.ledger.find(f.cookies[0])
	if f.record == nil && o.Returned != nil && o.Moved != nil && f.isByTCP() {
		if f.record, err = l.ledger.add(f.sockets, f.cookies, *o); err != nil {
			return err
		}
		undo.add(f.record.forget)
	}
	for i := range f.directions {
		l.halves[2*f.slot+uint32(i)] = sockmapHalf{Source: f.cookies[i], Limit: uint32(min(max(o.Buffer, 0), 1<<30))}
		f.directions[i].resume(f.record.history(uint32(i), f.before[i]))
	}
	undo.add(func() { f.record.leave(f); f.forget() })
	if err := f.record.enter(f); err != nil {
		return RefusedMaps
	}
	return nil
}

// insert puts both sockets into the sockmap. From then on bytes move, and there is no way back. If upstream
// has ended or broken meanwhile, its direction is copied to the end.
func (f *flow) insert() error {
	if err := f.prepare(); err != nil {
		return err
	}
	if err := f.bypass.Prepare(f.slot, f.cookies[0]); err != nil {
		return err
	}
	sources := f.bypass.Sources()
	if err := sources.Put(2*f.slot, uint64(f.sockets[0])); err != nil {
		return insertion(err)
	}
	if !f.l.hooks.Keeps(ruleBoth) || sources.Put(2*f.slot+1, uint64(f.sockets[1])) != nil {
		f.directions[1].isCopying.Store(true)
	}
	f.bypass.Enable()
	return nil
}

// prepare lets the programs find the sockets: both can be redirected to before the first of them is asked for
// a verdict.
func (f *flow) prepare() error {
	for i, s := range f.sockets {
		at := 2*f.slot + uint32(i)
		if f.l.objects.Places.Put(f.cookies[i], sockmapPlace{Flow: f.cookies[0], Half: at}) != nil {
			return RefusedMaps
		}
		if s.attach(f.l.objects.IngressClamp) != nil {
			return refusedFilter
		}
		if err := f.l.objects.Peers.Put(at, uint64(s)); err != nil {
			return insertion(err)
		}
	}
	return nil
}

// withdraw undoes prepare, however far that came.
func (f *flow) withdraw() {
	for i, s := range f.sockets {
		_ = f.l.objects.Peers.Delete(2*f.slot + uint32(i))
		s.detach()
		_ = f.l.objects.Places.Delete(f.cookies[i])
	}
}

// begin lets the flow live: it hears of events from now on, and does what came too early to be told of.
func (f *flow) begin(ctx context.Context) {
	f.l.alive.Add(1)
	f.l.live[f.slot].Store(f)
	f.wakeAll()
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { f.finish(prove.EndCanceled, context.Cause(ctx)) })
		f.stop.Store(&stop)
		if f.isOver.Load() {
			stop()
		}
	}
	if f.l.sweeper.atLeast(sweepEvery); f.o.Idle > 0 {
		f.l.sweeper.atLeast(f.o.Idle / 4)
	}
}

// wakeAll is for what had come before events were listened to. The flow may be over by then, and its
// descriptors another flow's, hence the lock.
func (f *flow) wakeAll() {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return
	}
	for i, s := range f.sockets {
		if f.l.hooks.Keeps(ruleKick) {
			s.kick() // the verdict for what was queued before
		}
		f.rearm(uint32(i))
	}
	for i := range f.directions {
		d := &f.directions[i]
		if m := d.shared(); d.isCopying.Load() || load64(&m.Passed) != 0 || d.fault() != 0 {
			d.wake(0) // its event came too early
		}
	}
}

// insertion tells a socket that has ended from one that the kernel does not take.
func insertion(err error) Refusal {
	if errors.Is(err, unix.EOPNOTSUPP) { // sock_map_sk_state_allowed said no
		return RefusedState
	}
	return refusedInsert
}

// measure finds out where both sockets' streams are, before anything moves.
func (f *flow) measure() error {
	for i, s := range f.sockets {
		cookie, err := s.cookie()
		if err != nil {
			return refusedSocket
		}
		f.cookies[i] = cookie
		p, err := tcpsock.PositionOf(int(s))
		if errors.Is(err, unix.ENOTCONN) || p.IsEnded || p.IsShut {
			return RefusedState
		}
		if err != nil {
			return refusedSocket
		}
		d := &f.directions[i]
		d.f, d.side, d.read0 = f, uint32(i), p.Read
		f.directions[1-i].written0 = p.Written
	}
	return nil
}

// setOptions makes the kernel send what it is given, when it is given it. undo gets what gives the old
// options back.
func (s socket) setOptions(undo *undo) error {
	for _, want := range []struct{ level, name, value int }{
		// The kernel sends a redirected skb fragment by fragment; Nagle would hold the last one back.
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		// Else sysctl tcp_notsent_lowat decides, which the verdict doesn't see, whether a write is taken.
		{unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, -1},
		// The verdict gets urgent bytes in their place. Without this the kernel counts as unread only what is
		// before them.
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
	} {
		was, err := unix.GetsockoptInt(int(s), want.level, want.name)
		if err != nil {
			return refusedSocket
		}
		if was == want.value {
			continue
		}
		if err := unix.SetsockoptInt(int(s), want.level, want.name, want.value); err != nil {
			return refusedSocket
		}
		undo.add(func() { _ = unix.SetsockoptInt(int(s), want.level, want.name, was) })
	}
	return nil
}

// forget takes the flow out of the tables. Its sockets have left the sockmaps, or never were there.
func (f *flow) forget() {
	for _, cookie := range f.cookies {
		_ = f.l.objects.Places.Delete(cookie)
	}
	if f.record == nil {
		_ = f.l.objects.Flows.Delete(f.cookies[0])
	}
}

// describe is the entry of a flow that begins, in the flows map.
func describe(sockets [2]socket, upstream uint64, o Flow) sockmapFlow {
	t := sockmapFlow{State: sockmapFlowStateFLOW_SPLICED, UpstreamCookie: upstream}
	t.Up.Before, t.Down.Before = uint64(o.Up), uint64(o.Down)
	t.Up.Bytes, t.Down.Bytes = t.Up.Before, t.Down.Before
	text(t.Id[:], o.ID)
	text(t.Route[:], o.Route)
	text(t.Downstream[:], sockets[0].remote())
	text(t.DownstreamLocal[:], sockets[0].local())
	text(t.UpstreamLocal[:], sockets[1].local())
	text(t.Upstream[:], sockets[1].remote())
	return t
}

// text writes s into a C string, cut to what fits.
func text(to []int8, s string) {
	for i := 0; i < len(s) && i < len(to)-1; i++ {
		to[i] = int8(s[i])
	}
}

// What the programs write at the same time.
func load32(p *uint32) uint32     { return atomic.LoadUint32(p) }
func load64(p *uint64) uint64     { return atomic.LoadUint64(p) }
func store64(p *uint64, v uint64) { atomic.StoreUint64(p, v) }
