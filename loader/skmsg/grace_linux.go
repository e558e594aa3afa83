package skmsg

import (
	"fmt"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/tailsplice/tailsplice/loader/host"
)

// graces gives slots back when no program can be at work on the flow that had them, and says when none is at
// work that began before. See "Slots" and "Giving back" in bpf/skmsg.bpf.c.
type graces struct {
	outer *ebpf.Map // an update of it returns after a grace period of RCU
	inner *ebpf.Map

	mu sync.Mutex
	// +checklocks:mu
	retired []uint32
	// +checklocks:mu
	waiting []func()
	// +checklocks:mu
	isBusy bool // somebody is at them
	done   sync.WaitGroup
}

func (g *graces) init() (err error) {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	if g.inner, err = ebpf.NewMap(inner); err != nil {
		return fmt.Errorf("make a map to wait with: %w", host.Translate(err))
	}
	g.outer, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1,
		InnerMap: inner})
	if err != nil {
		return fmt.Errorf("make a map to wait with: %w", host.Translate(err))
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

// retire gives a slot back after a grace period. It does not wait.
func (n *Local) retire(slot uint32) {
	n.graces.mu.Lock()
	defer n.graces.mu.Unlock()
	n.graces.retired = append(n.graces.retired, slot)
	n.startGraces()
}

// afterGrace calls do after a grace period, if that can be had. It does not wait.
func (n *Local) afterGrace(do func()) {
	n.graces.mu.Lock()
	defer n.graces.mu.Unlock()
	n.graces.waiting = append(n.graces.waiting, do)
	n.startGraces()
}

// +checklocks:n.graces.mu
func (n *Local) startGraces() {
	if !n.graces.isBusy {
		n.graces.isBusy = true
		n.graces.done.Go(n.runGraces)
	}
}

// runGraces waits for grace periods until nobody else does.
func (n *Local) runGraces() {
	for {
		n.graces.mu.Lock()
		slots, waiting := n.graces.retired, n.graces.waiting
		n.graces.retired, n.graces.waiting, n.graces.isBusy = nil, nil, len(slots)+len(waiting) > 0
		n.graces.mu.Unlock()
		if len(slots)+len(waiting) == 0 {
			return
		}
		if n.hooks.Keeps(ruleLocalGrace) {
			if err := n.graces.wait(); err != nil {
				n.log.Error("wait for the programs on ended flows; their slots are lost",
					"slots", len(slots), "error", err)
				continue
			}
		}
		for _, slot := range slots {
			n.flows[slot] = skmsgLocal{}
			n.l.FreeSlot(slot)
		}
		for _, do := range waiting {
			do()
		}
	}
}
