package front

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/metrics"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

const (
	memoryEvery = time.Second
	shortEvery  = memoryEvery / 4 // while half of the memory is taken

	// How long no byte of a flow must have moved before it may be ended for what it holds: from 3/4 of the
	// memory on, and from 7/8 on.
	stoppedFor      = 15 * time.Second
	stoppedForShort = time.Second
	stoppedMin      = 16 << 10 // bytes that such a flow holds at least
	greedyMin       = 1 << 20  // bytes that a source holds at least before it may be refused
)

// memoryWatch keeps what flows hold within the budget, and within what the kernel has for TCP. What the kernel
// has received for a reader who has stopped can't be given back but with the flow; and where TCP is short of
// memory it gives all others next to nothing.
type memoryWatch struct {
	front *Front
	since map[netip.AddrPort]rest // by the peer's address, while half of the memory is taken
}

// A rest is a connection at the last look.
type rest struct {
	bytes int64
	since time.Time // that its flows have moved so many
}

// watchMemory looks until f ends.
func (f *Front) watchMemory() {
	w := &memoryWatch{front: f}
	for timer := time.NewTimer(memoryEvery); ; {
		select {
		case <-f.ctx.Done():
			timer.Stop()
			relay.SaveMemory(false)
			return
		case now := <-timer.C:
			timer.Reset(w.look(now, f.memoryUse("/proc", "/sys/fs/cgroup")))
		}
	}
}

// A memoryUse is how much is taken of what there is, in bytes.
type memoryUse struct {
	used, total int64
	what        string // the metric's word for it
}

// over reports whether n of m parts are taken.
func (u memoryUse) over(n, m int64) bool { return u.total > 0 && u.used >= u.total/m*n }

// part is how much of the whole is taken; 0 where the whole is not known.
func (u memoryUse) part() float64 {
	if u.total <= 0 {
		return 0
	}
	return float64(u.used) / float64(u.total)
}

// memoryUse is that of the budget, or that of what the kernel has for TCP where that is nearer to its end. What
// proc and cgroups don't say is left out.
func (f *Front) memoryUse(proc, cgroups string) memoryUse {
	used, short := tcpMemory(proc)
	sockets, ok := cgroupSockets(proc, cgroups)
	if !ok {
		sockets = used // those of others, too
	}
	all := memoryUse{sockets + processMemory() + relay.Piped() + int64(f.limiter.Total())*connectionKernel, f.Memory(), overMemory}
	if tcp := (memoryUse{used, short, "tcp_memory"}); tcp.part() > all.part() {
		return tcp
	}
	return all
}

// processMemory is what Go has of the kernel for this process, in bytes.
func processMemory() int64 {
	m := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(m)
	return int64(m[0].Value.Uint64() - m[1].Value.Uint64())
}

// tcpMemory is how many bytes all TCP sockets of the machine hold, and how many they may before the kernel is short
// of them: see tcp_mem in tcp(7). 0 is not known.
//
// A network namespace other than the first one, such as a container's, does not show tcp_mem: there it is taken for
// what the kernel makes it at boot, a sixteenth of the memory.
func tcpMemory(proc string) (used, short int64) {
	page := int64(os.Getpagesize())
	if stat, err := os.ReadFile(filepath.Join(proc, "net/sockstat")); err == nil {
		_, tcp, _ := strings.Cut(string(stat), "\nTCP: ")
		_, mem, _ := strings.Cut(tcp, " mem ")
		_, _ = fmt.Sscan(mem, &used)
	}
	limits, err := os.ReadFile(filepath.Join(proc, "sys/net/ipv4/tcp_mem"))
	if err != nil {
		return used * page, memTotal(proc) / 16
	}
	var low int64
	_, _ = fmt.Sscan(string(limits), &low, &short)
	return used * page, short * page
}

// A stalled connection holds bytes for a reader who has no room for them.
type stalled struct {
	peer   netip.AddrPort
	source netip.Prefix
	since  time.Time
	held   int64
}

// look does what u calls for: from half of the memory on little is taken at a time, from 5/8 on the source that
// holds most opens no more connections, and from 3/4 on its flows that have stood still for longest are ended.
// It says when to look again.
func (w *memoryWatch) look(now time.Time, u memoryUse) time.Duration {
	f := w.front
	isShort := u.over(1, 2)
	relay.SaveMemory(isShort)
	if !isShort {
		w.since = nil
		f.greediest.Store(nil)
		return memoryEvery
	}
	var sockets map[netip.AddrPort]tcpSocket
	var err error
	if u.over(5, 8) {
		sockets, err = tcpSockets(f.ports())
	}
	all := w.stalled(now, sockets)
	greedy, held := greediest(all, now)
	if u.over(5, 8) && held >= greedyMin {
		if f.greediest.Swap(&greedy) == nil {
			f.complain.Warn("memory_greedy", "memory is short: the source that holds most of it for readers that have stopped may open no more connections",
				"source", greedy, "held", held, "what", u.what, "used", u.used, "total", u.total)
		}
	} else {
		f.greediest.Store(nil)
	}
	if err == nil && u.over(3, 4) {
		err = w.end(now, u, all, sockets)
	}
	if err != nil {
		f.complain.Warn("memory_err", "memory is short, and flows that make no progress can't be ended", "err", err)
	}
	return shortEvery
}

