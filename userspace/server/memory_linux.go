package server

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

const (
	memoryEvery = time.Second / 4  // a few readers that stop fill small machines within a second
	restEvery   = time.Second      // the same while so little is taken that this takes a second as well
	fillRate    = 256 << 20        // bytes a second, at which readers who stop fill memory
	idleEvery   = 15 * time.Second // while nobody is connected, and whole while little is taken
	lookRest    = 20               // times the CPU time of a look, which is a twentieth of a CPU at most
	shortRest   = 2                // the same while TCP is short, and next to nothing else can be done
	calmRest    = 4000             // the same while half is taken, but nothing refused or ended

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

// memoryWatch keeps what flows hold within the budget, and within what the kernel has for TCP. What the
// kernel has received for a reader who has stopped can't be given back but with the flow; and where TCP is
// short of memory it gives all others next to nothing.
type memoryWatch struct {
	server  *Server
	last    time.Time               // when it looked whole
	isShort bool                    // half of the memory was taken then
	calm    calm                    // while that is so, and nothing else
	since   map[netip.AddrPort]rest // by the peer's address, while that is so

	greedy map[netip.Prefix]greed // sources that are refused, or were

	saidRights bool // that it may reset no sockets
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

// A greed is what a source has held when memory was short for the last time.
type greed struct {
	held    int64
	last    time.Time
	refused time.Duration // for so long after that
}

// again is the greed of a source that holds so much once more.
func (g greed) again(held int64, now time.Time) greed {
	switch {
	case g.last.IsZero():
		g.refused = greedyFor
	case g.isOver(now): // it was let in
		g.refused = min(2*g.refused, greedyMost)
	}
	g.held, g.last = held, now
	return g
}

// isOver reports whether the source is refused no more.
func (g greed) isOver(now time.Time) bool { return now.Sub(g.last) >= g.refused }

// A rest is a connection at the last look.
type rest struct {
	down  int64     // bytes that its flows had moved to the client
	bytes int64     // all that they had moved when it was last seen to go on
	since time.Time // when that was
}

// isOf reports whether bytes goes on from what r counts: a flow moves more and more, and what one that has
// ended leaves to the kernel counts up from below zero.
func (r rest) isOf(bytes int64) bool {
	if bytes < 0 {
		return r.bytes < 0
	}
	return r.bytes >= 0 && bytes >= r.bytes
}

// goesOn reports whether a connection that holds so much has moved enough by now: a byte now and then would
// keep any amount for ever.
func (r rest) goesOn(bytes, held int64, now time.Time) bool {
	moved := bytes - r.bytes
	return moved > 0 && float64(moved) >= float64(held)*min(1, now.Sub(r.since).Seconds()/slowFor.Seconds())
}

// watchMemory looks until the server ends.
func (srv *Server) watchMemory() {
	w := &memoryWatch{server: srv}
	for timer := time.NewTimer(memoryEvery); ; {
		select {
		case <-srv.ctx.Done():
			timer.Stop()
			srv.opts.Relay.SaveMemory(false)
			srv.opts.Relay.SaveSockets(false)
			srv.opts.Relay.SpareTCP(false)
			return
		case <-srv.memoryWake:
		case <-timer.C:
		}
		timer.Reset(w.glance(time.Now(), "/proc", "/sys/fs/cgroup"))
	}
}

// glance looks whole each time while half of the budget or of TCP's memory may be taken, but while that is
// calm, each restEvery while a source is refused, and else each idleEvery. It gives the time until the next
// glance. While nobody is connected, and nothing is to be given back, that is idleEvery, or until memoryWake
// says that somebody has connected.
func (w *memoryWatch) glance(now time.Time, proc, cgroups string) (pause time.Duration) {
	srv := w.server
	used, short := tcpsock.Memory(proc)
	taken := used + srv.ownMemory()
	srv.spareTCP(short > 0 && used >= short/4, used, short)
	mayBeShort, room := short > 0 && used >= short/2, roomOf(used, short)
	if budget := srv.Memory(); budget > 0 {
		mayBeShort, room = mayBeShort || taken >= budget/2, min(room, roomOf(taken, budget))
	}
	whole := idleEvery
	if len(w.greedy) > 0 {
		whole = restEvery
	}
	pause = min(max(memoryEvery, time.Duration(float64(room)/fillRate*float64(time.Second))), restEvery)
	if now.Sub(w.last) >= whole || w.isShort && !mayBeShort || mayBeShort && !w.calm.lasts(taken, used, now) {
		w.last = now
		var u memoryUse
		took := threadTime(func() {
			u = srv.memoryUse(proc, cgroups)
			w.look(now, u)
		})
		pause = max(pause, restAfter(took, short > 0 && used >= short/4*3))
		if w.calm = (calm{}); len(w.greedy) == 0 && !u.over(5, 8) {
			w.calm = calm{now.Add(min(took*calmRest, idleEvery)), taken + srv.Memory()/32, used + short/32}
		}
	}
	if w.isShort || len(w.greedy) > 0 {
		return pause
	}
	srv.memoryRests.Store(true)
	if srv.limiter.Total() > 0 {
		srv.memoryRests.Store(false)
		return pause
	}
	return idleEvery
}

// saveMemory has the relay hold less for each flow, or as much as else, and says so.
func (srv *Server) saveMemory(isShort bool, u memoryUse) {
	srv.opts.Relay.SaveMemory(isShort && u.what == overMemory)
	srv.opts.Relay.SaveSockets(isShort)
	srv.savesMemory.Store(isShort && u.what == overMemory)
	srv.savesTCP.Store(isShort && u.what != overMemory)
	switch wasShort := srv.saves.Swap(isShort); {
	case isShort && !wasShort:
		srv.limited.Warn("memory_saving", "half of the memory is taken (limits.memory, net.ipv4.tcp_mem): "+
			"buffers of flows grow no more until it is less", "what", u.what, "used", u.used,
			"total", u.total)
	case wasShort && !isShort:
		srv.limited.Info("memory_saved", "less than half of the memory is taken again: "+
			"buffers of flows grow as they need", "what", u.what, "used", u.used, "total", u.total)
	}
}

// spareTCP is saveMemory for what all sockets of the machine have of the kernel's memory for TCP, in bytes.
func (srv *Server) spareTCP(isScarce bool, used, total int64) {
	srv.opts.Relay.SpareTCP(isScarce)
	switch wasScarce := srv.sparesTCP.Swap(isScarce); {
	case isScarce && !wasScarce:
		srv.log.Debug("a quarter of TCP's memory is taken (net.ipv4.tcp_mem): "+
			"readers that have not shown that they read are written less until it is less", "used", used,
			"total", total)
	case wasScarce && !isScarce:
		srv.log.Debug("less than a quarter of TCP's memory is taken again: "+
			"readers are written as much as else", "used", used, "total", total)
	}
}

// memoryStatus is what is taken now, as far as that is cheap to know: of sockets that no cgroup counts it is
// what the last look has found to be ours, or at most as much as the machine has.
func (srv *Server) memoryStatus(proc, cgroups string) *MemoryStatus {
	used, short := tcpsock.Memory(proc)
	own, ok := cgroupSockets(proc, cgroups)
	if !ok {
		own = used
		if found := srv.socketsFound.Load(); found > 0 {
			own = min(own, found)
		}
	}
	return &MemoryStatus{Used: own + srv.ownMemory(), Budget: srv.Memory(), Saving: srv.savesMemory.Load(),
		TCPUsed: used, TCPBudget: short, TCPSaving: srv.savesTCP.Load() || srv.sparesTCP.Load()}
}

// roomOf is how much more may be taken of what there is before flows have to be ended for it. 0: they may
// have to be soon.
func roomOf(taken, total int64) int64 {
	if taken >= total/8*5 {
		return 0
	}
	return total/4*3 - taken
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

// A memoryUse is how much is taken of what there is, in bytes.
type memoryUse struct {
	used, total int64
	what        string // the metric's word for it
	isTCPShort  bool   // the kernel is, and gives every connection next to nothing

	sockets map[netip.AddrPort]tcpSocket // of connections that were accepted, if they were measured for it
	dialled int64                        // bytes held by those dialled for them, and by targets for them
}

// over reports whether n of m parts are taken.
func (u memoryUse) over(n, m int64) bool { return u.total > 0 && u.used >= u.total/m*n }

// part is how much of the whole is taken; 0 where the whole is not known.
func (u memoryUse) part() float64 {
	if u.total <= 0 {
		return 0
	}
	return float64(u.used) / float64(u.total)
}

// memoryUse is that of the budget, or that of what the kernel has for TCP where that is nearer to its end.
// What proc and cgroups don't say is left out.
func (srv *Server) memoryUse(proc, cgroups string) memoryUse {
	used, short := tcpsock.Memory(proc)
	own, ok := cgroupSockets(proc, cgroups)
	rest, budget := srv.ownMemory(), srv.Memory()
	targets, found := int64(0), int64(0)
	var sockets map[netip.AddrPort]tcpSocket
	var held int64
	switch {
	case used >= short/2, !ok && budget > 0 && rest+used >= budget/2:
		if held, targets, sockets = srv.socketMemory(proc); !ok {
			own = min(used, held)
			found = own
		}
	case !ok:
		own = used // and it doesn't matter whose they are
	}
	srv.socketsFound.Store(found)
	all := memoryUse{used: own + rest, total: budget, what: overMemory}
	if tcp := tcpUse(used, min(used, own+targets), short); tcp.part() > all.part() {
		all = tcp
	}
	all.sockets, all.dialled = sockets, held+targets-heldBy(sockets)
	all.isTCPShort = used >= short/2 && tcpsock.IsShort(proc)
	return all
}

// heldBy is what sockets hold together, in bytes.
func heldBy(sockets map[netip.AddrPort]tcpSocket) (sum int64) {
	for _, s := range sockets {
		sum += s.held
	}
	return sum
}

// tcpUse is the use of what the kernel has for TCP, where all sockets of the machine hold used, and own of
// that is ours. What others hold is none of ours to give back: ours is what they leave, but half in any case.
func tcpUse(used, own, short int64) memoryUse {
	return memoryUse{used: own, total: max(short-max(used-own, 0), short/2), what: overTCPMemory}
}

// socketMemory is about what the sockets of all connections hold, in bytes, accepted and dialled ones.
// targets is how much the targets hold for readers that have stopped, in their own sockets on this machine:
// those of other network namespaces may hold what the sockets in this one do not. accepted are those of the
// former that were accepted, by the peer's address; nil: they could not be listed.
func (srv *Server) socketMemory(proc string) (own, targets int64, accepted map[netip.AddrPort]tcpSocket) {
	stopped := map[netip.AddrPort]int64{} // readers, by the target of their flows
	srv.opts.Relay.MeasureHeld(time.Now())
	for _, fl := range srv.flows.Live() {
		target, err := netip.ParseAddrPort(fl.Upstream) // of requests it is not known
		stopped[target] += 0
		if fl.Held == nil {
			continue
		}
		if held, _ := fl.Held(); held > 0 {
			stopped[target]++
			if err != nil {
				own += held
			}
		}
	}
	diag, err := newSockDiag()
	if err != nil {
		return own, 0, nil
	}
	defer diag.Close()
	accepted = map[netip.AddrPort]tcpSocket{}
	ports, seen := *srv.ports.Load(), map[netip.AddrPort]bool{}
	listed := ports
	if len(stopped) > 0 {
		listed = nil
	}
	var here, toHere int64 // that the sockets in this namespace hold, and those of them that may be targets'
	err = diag.each(listed, func(s tcpSocket, peer netip.AddrPort) {
		here += s.held
		_, isDialled := stopped[peer]
		switch {
		case ports[s.local.Port()]:
			own += s.held
			addSocket(accepted, s, peer)
		case isDialled:
			own += s.held
		case stopped[s.local] > 0:
			targets += s.held
			seen[s.local] = true
		case peer.Addr().IsLoopback(), peer.Addr() == s.local.Addr():
			toHere += s.held
		}
	})
	if err != nil {
		return own, 0, nil
	}
	used, _ := tcpsock.Memory(proc)
	elsewhere := max(used-here, 0)
	most := tcpSendMost(proc)
	unseen := int64(0)
	for target, readers := range stopped {
		switch {
		case !target.IsValid():
			targets += min(readers*most, toHere+elsewhere)
		case !seen[target] && maybeHere(target.Addr()):
			unseen += readers * most
		}
	}
	return own, targets + min(unseen, elsewhere), accepted
}

// maybeHere reports whether a container on this machine may have the address.
func maybeHere(a netip.Addr) bool { return a.IsPrivate() && !tailnet.Contains(a) }

// tcpSendMost is how many bytes a socket may hold for its reader, as long as its program does not say it.
func tcpSendMost(proc string) (bytes int64) {
	text, _ := os.ReadFile(filepath.Join(proc, "sys/net/ipv4/tcp_wmem"))
	var least, first int64
	_, _ = fmt.Sscan(string(text), &least, &first, &bytes)
	return bytes
}

// ownMemory is what this process has, its pipes, and the kernel for its connections beside what sockets hold,
// in bytes.
func (srv *Server) ownMemory() int64 {
	return processMemory() + srv.opts.Relay.Piped() + int64(srv.limiter.Total())*connectionKernel
}

// processMemory is what Go has of the kernel for this process, in bytes.
func processMemory() int64 {
	m := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(m)
	return int64(m[0].Value.Uint64() - m[1].Value.Uint64())
}

// A stalled connection holds bytes for a reader who has no room for them.
type stalled struct {
	peer  netip.AddrPort
	owner owner
	since time.Time
	held  int64
	flows []*flow.Flow
}

// An owner is whose connections are counted together: those of a source, or one alone where many clients may
// be behind its address.
type owner struct {
	source netip.Prefix
	alone  netip.AddrPort // the peer
}

func (o owner) String() string {
	if o.source.IsValid() {
		return o.source.String()
	}
	return o.alone.String() + " (one of a hop's)"
}

// look does what u calls for: from half of the memory on little is taken at a time, from 5/8 on sources that
// hold much open no more connections, and from 3/4 on flows that have stood still for longest are ended,
// first those of the source that holds most.
func (w *memoryWatch) look(now time.Time, u memoryUse) {
	srv := w.server
	w.isShort = u.over(1, 2)
	srv.saveMemory(w.isShort, u)
	if w.isShort {
		srv.keeping.giveBack()
	} else {
		w.since = nil
		w.refuse(now, u)
		return
	}
	sockets := u.sockets
	diag, err := newSockDiag()
	if err == nil {
		defer diag.Close()
	}
	if sockets == nil {
		if srv.opts.Relay.MeasureHeld(now); err == nil && u.over(5, 8) {
			sockets, err = diag.tcpSockets(*srv.ports.Load())
		}
	}
	all := w.stalled(now, sockets)
	if u.over(5, 8) {
		// Who takes a lot at a time has much held for a moment.
		standing := slices.DeleteFunc(slices.Clone(all), func(s stalled) bool { return now.Sub(s.since) < stoppedForShort })
		for source, held := range greedySources(standing, greedyMin) {
			if w.greedy == nil {
				w.greedy = map[netip.Prefix]greed{}
			}
			w.greedy[source] = w.greedy[source].again(held, now)
		}
	}
	w.refuse(now, u)
	if err == nil && u.over(3, 4) {
		err = w.end(now, u, all, sockets, diag)
	}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP):
		if !w.saidRights {
			w.saidRights = true
			srv.log.Warn("memory is short, and what flows that have ended left to the kernel can't be taken back: "+
				"that needs CAP_NET_ADMIN, and a kernel with CONFIG_INET_DIAG_DESTROY", "err", err)
		}
	case err != nil:
		srv.limited.Warn("memory_err", "memory is short, and flows that make no progress can't be ended", "err", err)
	}
}

// refuse has the sources refused that have held much until a short while ago.
func (w *memoryWatch) refuse(now time.Time, u memoryUse) {
	srv := w.server
	for keep := greedyMost; ; keep /= 2 {
		maps.DeleteFunc(w.greedy, func(_ netip.Prefix, g greed) bool { return now.Sub(g.last) >= keep })
		if len(w.greedy) <= mostGreedy {
			break
		}
	}
	greedy := map[netip.Prefix]int64{}
	for source, g := range w.greedy {
		if !g.isOver(now) && !srv.mayBeMany(source.Addr()) { // as a configuration may say meanwhile
			greedy[source] = g.held
		}
	}
	if len(greedy) == 0 {
		srv.greedySources.Store(nil)
		return
	}
	if srv.greedySources.Swap(&greedy) == nil {
		most, held := greediest(greedy)
		srv.limited.Warn("memory_greedy", "memory is short: sources that hold much of it for readers that have stopped may open no more connections",
			"sources", len(greedy), "source", most, "held", held, "what", u.what, "used", u.used, "total", u.total)
	}
}

// stalled are the connections that hold something, and since when nothing of theirs has moved.
func (w *memoryWatch) stalled(now time.Time, sockets map[netip.AddrPort]tcpSocket) (all []stalled) {
	type connection struct {
		bytes, down, held int64
		since             time.Time // of what is held
		owner             owner
		flows             []*flow.Flow
	}
	srv := w.server
	flows := srv.flows.Live()
	connections := make(map[netip.AddrPort]connection, len(flows))
	for _, fl := range flows {
		peer, err := netip.ParseAddrPort(fl.Downstream)
		client, cerr := netip.ParseAddrPort(fl.Client)
		if err != nil || cerr != nil {
			continue
		}
		c := connections[peer]
		c.flows = append(c.flows, fl)
		if c.owner.source = limit.PrefixOf(client.Addr()); fl.Shared {
			c.owner = owner{alone: peer}
		}
		up, down := fl.Bytes()
		c.bytes += up + down
		c.down += down
		if fl.Held != nil {
			held, since := fl.Held()
			if c.held += held; held > 0 {
				c.since = since
			}
		}
		connections[peer] = c
	}
	for peer, s := range sockets {
		if _, hasFlow := connections[peer]; hasFlow || !s.isOrphan || !srv.isListeningAt(s.local) {
			continue
		}
		o := owner{source: limit.PrefixOf(peer.Addr())}
		if srv.mayBeMany(peer.Addr()) {
			o = owner{alone: peer}
		}
		connections[peer] = connection{bytes: -s.held, down: -s.held, owner: o} // more when it reads
	}
	since := make(map[netip.AddrPort]rest, len(connections))
	for peer, c := range connections {
		socket := sockets[peer]
		held := max(c.held, socket.held)
		r, known := w.since[peer]
		takes := !known || r.down != c.down // since the last look; who is far and fast has a lot on the way
		if !known || !r.isOf(c.bytes) || sockets != nil && held < stoppedLeast || r.goesOn(c.bytes, held, now) {
			r = rest{bytes: c.bytes, since: now}
		}
		r.down = c.down
		since[peer] = r
		switch {
		case held < stoppedLeast:
		case c.held > 0:
			if r.since.Before(c.since) {
				c.since = r.since
			}
			all = append(all, stalled{peer, c.owner, c.since, held, c.flows})
		// The kernel moves the flow, or these are requests, or the flow has ended.
		case !socket.isEmpty && (!takes || now.Sub(r.since) >= stoppedForShort):
			all = append(all, stalled{peer, c.owner, r.since, held, c.flows})
		}
	}
	w.since = since
	return all
}

// greedySources are those that hold at least so much, of those that are one client each, and how much.
func greedySources(all []stalled, least int64) map[netip.Prefix]int64 {
	held := map[netip.Prefix]int64{}
	for _, s := range all {
		if s.owner.source.IsValid() {
			held[s.owner.source] += s.held
		}
	}
	maps.DeleteFunc(held, func(_ netip.Prefix, n int64) bool { return n < least })
	return held
}

// greediest is the source that holds most.
func greediest(sources map[netip.Prefix]int64) (source netip.Prefix, held int64) {
	for p, n := range sources {
		if n > held || n == held && p.Addr().Less(source.Addr()) {
			source, held = p, n
		}
	}
	return source, held
}

// canEndOrphans: before Linux 6.12 an orphan whose reader takes nothing stays for ever after it was ended
// (bac76cf89816, "tcp: fix forever orphan socket caused by tcp_abort").
var canEndOrphans = sync.OnceValue(func() bool {
	var u unix.Utsname
	var major, minor int
	_ = unix.Uname(&u)
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 12
})

// victims are those of all that have stood still since until, in the order in which they are to be ended:
// again and again the one of the owner that holds most then which has stood still for longest. It takes the
// time of two sorts.
func victims(all []stalled, until time.Time) []stalled {
	type victim struct {
		stalled
		most int64 // that its owner holds when its turn has come
	}
	var order []victim
	sum := map[owner]int64{}
	for _, s := range all {
		if !s.since.After(until) {
			order = append(order, victim{stalled: s})
			sum[s.owner] += s.held
		}
	}
	slices.SortFunc(order, func(a, b victim) int { return cmp.Or(a.since.Compare(b.since), a.peer.Compare(b.peer)) })
	for i := range order {
		v := &order[i]
		v.most = sum[v.owner]
		sum[v.owner] -= v.held
	}
	slices.SortStableFunc(order, func(a, b victim) int { return cmp.Compare(b.most, a.most) })
	out := make([]stalled, len(order))
	for i, v := range order {
		out[i] = v.stalled
	}
	return out
}

// errShort is why a flow ends.
var errShort = errors.New("memory is short (limits.memory, net.ipv4.tcp_mem), and the flow makes no progress")

// end resets connections of all that have stood still for long enough, in the order of victims, until so much
// is given back that u is over no more. Both sides of their flows are reset at once, since what is held for
// the one is in the socket of the other as well. The error is the last one of sockets that the kernel did not
// reset: without CAP_NET_ADMIN those are left alone that no flow has.
func (w *memoryWatch) end(now time.Time, u memoryUse, all []stalled, sockets map[netip.AddrPort]tcpSocket, diag *sockDiag) error {
	until, enough, least := now.Add(-stoppedFor), u.total/4*3, int64(stoppedMin)
	if u.what != overMemory {
		least = stoppedLeast
	}
	if u.over(7, 8) || u.what != overMemory && u.isTCPShort {
		until = now.Add(-stoppedForShort)
		if u.what != overMemory {
			enough = u.total / 2 // it is short until less than 3/4 are taken
		}
	}
	var first owner
	var err error
	n, freed := 0, int64(0)
	// What a connection holds at its other side is not known for each.
	both := 1.0
	if accepted := heldBy(u.sockets); accepted > 0 {
		both += float64(u.dialled) / float64(accepted)
	}
	for _, v := range victims(all, until) {
		socket, ok := sockets[v.peer]
		if !ok || v.held < least || socket.isOrphan && !canEndOrphans() {
			continue // it has ended by itself, or is left alone
		}
		if freed > u.used-enough {
			break
		}
		isKilled := false
		for _, fl := range v.flows {
			if fl.Killer != nil {
				fl.Killer.Kill(errShort)
				isKilled = true
			}
		}
		if derr := diag.destroy(socket); derr != nil {
			if err = derr; !isKilled {
				continue
			}
		}
		if n == 0 {
			first = v.owner
		}
		n++
		freed += max(v.held, int64(float64(socket.held)*both))
	}
	if n > 0 {
		w.server.metrics.Cut.WithLabelValues(u.what).Add(float64(n))
		w.server.limited.Warn("memory_ended", "memory is short: flows that make no progress are ended, those of the source that holds most first",
			"flows", n, "source", first.String(), "what", u.what, "used", u.used, "total", u.total)
	}
	return err
}
