package skmsg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// Local is the datapath. Flows whose target is no process on this host with a socket of its own are refused.
// Safe for concurrent use. Least kernel: 6.1.
//
// It changes what system calls do on the process's sockets: splice(2) from them and TCP_ZEROCOPY_RECEIVE
// don't see bytes that came past TCP, FIONREAD doesn't count them, and MSG_WAITALL and SO_RCVLOWAT don't wait
// for them. Only who knows how the process reads should choose it.
type Local struct {
	l       *sockmap.Engine
	log     *slog.Logger
	hooks   *sockmap.Hooks
	objects skmsgObjects
	memory  []byte       // the local_flows map
	flows   []skmsgLocal // the same
	targets targets
	graces  graces
	counts  sockmap.Counts
}

// What tests may switch off, beside the rules of sockmap.
const (
	ruleLocalOrder  sockmap.Rule = "local_order"  // either way is used only while the other one is empty
	ruleLocalBound  sockmap.Rule = "local_bound"  // as ruleBound
	ruleLocalUnread sockmap.Rule = "local_unread" // a process that closes with bytes unread resets the flow
	// what was redirected reaches the process's queue before what comes by TCP
	ruleLocalDrain sockmap.Rule = "local_drain"
	ruleLocalPair  sockmap.Rule = "local_pair" // the two sockets have one connection's numbers
	// a slot is given again when no program is at work on the flow before
	ruleLocalGrace sockmap.Rule = "local_grace"
	ruleLocalLeave sockmap.Rule = "local_leave" // a flow is given back when the process has read its queue
	ruleLocalLate  sockmap.Rule = "local_late"  // what comes first for a socket captured late goes by TCP
	// what a redirect did not write is taken away from what it was to write
	ruleLocalSettle sockmap.Rule = "local_settle"
)

// Name is the datapath's name.
func (*Local) Name() string { return Name }

// Health is as [sockmap.Engine.Health].
func (n *Local) Health() (off string, stalls uint64) {
	if off, stalls = n.counts.Health(); off == "" {
		off, _ = n.l.Health()
	}
	return off, stalls
}

// Load loads the programs, beside those of l, and pins the maps. The caller closes it, after the flows of l.
func Load(l *sockmap.Engine, c sockmap.Config) (_ *Local, err error) {
	n := &Local{l: l, log: c.Log, hooks: c.Hooks, counts: sockmap.Counts{Name: Name}}
	n.targets.init(n)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("local targets: %w", err), n.Close())
		}
	}()
	if panicsOnWarning() {
		return nil, fmt.Errorf("kernel.panic_on_warn is set, and the kernel may warn of what it charges"+
			" to a process's socket: %w", errors.ErrUnsupported)
	}
	spec, err := loadSkmsg()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	entries := map[string]int{"locals": 2, "caught": 2, "local_places": 1, "local_flows": 1, "local_sources": 2}
	if err := l.Assign(spec, entries, &n.objects); err != nil {
		return nil, err
	}
	for _, a := range []link.RawAttachProgramOptions{
		{Target: n.objects.LocalSources.FD(), Program: n.objects.LocalVerdict,
			Attach: ebpf.AttachSkSKBStreamVerdict},
		{Target: n.objects.Locals.FD(), Program: n.objects.MsgRedirect, Attach: ebpf.AttachSkMsgVerdict},
	} {
		if err := link.RawAttachProgram(a); err != nil {
			return nil, fmt.Errorf("attach %v: %w", a.Attach, host.Translate(err))
		}
	}
	if err := c.Pin(map[string]*ebpf.Map{
		"locals": n.objects.Locals, "caught": n.objects.Caught, "targets": n.objects.Targets,
		"local_places": n.objects.LocalPlaces, "local_flows": n.objects.LocalFlows,
		"local_sources": n.objects.LocalSources,
	}); err != nil {
		return nil, err
	}
	if err := n.graces.init(); err != nil {
		return nil, err
	}
	if n.memory, n.flows, err = sockmap.Mapped[skmsgLocal](n.objects.LocalFlows); err != nil {
		return nil, err
	}
	l.LeaveBy(n.objects.IterLeave, n.objects.Call) // nothing fails behind it
	return n, nil
}

