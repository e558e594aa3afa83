package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
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
	hooks    *hooks
	pressure uint64 // pages: if TCP has so many, all is passed
	pins     *pins
	objects  sockmapObjects
	memory   []byte        // the halves map
	halves   []sockmapHalf // the same
	pollers  []*poller     // one for some of the slots each
	ring     *ringbuf.Reader
	ringBusy atomic.Bool // with an event that was taken from it
	findings []Finding
	local    *Local // nil: not asked for, or not possible
	localOff error  // why not

	live     []atomic.Pointer[flow] // by slot
	ledger   ledger
	sweeper  *sweeper
	detacher *detacher      // nil: no direction can leave
	loops    sync.WaitGroup // pollers, ring, sweeper, detacher

	mu       sync.Mutex
	free     []uint32 // slots, the longest free first
	closed   bool
	splicing sync.WaitGroup // calls of Splice that have a slot; added to under mu
	alive    sync.WaitGroup // flows; added to while splicing

	inside atomic.Int32 // flows that are in the sockmap
	quiet  atomic.Int32 // so many of them had nothing to move when the sweeper looked

	counts counts
}

// New loads the programs, pins the maps in BPFFS/tailsplice/INSTANCE/GENERATION, removes what dead daemons left below
// BPFFS/tailsplice, and proves on loopback that this kernel splices rightly. The caller closes the Loader.
//
// It fails with an error that says what is lacking: [ErrKnownBad], a [*SelfTestError], an error that wraps
// errors.ErrUnsupported where the kernel can't do it at all, or the system's. [Again] tells whether another try
// makes sense.
func New(o Options) (*Loader, error) {
	if err := refuseKnownBad(o.KnownBad); err != nil {
		return nil, err
	}
	l, err := load(o, nil)
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

// Probe looks at what the datapaths need of this machine, for people. See [probeHost].
func Probe() []Finding {
	return probeHost(func(privileged bool) Finding { return probeBPFFS(defaultBPFFS, privileged) })
}

// Name is the datapath's name.
func (l *Loader) Name() string { return Name }

// load is New without the proof.
func load(o Options, h *hooks) (_ *Loader, err error) {
	if o.MaxFlows <= 0 {
		o.MaxFlows = DefaultMaxFlows
	}
	l := &Loader{log: o.Log, hooks: h, pressure: tcpPressure()}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if h != nil && h.pressure != 0 {
		l.pressure = h.pressure
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
		Target: l.objects.Sources.FD(), Program: l.objects.Verdict, Attach: ebpf.AttachSkSKBStreamVerdict,
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
	spec, err := loadSockmap()
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
	values := map[string]any{"tcp_pressure": l.pressure}
	for name := range spec.Variables {
		if r, ok := strings.CutPrefix(name, "rule_"); ok {
			values[name] = l.hooks.keeps(rule(r))
		}
	}
	for name, value := range values {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func (l *Loader) mapHalves(flows int) error {
	page := os.Getpagesize()
	size := (2*flows*int(unsafe.Sizeof(sockmapHalf{})) + page - 1) &^ (page - 1)
	b, err := unix.Mmap(l.objects.Halves.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the halves into memory: %w", err)
	}
	l.memory = b
	l.halves = unsafe.Slice((*sockmapHalf)(unsafe.Pointer(unsafe.SliceData(b))), 2*flows)
	return nil
}

func (l *Loader) start() (err error) {
	// Each serves its flows on one processor at a time; userspace needs the others.
	for range max(runtime.GOMAXPROCS(0)/2, 1) {
		w, err := newPoller()
		if err != nil {
			return err
		}
		l.pollers = append(l.pollers, w)
	}
	if l.ring, err = ringbuf.NewReader(l.objects.Events); err != nil {
		return fmt.Errorf("open the ring of events: %w", err)
	}
	if l.detacher, err = newDetacher(l); err != nil {
		l.log.Info("busy flows stay in the sockmap", "error", err)
	}
	l.sweeper = newSweeper()
	if l.detacher != nil {
		l.loops.Go(func() { l.detacher.run(l) })
	}
	for _, w := range l.pollers {
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
	for _, w := range l.pollers {
		errs = append(errs, w.close())
	}
	if l.ring != nil {
		errs = append(errs, l.ring.Close())
	}
	if l.sweeper != nil {
		l.sweeper.close()
	}
	l.detacher.stop()
	l.loops.Wait()
	errs = append(errs, l.detacher.close())
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
	if l.objects.Verdict != nil {
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
	l.halves[2*slot] = sockmapHalf{}
	l.halves[2*slot+1] = sockmapHalf{}
	l.mu.Lock()
	l.free = append(l.free, slot)
	l.mu.Unlock()
}

const sweepEvery = time.Second