// stalled are the connections that hold something, and since when nothing of theirs has moved.
func (w *memoryWatch) stalled(now time.Time, sockets map[netip.AddrPort]tcpSocket) (all []stalled) {
	relay.MeasureHeld(now)
	type connection struct {
		bytes, held int64
		since       time.Time // of what is held
		source      netip.Prefix
	}
	connections := map[netip.AddrPort]connection{}
	for _, fl := range w.front.flows.Snapshot(flow.Query{}) {
		peer, err := netip.ParseAddrPort(fl.Downstream)
		client, cerr := netip.ParseAddrPort(fl.Client)
		if err != nil || cerr != nil {
			continue
		}
		c := connections[peer]
		c.source = limit.PrefixOf(client.Addr())
		c.bytes += fl.BytesUp + fl.BytesDown
		if c.held += fl.Held; fl.Held > 0 {
			c.since = fl.Stood
		}
		connections[peer] = c
	}
	since := make(map[netip.AddrPort]rest, len(connections))
	for peer, c := range connections {
		r, known := w.since[peer]
		if !known || r.bytes != c.bytes {
			r = rest{c.bytes, now}
		}
		since[peer] = r
		switch held := sockets[peer].held; {
		case c.held >= stoppedMin:
			all = append(all, stalled{peer, c.source, c.since, max(c.held, held)})
		case c.held == 0 && held >= stoppedMin: // the kernel moves the flow, or these are requests
			all = append(all, stalled{peer, c.source, r.since, held})
		}
	}
	w.since = since
	return all
}

// greediest is the source that holds most in connections that have stood still until then.
func greediest(all []stalled, until time.Time) (source netip.Prefix, held int64) {
	sum := map[netip.Prefix]int64{}
	for _, s := range all {
		if !s.since.After(until) {
			sum[s.source] += s.held
		}
	}
	for p, n := range sum {
		if n > held || n == held && p.Addr().Less(source.Addr()) {
			source, held = p, n
		}
	}
	return source, held
}

// end resets connections of all that have stood still for long enough, until so much is given back that u is
// over no more: the longest of the source that holds most, again and again.
func (w *memoryWatch) end(now time.Time, u memoryUse, all []stalled, sockets map[netip.AddrPort]tcpSocket) error {
	until := now.Add(-stoppedFor)
	if u.over(7, 8) {
		until = now.Add(-stoppedForShort)
	}
	var first netip.Prefix
	n := 0
	for freed := int64(0); freed <= u.used-u.total/4*3; {
		source, held := greediest(all, until)
		if held == 0 {
			break
		}
		longest := -1
		for i, s := range all {
			if s.source == source && !s.since.After(until) && (longest < 0 || s.since.Before(all[longest].since)) {
				longest = i
			}
		}
		victim := all[longest]
		all[longest] = all[len(all)-1]
		all = all[:len(all)-1]
		socket, ok := sockets[victim.peer]
		if !ok {
			continue // it has ended by itself, or came by another listener's port
		}
		if err := destroySocket(socket.family, socket.id); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("end a socket: %w", err)
		}
		if n == 0 {
			first = source
		}
		n++
		freed += victim.held
	}
	if n > 0 {
		w.front.metrics.Cut.WithLabelValues(u.what).Add(float64(n))
		w.front.complain.Warn("memory", "memory is short: flows that make no progress are ended, those of the source that holds most first",
			"flows", n, "source", first, "what", u.what, "used", u.used, "total", u.total)
	}
	return nil
}

// ports are those that f accepts connections at.
func (f *Front) ports() map[uint16]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ports := make(map[uint16]bool, len(f.sockets))
	for _, s := range f.sockets {
		ports[addrPort(s.door.addr).Port()] = true
	}
	return ports
}

// A tcpSocket is one of a connection that this host has accepted.
type tcpSocket struct {
	family uint8
	id     netlink.SocketID
	held   int64 // bytes in its queues
}

// tcpSockets are those at these ports, by the peer's address. A socket at another port is somebody else's, though its
// peer may be the same.
func tcpSockets(ports map[uint16]bool) (map[netip.AddrPort]tcpSocket, error) {
	all := map[netip.AddrPort]tcpSocket{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		for _, s := range sockets {
			if addr, ok := netip.AddrFromSlice(s.ID.Destination); ok && ports[s.ID.SourcePort] {
				all[netip.AddrPortFrom(addr.Unmap(), s.ID.DestinationPort)] = tcpSocket{family, s.ID, int64(s.RQueue) + int64(s.WQueue)}
			}
		}
	}
	return all, nil
}

// destroySocket resets both ends of a connection of this host. It needs CAP_NET_ADMIN, and Linux 4.5 with
// CONFIG_INET_DIAG_DESTROY.
func destroySocket(family uint8, id netlink.SocketID) error {
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(socketName{family, id})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// socketName is a struct inet_diag_req_v2 of linux/inet_diag.h.
type socketName struct {
	family uint8
	id     netlink.SocketID
}

func (s socketName) Len() int { return 56 }

func (s socketName) Serialize() []byte {
	b := make([]byte, s.Len())
	b[0], b[1] = s.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 0xffffffff) // whatever its state
	binary.BigEndian.PutUint16(b[8:], s.id.SourcePort)
	binary.BigEndian.PutUint16(b[10:], s.id.DestinationPort)
	source, destination := s.id.Source.To16(), s.id.Destination.To16()
	if s.family == unix.AF_INET {
		source, destination = s.id.Source.To4(), s.id.Destination.To4()
	}
	copy(b[12:28], source)
	copy(b[28:44], destination)
	binary.NativeEndian.PutUint32(b[44:], s.id.Interface)
	binary.NativeEndian.PutUint32(b[48:], s.id.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], s.id.Cookie[1])
	return b
}
