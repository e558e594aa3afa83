package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/florianl/go-tc"
	"github.com/florianl/go-tc/core"
	"golang.org/x/sys/unix"
)

// lossPriority orders our filter among others at the same hook.
const lossPriority = 49152

// applyLoss makes the router's end of the link lose packets both ways. It is done on that end only, since
// programs under test that redirect at tc on the host would go around a filter there; and in tc rather than
// in netfilter, since whoever sends into a blackhole must not get EPERM.
func (u *uplink) applyLoss() error {
	p := u.impairment.Loss
	if u.blackhole {
		p = 1
	}
	if err := u.router.setLoss(u.routerDev, p); err != nil {
		return fmt.Errorf("%s: lose %g of the packets on %s: %w", u.router.Name, p, u.routerDev, err)
	}
	return nil
}

func (h *Host) setLoss(dev string, p float64) error {
	if p < 0 || p > 1 {
		return fmt.Errorf("loss is a probability: %w", unix.EINVAL)
	}
	l, err := h.nl.LinkByName(dev)
	if err != nil {
		return err
	}
	index := uint32(l.Attrs().Index)
	clsact := tc.Object{
		Msg:       tc.Msg{Ifindex: index, Handle: core.BuildHandle(tc.HandleRoot, 0), Parent: tc.HandleIngress},
		Attribute: tc.Attribute{Kind: "clsact"},
	}
	if p == 0 {
		if err := h.tc(func(t *tc.Tc) error { return t.Qdisc().Delete(&clsact) }); err != nil && !isNone(err) {
			return err
		}
		return nil
	}
	prog, err := lossProgram(p)
	if err != nil {
		return err
	}
	defer prog.Close()                                               // the filters hold it
	ethPAll := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // in network order
	return h.tc(func(t *tc.Tc) error {
		if err := t.Qdisc().Add(&clsact); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add clsact: %w", err)
		}
		for _, hook := range []uint32{tc.HandleMinIngress, tc.HandleMinEgress} {
			fd, name, flags := uint32(prog.FD()), "tsl_loss", uint32(tc.BpfActDirect)
			err := t.Filter().Replace(&tc.Object{
				Msg: tc.Msg{Ifindex: index, Handle: 1, Parent: core.BuildHandle(tc.HandleRoot, hook),
					Info: lossPriority<<16 | uint32(ethPAll)},
				Attribute: tc.Attribute{Kind: "bpf", BPF: &tc.Bpf{FD: &fd, Name: &name, Flags: &flags}},
			})
			if err != nil {
				return fmt.Errorf("add the filter: %w", err)
			}
		}
		return nil
	})
}

// lossProgram drops packets with probability p, and leaves the others to the programs after it.
func lossProgram(p float64) (*ebpf.Program, error) {
	const (
		unspec = -1 // TC_ACT_UNSPEC
		shot   = 2  // TC_ACT_SHOT
	)
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, shot), asm.Return()}
	if p < 1 {
		insns = asm.Instructions{
			asm.FnGetPrandomU32.Call(),
			asm.LoadImm(asm.R1, int64(p*math.MaxUint32), asm.DWord),
			asm.JLT.Reg(asm.R0, asm.R1, "drop"), // R0 is a u32, zero-extended
			asm.Mov.Imm(asm.R0, unspec),
			asm.Return(),
			asm.Mov.Imm(asm.R0, shot).WithSymbol("drop"),
			asm.Return(),
		}
	}
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "tsl_loss", Type: ebpf.SchedCLS, Instructions: insns, License: "BSD"})
}
