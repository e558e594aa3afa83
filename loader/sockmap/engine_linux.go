package sockmap

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
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// Engine has the verdict and its maps, and splices flows. Safe for concurrent use. Least kernel: 6.1.
type Engine struct {
	log      *slog.Logger
	hooks    *Hooks
	pressure uint64 // pages: if TCP has so many, all is passed
	objects  sockmapObjects
	memory   []byte        // the halves map
	halves   []sockmapHalf // the same
	pollers  []*poller     // one for some of the slots each
	ring     *ringbuf.Reader
	ringBusy atomic.Bool // with an event that was taken from it
	onSweep  func(now time.Time) (again bool)

	live     []atomic.Pointer[flow] // by slot
	ledger   ledger
	sweeper  *sweeper
	detacher *detacher // nil: no direction can leave
	leave    leaving
	loops    sync.WaitGroup // pollers, ring, sweeper, detacher

	mu sync.Mutex
	// +checklocks:mu
	free []uint32 // slots, the longest free first
	// +checklocks:mu
	closed   bool
	splicing sync.WaitGroup // calls of Splice that have a slot; added to under mu
	alive    sync.WaitGroup // flows; added to while splicing
	unload   sync.Once

	generation atomic.Uint32 // of the flow that began last

	inside atomic.Int32 // flows that are in the sockmap
	quiet  atomic.Int32 // flows in the sockmap that had nothing to move when the sweeper looked

	counts Counts
}

// Config says how to load an Engine.
type Config struct {
	MaxFlows int                              // at a time
	Pin      func(map[string]*ebpf.Map) error // pins the maps by their names
	Log      *slog.Logger
	Hooks    *Hooks // nil in production
}

// Name is the datapath's name.
func (l *Engine) Name() string { return Name }

// Load loads the programs, and pins the maps. It splices after Start. The caller closes the Engine.
func Load(c Config) (_ *Engine, err error) {
	free := make([]uint32, c.MaxFlows)
	for i := range free {
		free[i] = uint32(i)
	}
	if c.Hooks != nil && c.Hooks.Slots > 0 {
		free = free[:c.Hooks.Slots]
	}
	_, pressure := tcpsock.Memory("/proc")
	l := &Engine{log: c.Log, hooks: c.Hooks, pressure: uint64(pressure) / uint64(os.Getpagesize()), free: free,
		live: make([]atomic.Pointer[flow], c.MaxFlows), counts: Counts{Name: Name}}
	if c.Hooks != nil && c.Hooks.Pressure != 0 {
		l.pressure = c.Hooks.Pressure
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	spec, err := loadSockmap()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	entries := map[string]int{"flows": 1, "places": 2, "halves": 2, "peers": 2, "sources": 2}
	if err = l.Assign(spec, entries, &l.objects); err != nil {
		return nil, err
	}
	if l.memory, l.halves, err = Mapped[sockmapHalf](l.objects.Halves); err != nil {
		return nil, err
	}
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: l.objects.Sources.FD(), Program: l.objects.Verdict, Attach: ebpf.AttachSkSKBStreamVerdict,
	})
	if err != nil {
		return nil, fmt.Errorf("attach the verdict to the sockmap: %w", host.Translate(err))
	}
	if err = c.Pin(l.named()); err != nil {
		return nil, err
	}
	l.ledger.init(l)
	l.LeaveBy(l.objects.IterLeave, l.objects.Call)
	return l, nil
}

// leaving is the iterator that takes sockets out of their sockmap.
type leaving struct {
	iter *ebpf.Program
	call *ebpf.Variable // sockmapLeaveCall
}

// LeaveBy has flows leave by the iterator of another object, which knows its sockmap too. It is called before
// Start.
func (l *Engine) LeaveBy(iter *ebpf.Program, call *ebpf.Variable) { l.leave = leaving{iter, call} }

// Mapped maps an array into memory, and gives its entries, which userspace may write to. The caller unmaps
// memory.
func Mapped[T any](m *ebpf.Map) (memory []byte, entries []T, err error) {
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(unsafe.Sizeof(*new(T))) + page - 1) &^ (page - 1)
	memory, err = unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map %v into memory: %w", m, err)
	}
	return memory, unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(memory))), m.MaxEntries()), nil
}

