package front

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/limit"
)

const (
	memoryEvery = time.Second
	// stoppedFor is how long no byte of a flow must have moved before it may be ended for the memory that its
	// sockets hold.
	stoppedFor = 15 * time.Second
	stoppedMin = 16 << 10 // bytes that such a flow holds at least
)

// memoryWatch ends flows that hold TCP's memory and don't move when the kernel runs short of it: those of the
// source that holds most of it first. What the kernel has received for a reader who has stopped is charged to
// nobody else, and can't be given back in another way; while it is short it gives all others next to nothing.
type memoryWatch struct {
	front *Front
	since map[string]rest // by the peer's address, while memory may run short soon
}

// A rest is a flow at the last look.
type rest struct {
	bytes int64
	since time.Time // that it has moved so many
}

// watchMemory looks until f ends.
func (f *Front) watchMemory() {
	w := &memoryWatch{front: f}
	for tick := time.NewTicker(memoryEvery); ; {
		select {
		case <-f.ctx.Done():
			tick.Stop()
			return
		case now := <-tick.C:
			if used, short, err := tcpMemory(); err == nil {
				w.look(now, used, short)
			}
		}
	}
}

// tcpMemory is how many pages all sockets hold, and how many they may before the kernel is short of them: see
// tcp_mem in tcp(7).
func tcpMemory() (used, short int64, err error) {
	stat, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		return 0, 0, err
	}
	_, tcp, _ := strings.Cut(string(stat), "\nTCP: ")
	_, mem, _ := strings.Cut(tcp, " mem ")
	if _, err := fmt.Sscan(mem, &used); err != nil {
		return 0, 0, err
	}
	limits, err := os.ReadFile("/proc/sys/net/ipv4/tcp_mem")
	if err != nil {
		return 0, 0, err
	}
	var low int64
	_, err = fmt.Sscan(string(limits), &low, &short)
	return used, short, err
}

// look ends what must end, where used is short.
func (w *memoryWatch) look(now time.Time, used, short int64) {
	if used < short/2 {
		w.since = nil
		return
	}
	since := make(map[string]rest, len(w.since))
	stopped := map[netip.AddrPort]netip.Prefix{} // the source, by the peer's address
	for _, fl := range w.front.flows.Snapshot(flow.Query{}) {
		r, known := w.since[fl.Downstream]
		if n := fl.BytesUp + fl.BytesDown; !known || r.bytes != n {
			r = rest{n, now}
		}
		since[fl.Downstream] = r
		peer, err := netip.ParseAddrPort(fl.Downstream)
		if client, cerr := netip.ParseAddrPort(fl.Client); err == nil && cerr == nil && now.Sub(r.since) >= stoppedFor {
			stopped[peer] = limit.PrefixOf(client.Addr())
		}
	}
	w.since = since
	if used < short || len(stopped) == 0 {
		return
	}
	n, who, err := endFullest(stopped, w.front.ports())
	w.front.metrics.Cut.WithLabelValues("tcp_memory").Add(float64(n))
	if n > 0 {
		w.front.complain.Warn("tcp_memory", "the kernel is short of memory for TCP (net.ipv4.tcp_mem): flows that make no progress are ended, those of the source that holds most first",
			"flows", n, "source", who, "pages", used, "short_from", short)
	}
	if err != nil {
		w.front.complain.Warn("tcp_memory_err", "the kernel is short of memory for TCP (net.ipv4.tcp_mem), and flows that make no progress can't be ended", "err", err)
	}
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

// endFullest ends a quarter of the flows that stand still, and hold something: those of the sources that hold
// most. who is the first of them. A socket at another port than ours is somebody else's, though its peer may
// be the same.
func endFullest(stopped map[netip.AddrPort]netip.Prefix, ports map[uint16]bool) (n int, who netip.Prefix, err error) {
	type holder struct {
		id     netlink.SocketID
		family uint8
		source netip.Prefix
		held   uint32
	}
	var all []holder
	held := map[netip.Prefix]int{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, derr := netlink.SocketDiagTCP(family)
		err = errors.Join(err, derr)
		for _, s := range sockets {
			addr, _ := netip.AddrFromSlice(s.ID.Destination)
			source, ok := stopped[netip.AddrPortFrom(addr.Unmap(), s.ID.DestinationPort)]
			if n := s.RQueue + s.WQueue; ok && ports[s.ID.SourcePort] && n >= stoppedMin {
				all = append(all, holder{s.ID, family, source, n})
				held[source] += int(n)
			}
		}
	}
	slices.SortFunc(all, func(a, b holder) int {
		return cmp.Or(cmp.Compare(held[b.source], held[a.source]), a.source.Addr().Compare(b.source.Addr()), cmp.Compare(b.held, a.held))
	})
	for _, h := range all[:(len(all)+3)/4] {
		if derr := destroySocket(h.family, h.id); derr == nil {
			n++
		} else if !errors.Is(derr, unix.ENOENT) { // else it has ended by itself
			err = errors.Join(err, fmt.Errorf("end a socket: %w", derr))
			break
		}
	}
	if len(all) > 0 {
		who = all[0].source
	}
	return n, who, err
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
