package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Loader has the programs loaded, and splices flows. Safe for concurrent use. Least kernel: 6.1.
type Loader struct {
	log      *slog.Logger
	rules    rules
	pins     *pins
	objects  spliceObjects
	memory   []byte       // the halves map
	halves   []spliceHalf // the same
	watchers []*watcher   // one for some of the slots each
	ring     *ringbuf.Reader
	ringBusy atomic.Bool // with an event that was taken from it
	findings []Finding
	local    *Local // nil: not asked for, or not possible
	localOff error  // why not

	live    []atomic.Pointer[flow] // by slot
	ledger  ledger
	sweeper *sweeper
	leaver  *leaver        // nil: no half can leave
	loops   sync.WaitGroup // watchers, ring, sweeper, leaver

	mu       sync.Mutex
	free     []uint32 // slots, the longest free first
	closed   bool
	splicing sync.WaitGroup // calls of Splice that have a slot; added to under mu
	alive    sync.WaitGroup // flows; added to while splicing

	inside  atomic.Int32 // flows that are in the sockmap
	resting atomic.Int32 // so many of them had nothing to move when the sweeper looked

	counts counts
}

// rules that a test may turn off, to prove that each is needed. All are on in production.
type rules struct {
	bound, trim, fin   bool   // in the verdict
	couple             bool   // likewise: while one way passes, the other one does
	brake              bool   // what is charged to nobody is bounded
	late               bool   // a reset waits for what is in front of bytes that were passed before it
	pressure           uint64 // pages: if TCP has so many, all is passed
	watchers           int    // how many; 0: for this machine
	drain, kick, reset bool
	quiet              bool // no EPOLLIN for spliced sockets
	order              bool // copy only when what was redirected is written
	both               bool // upstream gets a verdict, too
	events             bool // epoll tells of bytes that can be copied, and of room for them
	look               bool // the sweep ends stalls
	again              func(look func())
	local              localRules
}

var allRules = rules{
	bound: true, trim: true, fin: true, couple: true, brake: true, late: true, pressure: tcpPressure(),
	drain: true, kick: true, reset: true, quiet: true, order: true, both: true, events: true,
	look: true, again: lookAgain(), local: allLocalRules,
}

// New loads the programs, pins the maps in BPFFS/tailsplice/INSTANCE/GENERATION, removes what dead daemons left below
// BPFFS/tailsplice, and proves on loopback that this kernel splices rightly. The caller closes the Loader.
//
// It fails with an error that says what is lacking: [ErrKnownBad], a [*SelfTestError], an error that wraps
// errors.ErrUnsupported where the kernel can't do it at all, or the system's. [Again] tells whether another try
// makes sense.
func New(o Options) (*Loader, error) {
	if err := refuseKnownBad(o); err != nil {
		return nil, err
	}
	r := allRules
	r.pressure = tcpPressure() // it may have been raised since the last try
	l, err := load(o, r)
	if err != nil {
		return nil, explain(err)
	}
	l.findings = l.selfTest()
	l.counts.spliced.Store(0) // its flows don't count
	if err := failed(l.findings); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if o.Local {
		l.proveLocal()
		if l.local != nil {
			l.local.counts.spliced.Store(0)
		}
		if Again(l.localOff) {
			return nil, errors.Join(l.localOff, l.Close())
		}
	}
	return l, nil
}

// Name is the datapath's name.
func (l *Loader) Name() string { return Name }

