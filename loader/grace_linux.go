package loader

import (
	"fmt"
	"sync"

	"github.com/cilium/ebpf"
)

// graces gives slots back when no program can be at work on the flow that had them. See "Slots" in
// bpf/skmsg.bpf.c.
type graces struct {
	outer, inner *ebpf.Map // an update of outer returns after a grace period of RCU

	mu      sync.Mutex
	retired []uint32
	isBusy  bool // somebody is at them
	done    sync.WaitGroup
}

func (g *graces) init() (err error) {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	if g.inner, err = ebpf.NewMap(inner); err != nil {
		return fmt.Errorf("make a map to wait with: %w", translate(err))
	}
	g.outer, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1,
		InnerMap: inner})
	if err != nil {
		return fmt.Errorf("make a map to wait with: %w", translate(err))
	}
	return nil
}

// wait returns when all programs that run now have ended (maybe_wait_bpf_programs in kernel/bpf/syscall.c).
func (g *graces) wait() error { return g.outer.Put(uint32(0), g.inner) }

// close waits for the slots that are on their way back.
func (g *graces) close() {
	g.done.Wait()
	_ = g.outer.Close()
	_ = g.inner.Close()
}

// giveSlot gives the flow's slot back: a little later if it was known to programs that may still be at work
// on it.
func (f *flow) giveSlot() {
	if f.process != nil {
		f.process.local.retire(f.slot)
	} else {
		f.l.give(f.slot)
	}
}

func (n *Local) retire(slot uint32) {
	g := &n.graces
	g.mu.Lock()
	defer g.mu.Unlock()
	g.retired = append(g.retired, slot)
	if !g.isBusy {
		g.isBusy = true
		g.done.Go(n.giveRetired)
	}
}

func (n *Local) giveRetired() {
	g := &n.graces
	for {
		g.mu.Lock()
		slots := g.retired
		g.retired, g.isBusy = nil, len(slots) > 0
		g.mu.Unlock()
		if len(slots) == 0 {
			return
		}
		if n.l.hooks.keeps(ruleLocalGrace) {
			if err := g.wait(); err != nil {
				n.l.log.Error("wait for the programs on ended flows; their slots are lost",
					"slots", len(slots), "error", err)
				continue
			}
		}
		for _, slot := range slots {
			n.flows[slot] = skmsgLocal{}
			n.l.give(slot)
		}
	}
}
