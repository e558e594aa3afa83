package loader

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Local is the datapath for flows whose target is a process on this host, with a socket of its own: sockmap,
// and past TCP between the process and the other side. bpf/skmsg.bpf.c says how. Flows with other targets are
// refused. Least kernel: 6.1.
//
// It changes what system calls do on the process's sockets: splice(2) from them and TCP_ZEROCOPY_RECEIVE
// don't see bytes that came past TCP, FIONREAD doesn't count them, and MSG_WAITALL and SO_RCVLOWAT don't wait
// for them. Only who knows how the process reads should choose it.
type Local struct {
	l       *Loader
	objects skmsgObjects
	memory  []byte       // the local_flows map
	flows   []skmsgLocal // the same
	targets targets
	graces  graces
	counts  counts
	proof   []Finding
}

// What tests may switch off, beside the rules of sockmap.
const (
	ruleLocalOrder  rule = "local_order"  // either way is used only while the other one is empty
	ruleLocalBound  rule = "local_bound"  // as ruleBound
	ruleLocalUnread rule = "local_unread" // a process that closes with bytes unread resets the flow
	ruleLocalDrain  rule = "local_drain"  // what was redirected reaches the process's queue before what comes by TCP
	ruleLocalPair   rule = "local_pair"   // the two sockets have one connection's numbers
	ruleLocalGrace  rule = "local_grace"  // a slot is given again when no program is at work on the flow before
	ruleLocalSettle rule = "local_settle" // what a redirect did not write is taken away from what it was to write
)

// Local gives the datapath for local targets, or says why this machine has none. It is part of the Loader,
// and is closed with it.
func (l *Loader) Local() (*Local, error) {
	if l.local == nil && l.localOff == nil {
		return nil, errors.New("it was not requested")
	}
	return l.local, l.localOff
}

// Name is the datapath's name.
func (*Local) Name() string { return LocalName }

// Stats counts since New.
func (n *Local) Stats() Stats { return n.counts.stats() }

// Health is as [Loader.Health].
func (n *Local) Health() (off string, stalls uint64) {
	if off, stalls = n.counts.health(); off == "" {
		off, _ = n.l.Health()
	}
	return off, stalls
}

