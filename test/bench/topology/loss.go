package topology

import (
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// setLoss loses packets on the client's device, both ways: programs under test that redirect at tc on the proxy would
// go around a filter there. Both ends of the link stop making super-packets, of which one lost would be forty lost.
func setLoss(client *namespace, dev string, proxy *namespace, peer string, p float64) error {
	offload := "on"
	if p > 0 {
		offload = "off"
	}
	for _, e := range []struct {
		on  *namespace
		dev string
	}{{client, dev}, {proxy, peer}} {
		if err := run(e.on, "", "ethtool", "-K", e.dev, "tso", offload, "gso", offload); err != nil {
			return err
		}
	}
	return client.do(func() error { return loseOn(dev, p) })
}

// loseOn attaches, in this thread's namespace, or detaches if p is 0.
func loseOn(dev string, p float64) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if p == 0 {
		return netlink.QdiscDel(qdisc)
	}
	const (
		unspec = -1 // TC_ACT_UNSPEC
		stolen = 4  // TC_ACT_STOLEN: the sender doesn't learn of it, as it would from TC_ACT_SHOT
	)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ts_bench_loss", Type: ebpf.SchedCLS, License: "BSD",
		Instructions: asm.Instructions{
			asm.FnGetPrandomU32.Call(),
			asm.LoadImm(asm.R1, int64(p*math.MaxUint32), asm.DWord),
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
			Fd: prog.FD(), Name: "ts_bench_loss", DirectAction: true,
		})
		if err != nil {
			return fmt.Errorf("loss: filter: %w", err)
		}
	}
	return nil
}
