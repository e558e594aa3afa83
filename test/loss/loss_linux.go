package loss

import (
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// On makes dev, in this thread's namespace, lose that part of the packets, both ways. 0 ends it.
func On(dev string, part float64) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if part == 0 {
		return netlink.QdiscDel(qdisc)
	}
	const (
		unspec = -1 // TC_ACT_UNSPEC
		stolen = 4  // TC_ACT_STOLEN: the sender doesn't learn of it, as it would from TC_ACT_SHOT
	)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ts_loss", Type: ebpf.SchedCLS, License: "BSD",
		Instructions: asm.Instructions{
			asm.FnGetPrandomU32.Call(),
			asm.LoadImm(asm.R1, int64(part*math.MaxUint32), asm.DWord),
			asm.JLT.Reg(asm.R0, asm.R1, "lose"),
			asm.Mov.Imm(asm.R0, unspec),
			asm.Return(),
			asm.Mov.Imm(asm.R0, stolen).WithSymbol("lose"),
			asm.Return(),
		},
	})
	if err != nil {
		return fmt.Errorf("loss: %w", err)
	}
	defer prog.Close() // the filters hold it
	if err := netlink.QdiscAdd(qdisc); err != nil {
		return fmt.Errorf("loss: clsact: %w", err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		err := netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: l.Attrs().Index, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
			},
			Fd: prog.FD(), Name: "ts_loss", DirectAction: true,
		})
		if err != nil {
			return fmt.Errorf("loss: filter: %w", err)
		}
	}
	return nil
}