// panicsOnWarning reports whether the kernel panics where it warns. It may warn of a socket of this datapath:
// the worker charges what it puts into the ingress queue to the socket without the socket's lock
// (sk_psock_skb_ingress, 6.18 too). The process may read at the same time, and one of the two sums is lost.
// When the socket is freed, the kernel finds that a few hundred bytes are missing, or are too many, and says
// once: "WARNING ... inet_sock_destruct", in sk_psock_destroy.
func panicsOnWarning() bool {
	b, err := os.ReadFile("/proc/sys/kernel/panic_on_warn")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

// Close is called when there are no flows any more.
func (n *Local) Close() error {
	err := n.targets.close()
	n.graces.close()
	if n.memory != nil {
		err = errors.Join(err, unix.Munmap(n.memory))
		n.memory, n.flows = nil, nil
	}
	if n.objects.Query != nil {
		err = errors.Join(err, n.objects.Close())
	}
	return err
}

// Splice takes the flow over, as [sockmap.Engine.Splice] does, if up's other end is a socket of a process on
// this host that was captured. The first flow to a target is always refused: it is how the target becomes
// known.
func (n *Local) Splice(ctx context.Context, down, up int,
	o sockmap.Flow) (count func() (up, down int64), err error) {
	if n.counts.IsOff() {
		return nil, sockmap.RefusedOff
	}
	p, err := n.targets.find(up)
	if err == nil {
		if count, err = n.l.SpliceBy(ctx, down, up, o, p); err != nil {
			n.targets.release(p)
			// The next offer would take it for one that was captured as it was accepted.
			if p.isLate && n.objects.Caught.Delete(p.pair) == nil {
				_ = n.objects.Locals.Delete(p.pair)
			}
		}
	}
	n.counts.CountRefusal(n.log, err)
	return count, err
}

// process is the process's socket, for one flow, and its [Bypass].
type process struct {
	local      *Local
	pair       skmsgPair
	cookie     uint64
	group      *group // of its cgroup; nil: this process's own, or left
	isLate     bool   // it was captured after it had been accepted
	slot       uint32
	isPrepared atomic.Bool // slot is valid, and has our entry

	// arrived is how much had been redirected when the process was last seen to have got all of it. Only for
	// who runs the direction up.
	arrived uint64
	// read is the same of when the process had read all of it.
	read uint64
}

func (p *process) Sources() *ebpf.Map      { return p.local.objects.LocalSources }
func (p *process) Counts() *sockmap.Counts { return &p.local.counts }

func (p *process) shared() *skmsgLocal { return &p.local.flows[p.slot] }

func (p *process) Prepare(slot uint32, downstream uint64) error {
	// Only one has it: the sweep takes a socket out of its map that nobody has claimed in time.
	if err := p.local.objects.Caught.Delete(p.pair); err != nil {
		return refusedNotCaptured
	}
	p.slot = slot
	p.isPrepared.Store(true)
	*p.shared() = skmsgLocal{Pair: p.pair, Process: p.cookie}
	if p.isLate {
		p.shared().Late = 1
	}
	answer, err := p.query(skmsgLocalRequestLOCAL_BEGIN, 0)
	if err != nil {
		return sockmap.RefusedMaps
	}
	if answer&skmsgLocalAnswerLOCAL_PAIR == 0 && p.local.hooks.Keeps(ruleLocalPair) ||
		answer&skmsgLocalAnswerLOCAL_THERE == 0 {
		return refusedPair
	}
	// Whoever finds the slot by this finds all the above in it, whatever order its processor loads in: where
	// to look depends on what it finds.
	place := skmsgPlace{Flow: downstream, Half: 2 * slot}
	if err := p.local.objects.LocalPlaces.Put(p.cookie, place); err != nil {
		return sockmap.RefusedMaps
	}
	return nil
}

// Accesses to what the programs read and write at the same time. They are functions since the analyzer of
// locks takes none of a field in place.
func load32(p *uint32) uint32     { return atomic.LoadUint32(p) }
func load64(p *uint64) uint64     { return atomic.LoadUint64(p) }
func store32(p *uint32, v uint32) { atomic.StoreUint32(p, v) }

func (p *process) Enable()  { store32(&p.shared().On, 1) }
func (p *process) Disable() { store32(&p.shared().On, 0) }

// WhenDisabled calls do after a grace period.
func (p *process) WhenDisabled(do func()) { p.local.afterGrace(do) }

// Leave takes the process's socket out of its map.
func (p *process) Leave() { _ = p.local.objects.Locals.Delete(p.pair) }

// Undo is Release, and takes the socket out of its map besides, since nothing was redirected to it.
func (p *process) Undo() {
	if p.isPrepared.Load() {
		p.Leave()
	}
	p.Release()
}

// Release leaves the process's socket in its map until it is closed.
func (p *process) Release() {
	if !p.isPrepared.Load() {
		return
	}
	p.local.targets.release(p)
	p.Disable()
	_ = p.local.objects.LocalPlaces.Delete(p.cookie)
	p.isPrepared.Store(false)
}

func (p *process) FreeSlot(slot uint32) { p.local.retire(slot) }

func (p *process) Moved(side uint32) uint64 {
	if !p.isPrepared.Load() {
		return 0
	}
	if side == 0 {
		return load64(&p.shared().In)
	}
	return load64(&p.shared().Out)
}

// query runs the BPF program query, which takes some microseconds.
func (p *process) query(request skmsgLocalRequest, byTCP uint32) (skmsgLocalAnswer, error) {
	return p.local.run(p.local.objects.Query, emptyFrame, p.slot, uint32(request), byTCP)
}

// run runs a program of ours with a frame, and with numbers in cb.
func (n *Local) run(program *ebpf.Program, frame []byte, numbers ...uint32) (skmsgLocalAnswer, error) {
	var c struct { // struct __sk_buff up to cb
		_  [12]uint32
		Cb [5]uint32
		_  [27]uint32
	}
	copy(c.Cb[:], numbers)
	answer, err := program.Run(&ebpf.RunOptions{Data: frame, Context: c})
	return skmsgLocalAnswer(answer), err
}

func (p *process) answers(request skmsgLocalRequest, byTCP uint32, what skmsgLocalAnswer) bool {
	answer, err := p.query(request, byTCP)
	return err == nil && answer&what != 0
}

var emptyFrame = make([]byte, 64) // more than a header, which all kernels take

func (p *process) HasBacklog() bool {
	in := p.Moved(0)
	if in == p.arrived || !p.local.hooks.Keeps(ruleLocalDrain) {
		return false
	}
	if p.answers(skmsgLocalRequestLOCAL_LOOK, 0, skmsgLocalAnswerLOCAL_BACKLOG) {
		return true
	}
	p.arrived = in
	return false
}

func (p *process) HasUnread() bool {
	in := p.Moved(0)
	if in == p.read || !p.local.hooks.Keeps(ruleLocalLeave) {
		return false
	}
	if p.HasBacklog() {
		return true
	}
	// Asked anew: what was moved to the queue before is seen there now. A process that has closed its socket
	// may not have read all of it, which is a reset, and the programs may not have told so yet.
	answer, err := p.query(skmsgLocalRequestLOCAL_LOOK, 0)
	const there = skmsgLocalAnswerLOCAL_THERE
	const waits = skmsgLocalAnswerLOCAL_QUEUE | skmsgLocalAnswerLOCAL_BACKLOG
	if err != nil || answer&(there|waits) != there {
		return true
	}
	p.read = in
	return false
}

func (p *process) ClosedUnread() bool {
	return p.isPrepared.Load() && load32(&p.shared().Unread) != 0
}

func (p *process) Settle(byTCP uint32) bool {
	return p.local.hooks.Keeps(ruleLocalSettle) &&
		p.answers(skmsgLocalRequestLOCAL_SETTLE, byTCP, skmsgLocalAnswerLOCAL_SETTLED)
}

// insert puts a socket of this process into the map, as the sockops program does with those of others.
func (n *Local) insert(server *net.TCPConn) (*process, error) {
	p, err := &process{local: n}, net.ErrClosed
	tcpsock.Control(server, func(fd int) {
		p.pair = pairOf(withoutZone(tcpsock.Local(fd)), withoutZone(tcpsock.Remote(fd)))
		if p.cookie, err = tcpsock.Cookie(fd); err == nil {
			err = errors.Join(n.objects.Caught.Put(p.pair, monotonic()), n.objects.Locals.Put(p.pair, uint64(fd)))
		}
	})
	return p, err
}

func pairOf(own, other netip.AddrPort) skmsgPair {
	return skmsgPair{Own: endOf(own), Other: endOf(other)}
}

func endOf(at netip.AddrPort) skmsgEnd {
	return skmsgEnd{Address: at.Addr().As16(), Port: uint32(at.Port())}
}

func withoutZone(at netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(at.Addr().WithZone(""), at.Port())
}

// Prove makes the tests of a datapath past TCP, and switches the datapath off if they failed. What they found
// is for doctor: the datapath is no condition for the rest.
func (n *Local) Prove() (findings []host.Finding, err error) {
	proof := n.SelfTest()
	if err = prove.Failed(proof); err != nil {
		n.counts.Off.Store(new(string))
	}
	findings = slices.Clone(proof)
	for i := range findings {
		if findings[i].State == host.StateMissing {
			findings[i].State = host.StateDegraded
		}
	}
	return findings, err
}

// SelfTest makes the tests of a datapath past TCP.
func (n *Local) SelfTest() []host.Finding { return prove.Run(tried{n.l.Tried(), n}, prove.PastTCP) }

// tried is the datapath as a proof sees it, with this process in place of another one.
type tried struct {
	prove.Datapath
	n *Local
}

func (t tried) Splice(ctx context.Context, down, up int, server *net.TCPConn,
	o sockmap.Flow) (count func() (up, down int64), err error) {
	p, err := t.n.insert(server)
	if err != nil {
		return nil, fmt.Errorf("put the socket of the process into the map: %w", err)
	}
	return t.n.l.SpliceBy(ctx, down, up, o, p)
}