func loadLocalTargets(l *Loader, flows int) (_ *Local, err error) {
	n := &Local{l: l}
	n.counts.init(LocalName)
	n.targets.init(n)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("local targets: %w", err), n.close())
		}
	}()
	if v, _, err := runningKernel(); err == nil && v.less(leastLocal) {
		return nil, fmt.Errorf("kernel %v is older than %v: %w", v, leastLocal, errors.ErrUnsupported)
	}
	if panicsOnWarning() {
		return nil, fmt.Errorf("kernel.panic_on_warn is set, and the kernel may warn of what it charges"+
			" to a process's socket: %w", errors.ErrUnsupported)
	}
	spec, err := loadSkmsg()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	for name, m := range map[string]int{
		"locals": 2, "caught": 2, "local_places": 1, "local_flows": 1, "local_sources": 2,
	} {
		spec.Maps[name].MaxEntries = uint32(m * flows)
	}
	if l.hooks != nil {
		if err := spec.Variables["window_ns"].Set(uint64(l.hooks.window)); err != nil {
			return nil, fmt.Errorf("set window_ns: %w", err)
		}
	}
	if err := l.setVariables(spec); err != nil {
		return nil, err
	}
	o := &l.objects
	shared := map[string]*ebpf.Map{"flows": o.Flows, "places": o.Places, "halves": o.Halves, "peers": o.Peers,
		"events": o.Events}
	for name, m := range shared {
		spec.Maps[name].MaxEntries = m.MaxEntries() // else they don't match
	}
	if err := spec.LoadAndAssign(&n.objects, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		return nil, fmt.Errorf("load the BPF programs: %w", translate(err))
	}
	for _, a := range []link.RawAttachProgramOptions{
		{Target: n.objects.LocalSources.FD(), Program: n.objects.LocalVerdict,
			Attach: ebpf.AttachSkSKBStreamVerdict},
		{Target: n.objects.Locals.FD(), Program: n.objects.MsgRedirect, Attach: ebpf.AttachSkMsgVerdict},
	} {
		if err := link.RawAttachProgram(a); err != nil {
			return nil, fmt.Errorf("attach %v: %w", a.Attach, translate(err))
		}
	}
	for name, m := range map[string]*ebpf.Map{
		"locals": n.objects.Locals, "caught": n.objects.Caught, "targets": n.objects.Targets,
		"local_places": n.objects.LocalPlaces, "local_flows": n.objects.LocalFlows,
		"local_sources": n.objects.LocalSources,
	} {
		if err := m.Pin(l.pins.path(name)); err != nil {
			return nil, fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	if err := n.graces.init(); err != nil {
		return nil, err
	}
	page := os.Getpagesize()
	size := (flows*int(unsafe.Sizeof(skmsgLocal{})) + page - 1) &^ (page - 1)
	if n.memory, err = unix.Mmap(n.objects.LocalFlows.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the local flows into memory: %w", err)
	}
	n.flows = unsafe.Slice((*skmsgLocal)(unsafe.Pointer(unsafe.SliceData(n.memory))), flows)
	return n, nil
}

// panicsOnWarning: the worker charges what it puts into the ingress queue to the socket without the socket's
// lock (sk_psock_skb_ingress, 6.18 too). At the same time the process may read, and one of the two sums is
// lost. When the socket is freed, the kernel finds that a few hundred bytes are missing, or are too many, and
// warns, once: "WARNING ... inet_sock_destruct", in sk_psock_destroy.
func panicsOnWarning() bool {
	b, err := os.ReadFile("/proc/sys/kernel/panic_on_warn")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

// leastLocal: before it, an empty queue of the worker did not mean that it had moved all (405df89dd52c), and
// a socket lost what it had not read of its queue when its connection ended (d8616ee2affc).
var leastLocal = version{6, 1, 0}

// close is called when there are no flows any more.
func (n *Local) close() error {
	if n == nil {
		return nil
	}
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

// Splice takes the flow over, as [Loader.Splice] does, if up's other end is a socket of a process on this
// host that was caught. The first flow to a target is always refused: it is how the target becomes known.
func (n *Local) Splice(ctx context.Context, down, up *net.TCPConn,
	o Flow) (count func() (up, down int64), err error) {
	if n.counts.isOff() {
		return nil, refusedOff
	}
	p, err := n.targets.find(up)
	if err == nil {
		if count, err = n.l.spliceConns(ctx, down, up, o, p); err != nil {
			n.targets.release(p)
		}
	}
	n.counts.countRefusal(n.l, err)
	return count, err
}

// process is the process's socket, for one flow. A nil one is that of a flow whose target is elsewhere.
type process struct {
	local      *Local
	pair       skmsgPair
	cookie     uint64
	group      *group // of its cgroup; nil: this process's own, or left
	slot       uint32
	isPrepared atomic.Bool // slot is valid, and has our entry

	// arrived is of who runs direction 0: what was redirected when the process was last seen to have got all of
	// it.
	arrived uint64
	// settled is the sweeper's: so much had moved back when downstream was last seen to have got all of it.
	settled uint64
}

func (p *process) shared() *skmsgLocal { return &p.local.flows[p.slot] }

// prepare makes the flow known to the programs. Nothing moves before begin.
func (p *process) prepare(f *flow) error {
	// Only one has it: the sweep takes a socket out of its map that nobody has claimed in time.
	if err := p.local.objects.Caught.Delete(p.pair); err != nil {
		return refusedNotCaught
	}
	p.slot = f.slot
	p.isPrepared.Store(true)
	*p.shared() = skmsgLocal{Pair: p.pair, Process: p.cookie}
	answer, err := p.query(skmsgLocalRequestLOCAL_BEGIN, 0)
	if err != nil {
		return refusedMaps
	}
	if answer&skmsgLocalAnswerLOCAL_PAIR == 0 && p.local.l.hooks.keeps(ruleLocalPair) ||
		answer&skmsgLocalAnswerLOCAL_THERE == 0 {
		return refusedPair
	}
	// Whoever finds the slot by this finds all the above in it, whatever order its processor loads in: where
	// to look depends on what it finds.
	place := sockmapPlace{Flow: f.cookies[0], Half: 2 * f.slot}
	if err := p.local.objects.LocalPlaces.Put(p.cookie, place); err != nil {
		return refusedMaps
	}
	return nil
}

// enable lets bytes go past TCP.
func (p *process) enable() {
	if p != nil {
		atomic.StoreUint32(&p.shared().On, 1)
	}
}

// disable ends that: downstream's socket is about to be closed.
func (p *process) disable() {
	if p != nil {
		atomic.StoreUint32(&p.shared().On, 0)
	}
}

// undo is release of a flow that has not begun: nothing was redirected to the socket, which leaves its map.
func (p *process) undo() {
	if p != nil && p.isPrepared.Load() {
		_ = p.local.objects.Locals.Delete(p.pair)
	}
	p.release()
}

// release forgets the flow. The process's socket stays in its map until it is closed.
func (p *process) release() {
	if p == nil || !p.isPrepared.Load() {
		return
	}
	p.local.targets.release(p)
	p.disable()
	_ = p.local.objects.LocalPlaces.Delete(p.cookie)
	p.isPrepared.Store(false)
}

// moved is how many bytes of a direction went past TCP. Valid until the flow is closed.
func (p *process) moved(side uint32) uint64 {
	if p == nil || !p.isPrepared.Load() {
		return 0
	}
	if side == 0 {
		return load64(&p.shared().In)
	}
	return load64(&p.shared().Out)
}

// query runs the program of that name: some microseconds.
func (p *process) query(request skmsgLocalRequest, byTCP uint32) (skmsgLocalAnswer, error) {
	c := struct { // struct __sk_buff up to cb
		_  [12]uint32
		Cb [5]uint32
		_  [27]uint32
	}{Cb: [5]uint32{p.slot, uint32(request), byTCP}}
	answer, err := p.local.objects.Query.Run(&ebpf.RunOptions{Data: emptyFrame, Context: c})
	return skmsgLocalAnswer(answer), err
}

var emptyFrame = make([]byte, 64) // more than a header, which all kernels take

// hasBacklog: bytes are on their way to the process's queue. Bytes, and an end, that go to it by TCP now would
// overtake them.
func (p *process) hasBacklog() bool {
	if p == nil || !p.local.l.hooks.keeps(ruleLocalDrain) {
		return false
	}
	in := p.moved(0)
	if in == p.arrived {
		return false
	}
	if answer, err := p.query(skmsgLocalRequestLOCAL_LOOK, 0); err == nil &&
		answer&skmsgLocalAnswerLOCAL_BACKLOG != 0 {
		return true
	}
	p.arrived = in
	return false
}

// closedUnread: the process has closed its socket with bytes unread, which resets a connection.
func (p *process) closedUnread() bool {
	return p != nil && p.isPrepared.Load() && atomic.LoadUint32(&p.shared().Unread) != 0
}

// settle is for the sweeper. Where the way back has not moved for a while, and what the process sent past TCP
// has not all reached downstream's TCP, a redirect was cut short: how far it came is found out then.
func (f *flow) settle(now time.Time) {
	p, d := f.process, &f.directions[1]
	if p == nil || p.settled == d.seen || p.moved(1) == 0 || now.Sub(d.since) < 2*sweepEvery ||
		!p.local.l.hooks.keeps(ruleLocalSettle) {
		return
	}
	m := d.shared()
	byTCP := load64(&m.Redirected) + load64(&m.Consumed)
	// A verdict counts before it redirects, under the lock that TCP_INFO takes.
	var i unix.TCPInfo
	if d.source().info(&i) != nil {
		return
	}
	n, err := d.peer().written()
	if err != nil {
		return
	}
	if int64(n-d.written0-d.byTCP()) >= 0 {
		p.settled = d.seen
		return
	}
	if answer, err := p.query(skmsgLocalRequestLOCAL_SETTLE, uint32(byTCP)); err == nil &&
		answer&skmsgLocalAnswerLOCAL_SETTLED != 0 {
		f.l.log.Debug("a redirect from a process was cut short, and its bytes go by TCP",
			"flow", f.cookies[0], "bytes", d.seen-d.moved())
	}
}

// insert puts the socket of a process that is this one into the map: what the sockops program does for
// others.
func (n *Local) insert(server *net.TCPConn) (*process, error) {
	s, err := dup(server)
	if err != nil {
		return nil, err
	}
	defer s.close()
	cookie, err := s.cookie()
	if err != nil {
		return nil, err
	}
	pair := skmsgPair{Own: endOf(server.LocalAddr()), Other: endOf(server.RemoteAddr())}
	if err := errors.Join(n.objects.Caught.Put(pair, monotonic()),
		n.objects.Locals.Put(pair, uint64(s))); err != nil {
		return nil, err
	}
	return &process{local: n, pair: pair, cookie: cookie}, nil
}

func endOf(a net.Addr) skmsgEnd {
	at := addrPort(a)
	return skmsgEnd{Address: at.Addr().As16(), Port: uint32(at.Port())}
}

func addrPort(a net.Addr) netip.AddrPort {
	t, _ := a.(*net.TCPAddr)
	at := t.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port())
}
