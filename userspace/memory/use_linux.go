package memory

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/metrics"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// socketKernel is what a socket takes of the kernel's memory while it does nothing, in bytes, by the slab of
// Linux 6.1 with 16,000 of them.
const socketKernel = 5 << 10

// roomOf is how much more may be taken of what there is before flows have to be ended for it. 0: they may
// have to be soon.
func roomOf(taken, total int64) int64 {
	if taken >= total/8*5 {
		return 0
	}
	return total/4*3 - taken
}

// A Use is how much is taken of what there is, in bytes.
type Use struct {
	Used, Total int64
	What        string // OfBudget or OfTCP
	isTCPShort  bool   // the kernel is, and gives every connection next to nothing

	sockets tcpsock.Sockets // of connections that were accepted, if they were measured for it
	dialled int64           // bytes held by those dialled for them, and by targets for them
}

// over reports whether n of m parts are taken.
func (u Use) over(n, m int64) bool { return u.Total > 0 && u.Used >= u.Total/m*n }

// part is how much of the whole is taken; 0 where the whole is not known.
func (u Use) part() float64 {
	if u.Total <= 0 {
		return 0
	}
	return float64(u.Used) / float64(u.Total)
}

// use is that of the budget, or that of what the kernel has for TCP where that is nearer to its end. What the
// kernel doesn't say is left out.
func (w *Watch) use() Use {
	used, short := tcpsock.Memory(w.proc)
	own, ok := cgroupSockets(w.proc, w.cgroups)
	beside, budget := w.ownMemory(), w.Budget()
	targets, found := int64(0), int64(0)
	var sockets tcpsock.Sockets
	var held int64
	switch {
	case used >= short/2, !ok && budget > 0 && beside+used >= budget/2:
		if held, targets, sockets = w.socketMemory(); !ok {
			own = min(used, held)
			found = own
		}
	case !ok:
		own = used // and it doesn't matter whose they are
	}
	w.socketsFound.Store(found)
	all := Use{Used: own + beside, Total: budget, What: OfBudget}
	if tcp := tcpUse(used, min(used, own+targets), short); tcp.part() > all.part() {
		all = tcp
	}
	all.sockets, all.dialled = sockets, held+targets-sockets.Held()
	all.isTCPShort = used >= short/2 && tcpsock.IsShort(w.proc)
	return all
}

// tcpUse is the use of what the kernel has for TCP, where all sockets of the machine hold used, and own of
// that is ours. What others hold is none of ours to give back: ours is what they leave, but half in any case.
func tcpUse(used, own, short int64) Use {
	return Use{Used: own, Total: max(short-max(used-own, 0), short/2), What: OfTCP}
}

// socketMemory is about what the sockets of all connections hold, in bytes, accepted and dialled ones.
// targets is how much the targets hold for readers that have stopped, in their own sockets on this machine:
// those of other network namespaces may hold what the sockets in this one do not. accepted are those of the
// former that were accepted, by the peer's address; nil: they could not be listed.
func (w *Watch) socketMemory() (own, targets int64, accepted tcpsock.Sockets) {
	stopped := map[netip.AddrPort]int64{} // readers, by the target of their flows
	w.opts.Relay.MeasureHeld(time.Now())
	for _, fl := range w.opts.Flows.Live() {
		target, err := netip.ParseAddrPort(fl.Upstream) // of requests it is not known
		stopped[target] += 0
		if fl.Held == nil {
			continue
		}
		if held, _ := fl.Held(); held > 0 {
			stopped[target]++
			if err != nil {
				own += held
			}
		}
	}
	diag, err := tcpsock.OpenDiag()
	if err != nil {
		return own, 0, nil
	}
	defer diag.Close()
	accepted = tcpsock.Sockets{}
	ports, seen := w.opts.Ports(), map[netip.AddrPort]bool{}
	listed := ports
	if len(stopped) > 0 {
		listed = nil
	}
	var here, toHere int64 // that the sockets in this namespace hold, and those of them that may be targets'
	err = diag.Each(listed, func(s tcpsock.Socket, peer netip.AddrPort) {
		here += s.Held
		_, isDialled := stopped[peer]
		switch {
		case ports[s.Local.Port()]:
			own += s.Held
			accepted.Add(s, peer)
		case isDialled:
			own += s.Held
		case stopped[s.Local] > 0:
			targets += s.Held
			seen[s.Local] = true
		case peer.Addr().IsLoopback(), peer.Addr() == s.Local.Addr():
			toHere += s.Held
		}
	})
	if err != nil {
		return own, 0, nil
	}
	used, _ := tcpsock.Memory(w.proc)
	elsewhere := max(used-here, 0)
	most := tcpSendMost(w.proc)
	unseen := int64(0)
	for target, readers := range stopped {
		switch {
		case !target.IsValid():
			targets += min(readers*most, toHere+elsewhere)
		case !seen[target] && w.opts.MayBeHere(target.Addr()):
			unseen += readers * most
		}
	}
	return own, targets + min(unseen, elsewhere), accepted
}

// tcpSendMost is how many bytes a socket may hold for its reader, as long as its program does not say it.
func tcpSendMost(proc string) (bytes int64) {
	text, _ := os.ReadFile(filepath.Join(proc, "sys/net/ipv4/tcp_wmem"))
	var least, first int64
	_, _ = fmt.Sscan(string(text), &least, &first, &bytes)
	return bytes
}

// ownMemory is what this process has, its pipes, and the kernel for its connections beside what sockets hold,
// in bytes.
func (w *Watch) ownMemory() int64 {
	sockets := w.opts.Connections() + w.opts.Flows.Len()
	return processMemory() + w.opts.Relay.Piped() + int64(sockets)*socketKernel
}

// processMemory is what Go has of the kernel for this process, in bytes.
func processMemory() int64 {
	m := []metrics.Sample{{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(m)
	return int64(m[0].Value.Uint64() - m[1].Value.Uint64())
}
