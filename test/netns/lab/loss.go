package lab

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lossPriority orders our filter among others at the same hook.
const lossPriority = 49152

// applyLoss makes the router's end of the link lose packets both ways. It is done on that end only, since programs
// under test that redirect at tc on the host would go around a filter there; and in tc rather than in netfilter, since
// whoever sends into a blackhole must not get EPERM.
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
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if p == 0 {
		if err := h.nl.QdiscDel(qdisc); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	}
	prog, err := lossProgram(p)
	if err != nil {
		return err
	}
	defer prog.Close() // the filters hold it
	if err := h.nl.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		err := h.nl.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: l.Attrs().Index, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: lossPriority,
			},
			Fd: prog.FD(), Name: "tsl_loss", DirectAction: true,
		})
		if err != nil {
			return err
		}
	}
	return nil
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