// load is New without the proof.
func load(o Options, r rules) (_ *Loader, err error) {
	if o.MaxFlows <= 0 {
		o.MaxFlows = DefaultMaxFlows
	}
	l := &Loader{log: o.Log, rules: r}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	// Kernels before 5.11 count maps as locked memory. Where it can't be raised and had to be, the maps say
	// so.
	if err := rlimit.RemoveMemlock(); err != nil {
		l.log.Debug("raise the locked memory limit", "error", err)
	}
	if l.pins, err = claimPins(o.BPFFS, o.Instance, l.log); err != nil {
		return l, err
	}
	if err = l.loadObjects(o); err != nil {
		return l, err
	}
	if err = l.mapHalves(o.MaxFlows); err != nil {
		return l, err
	}
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: l.objects.Sources.FD(), Program: l.objects.Splice, Attach: ebpf.AttachSkSKBStreamVerdict,
	})
	if err != nil {
		return l, fmt.Errorf("attach the verdict to the sockmap: %w", translate(err))
	}
	for name, m := range l.named() {
		if err = m.Pin(l.pins.path(name)); err != nil {
			return l, fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	l.live = make([]atomic.Pointer[flow], o.MaxFlows)
	l.free = make([]uint32, o.MaxFlows)
	for i := range l.free {
		l.free[i] = uint32(i)
	}
	l.counts.init(Name)
	l.ledger.init(l)
	if o.Local {
		if l.local, l.localOff = loadLocalTargets(l, o.MaxFlows); l.localOff != nil {
			l.local = nil
		}
	}
	if err = l.pins.publish(); err != nil {
		return l, err
	}
	return l, l.start()
}

func (l *Loader) loadObjects(o Options) error {
	spec, err := loadSplice()
	if err != nil {
		return fmt.Errorf("read the BPF object: %w", err)
	}
	for name, n := range map[string]int{"flows": 1, "places": 2, "halves": 2, "peers": 2, "sources": 2} {
		spec.Maps[name].MaxEntries = uint32(n * o.MaxFlows)
	}
	if err := l.setVariables(spec); err != nil {
		return err
	}
	if err := spec.LoadAndAssign(&l.objects, nil); err != nil {
		return fmt.Errorf("load the BPF programs: %w", translate(err))
	}
	return nil
}

// setVariables sets what both objects have.
func (l *Loader) setVariables(spec *ebpf.CollectionSpec) error {
	for name, value := range map[string]any{
		"rule_bound": l.rules.bound, "rule_trim": l.rules.trim, "rule_fin": l.rules.fin,
		"rule_couple": l.rules.couple, "rule_brake": l.rules.brake, "rule_late": l.rules.late,
		"tcp_pressure": l.rules.pressure,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// tcpPressure is from how many pages on TCP saves memory. The setting can be read in the first network
// namespace only; elsewhere it is taken for what the kernel begins with, a sixteenth of what there is.
func tcpPressure() uint64 {
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_mem"); err == nil {
		if fields := strings.Fields(string(b)); len(fields) == 3 {
			if n, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
				return n
			}
		}
	}
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) != nil {
		return 0
	}
	return uint64(i.Totalram) * uint64(i.Unit) / uint64(os.Getpagesize()) / 16
}

func (l *Loader) mapHalves(flows int) error {
	page := os.Getpagesize()
	size := (2*flows*int(unsafe.Sizeof(spliceHalf{})) + page - 1) &^ (page - 1)
	b, err := unix.Mmap(l.objects.Halves.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the halves into memory: %w", err)
	}
	l.memory = b
	l.halves = unsafe.Slice((*spliceHalf)(unsafe.Pointer(unsafe.SliceData(b))), 2*flows)
	return nil
}

func (l *Loader) start() (err error) {
	// Each serves its flows on one processor at a time; userspace needs the others.
	for range max(l.rules.watchers, runtime.GOMAXPROCS(0)/2, 1) {
		w, err := newWatcher()
		if err != nil {
			return err
		}
		l.watchers = append(l.watchers, w)
	}
	if l.ring, err = ringbuf.NewReader(l.objects.Events); err != nil {
		return fmt.Errorf("open the ring of events: %w", err)
	}
	if l.leaver, err = newLeaver(l); err != nil {
		l.log.Info("busy flows stay in the sockmap", "error", err)
	}
	l.sweeper = newSweeper()
	if l.leaver != nil {
		l.loops.Go(func() { l.leaver.run(l) })
	}
	for _, w := range l.watchers {
		l.loops.Go(func() { w.run(l.event) })
	}
	l.loops.Go(l.readRing)
	l.loops.Go(func() { l.sweeper.run(l.sweep) })
	return nil
}