// Assign loads the object of spec into to. Its maps that l has as well (see Shared) are l's; each of the
// others in entries gets room for so many entries a flow. Assign sets the variables that all objects have.
func (l *Engine) Assign(spec *ebpf.CollectionSpec, entries map[string]int, to any) error {
	for name, n := range entries {
		spec.Maps[name].MaxEntries = uint32(n * len(l.live))
	}
	have := map[string]*ebpf.Map{}
	for name, m := range l.Shared() {
		if m != nil && spec.Maps[name] != nil {
			have[name], spec.Maps[name].MaxEntries = m, m.MaxEntries() // else they don't match
		}
	}
	for name, v := range spec.Variables {
		var err error
		switch r, isRule := strings.CutPrefix(name, "rule_"); {
		case isRule:
			err = v.Set(l.hooks.Keeps(Rule(r)))
		case name == "tcp_pressure":
			err = v.Set(l.pressure)
		case name == "window_ns" && l.hooks != nil:
			err = v.Set(uint64(l.hooks.Window))
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if err := spec.LoadAndAssign(to, &ebpf.CollectionOptions{MapReplacements: have}); err != nil {
		return fmt.Errorf("load the BPF programs: %w", host.Translate(err))
	}
	return nil
}

// Start lets flows be spliced. onSweep is called at each sweep, and reports whether it has to be called again
// within a second: without that, and without flows, it is in 15 s.
func (l *Engine) Start(onSweep func(now time.Time) (again bool)) (err error) {
	l.onSweep = onSweep
	// Each poller serves its flows on one processor at a time, and userspace needs the other processors.
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

// Shared are the maps that another object with a verdict uses, too.
func (l *Engine) Shared() map[string]*ebpf.Map {
	maps := l.named()
	maps["events"] = l.objects.Events
	return maps
}

func (l *Engine) named() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		"flows": l.objects.Flows, "places": l.objects.Places, "halves": l.objects.Halves,
		"peers": l.objects.Peers, "sources": l.objects.Sources,
	}
}

// Stop resets the flows that live, and refuses new ones. Slots may still be given back.
func (l *Engine) Stop() error {
	l.mu.Lock()
	closed := l.closed
	l.closed = true
	l.mu.Unlock()
	if closed {
		return nil
	}
	l.splicing.Wait()
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			f.finish(prove.EndCanceled, errors.New("the sockmap datapath was closed"))
		}
	}
	l.alive.Wait() // for those that were about to end by themselves
	l.ledger.close()
	var errs []error
	for _, p := range l.pollers {
		errs = append(errs, p.close())
	}
	if l.ring != nil {
		errs = append(errs, l.ring.Close())
	}
	if l.sweeper != nil {
		l.sweeper.close()
	}
	if l.detacher != nil {
		close(l.detacher.quit)
	}
	l.loops.Wait()
	if l.detacher != nil {
		errs = append(errs, l.detacher.iter.Close())
	}
	return errors.Join(errs...)
}

// Close stops, and removes the programs and maps. It may be called twice.
func (l *Engine) Close() error {
	err := l.Stop()
	l.unload.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.halves = nil; l.memory != nil {
			err = errors.Join(err, unix.Munmap(l.memory))
		}
		if l.objects.Verdict != nil {
			err = errors.Join(err, l.objects.Close())
		}
	})
	return err
}

// take reserves a slot.
func (l *Engine) take() (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, RefusedOff
	}
	if len(l.free) == 0 {
		return 0, refusedFull
	}
	slot := l.free[0]
	l.free = l.free[1:]
	l.splicing.Add(1)
	return slot, nil
}

// FreeSlot returns a slot. The one that was free longest is taken next, so that whoever still holds a stale
// number sees an empty slot.
func (l *Engine) FreeSlot(slot uint32) {
	l.halves[2*slot] = sockmapHalf{}
	l.halves[2*slot+1] = sockmapHalf{}
	l.mu.Lock()
	l.free = append(l.free, slot)
	l.mu.Unlock()
}

// The time between two sweeps, unless a flow needs them more often, and without flows.
const (
	sweepEvery = time.Second
	restEvery  = 15 * time.Second
)