func (l *Loader) named() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		"flows": l.objects.Flows, "places": l.objects.Places, "halves": l.objects.Halves,
		"peers": l.objects.Peers, "sources": l.objects.Sources,
	}
}

// Close resets the flows that live, and removes the programs, maps and pins, but for a map with bytes that a
// process on this host has not read yet. It may be called twice.
func (l *Loader) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	l.splicing.Wait()
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			f.finish(endCanceled, errors.New("the sockmap datapath was closed"))
		}
	}
	l.alive.Wait() // for those that were about to end by themselves
	l.ledger.close()
	var errs []error
	for _, w := range l.watchers {
		errs = append(errs, w.close())
	}
	if l.ring != nil {
		errs = append(errs, l.ring.Close())
	}
	if l.sweeper != nil {
		l.sweeper.close()
	}
	l.leaver.stop()
	l.loops.Wait()
	errs = append(errs, l.leaver.close())
	errs = append(errs, l.local.close())
	if l.pins != nil {
		errs = append(errs, l.pins.release(l.log))
	}
	if l.memory != nil {
		l.mu.Lock()
		l.halves = nil
		errs = append(errs, unix.Munmap(l.memory))
		l.memory = nil
		l.mu.Unlock()
	}
	if l.objects.Splice != nil {
		errs = append(errs, l.objects.Close())
	}
	return errors.Join(errs...)
}

// take reserves a slot.
func (l *Loader) take() (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, refusedOff
	}
	if len(l.free) == 0 {
		return 0, refusedFull
	}
	slot := l.free[0]
	l.free = l.free[1:]
	l.splicing.Add(1)
	return slot, nil
}

// give returns a slot. The one that was free longest is taken next, so that whoever still holds a stale
// number sees an empty slot.
func (l *Loader) give(slot uint32) {
	l.halves[2*slot] = spliceHalf{}
	l.halves[2*slot+1] = spliceHalf{}
	l.mu.Lock()
	l.free = append(l.free, slot)
	l.mu.Unlock()
}

func (l *Loader) readRing() {
	var r ringbuf.Record
	for {
		if err := l.ring.ReadInto(&r); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				l.log.Error("read the ring of events; flows are looked at once a second now", "error", err)
			}
			return
		}
		l.ringBusy.Store(true)
		l.ringEvent(r.RawSample)
		l.ringBusy.Store(false)
	}
}

func (l *Loader) ringEvent(sample []byte) {
	if len(sample) < int(unsafe.Sizeof(spliceEvent{})) {
		return
	}
	e := *(*spliceEvent)(unsafe.Pointer(unsafe.SliceData(sample)))
	if int(e.Half/2) >= len(l.live) {
		return
	}
	if f := l.live[e.Half/2].Load(); f != nil {
		h := &f.halves[e.Half&1]
		switch spliceEventKind(e.Kind) {
		case spliceEventKindEVENT_BULK:
			h.isBulk(time.Now())
			return
		case spliceEventKindEVENT_PASSED:
			f.counts.switched.Add(1)
		}
		h.wake(0)
	}
}

// ringBehind: there are events in the ring that were not told of yet.
func (l *Loader) ringBehind() bool { return l.ringBusy.Load() || l.ring.AvailableBytes() > 0 }

// explain says which capability a refusal of the kernel's is about; the kernel doesn't, and cilium/ebpf
// suspects a limit.
func explain(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	if f := probeCapabilities(); f.State == StateMissing {
		return fmt.Errorf("%s (%s): %w", f.Detail, f.Advice, unix.EPERM)
	}
	return err
}

// translate makes cilium/ebpf's notion of what a kernel can't do into the standard library's.
func translate(err error) error {
	if errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%w (%w)", err, errors.ErrUnsupported)
	}
	return err
}

const sweepEvery = time.Second
