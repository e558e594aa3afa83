package transparent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Each ReturnPath of a network namespace has a slot: a routing table, two priorities of rules, an nftables
// table.
const (
	slots         = 16
	firstTable    = 17440
	firstPriority = 1740 // before tailscaled's (5210 to 5270), which would lead to clients on the tailnet
	protocol      = 116  // marks routes and rules as ours (`ip rule` shows it as "proto 116")

	// socketMark tells our sockets from transparent ones of others. No rule of ours looks at it in routing.
	socketMark = 0x20
	packetMark = 0x40 // one bit. Others have 0xff0000 (tailscaled), 0xc000 (Kubernetes), 0xf00 (Cilium), 1.

	// repairEvery is between looks whether the ReturnPath stands: `nft flush ruleset`, or
	// systemd-networkd, end it.
	repairEvery = 5 * time.Second
)

func nftName(slot int) string { return fmt.Sprintf("tailsplice-%d", slot) }

// ReturnPath brings answers to the client's address back here, in the network namespace of Open's thread.
type ReturnPath struct {
	log  *slog.Logger
	slot int
	lock *os.File // holds the slot
	nl   *netlink.Handle
	nft  *nftables.Conn
	off  map[int]error // by family (unix.AF_INET, ...): why it does not work there

	stop    chan struct{}
	stopped chan struct{}
	once    sync.Once
	err     error
}

// Open makes a ReturnPath. The caller closes it, once no connection needs it any more.
func Open(log *slog.Logger) (_ *ReturnPath, err error) {
	p := &ReturnPath{log: log, slot: -1, stop: make(chan struct{}), stopped: make(chan struct{})}
	defer func() {
		if err != nil {
			p.free()
			err = explain(err)
		}
	}()
	if p.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if p.nft, err = nftables.New(nftables.AsLasting()); err != nil {
		return nil, err
	}
	if err := p.takeSlot(); err != nil {
		return nil, err
	}
	if err := p.install(); err != nil {
		return nil, errors.Join(err, p.remove(p.slot))
	}
	go p.keep()
	return p, nil
}

func (p *ReturnPath) install() error {
	if err := p.installNFT(); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	_, p.off = p.installRoutes()
	if len(p.off) == len(families) {
		return errors.Join(slices.Collect(maps.Values(p.off))...)
	}
	for _, err := range p.off {
		p.log.Warn("connections of one family can't carry the client's address", "err", err)
	}
	return nil
}

// explain adds what to do.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("it needs CAP_NET_ADMIN and CAP_NET_BIND_SERVICE: use the systemd unit, or run as root (%w)", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("this kernel lacks nf_tables or nft_socket (CONFIG_NFT_SOCKET) (%w)", err)
	}
	return err
}

// lockAddr and firstLockPort are bound by who has a slot, without listening: there is nothing to connect to.
// It needs a port that not everybody may bind, for who has all slots keeps all daemons from having one.
var lockAddr = [4]byte{127, 116, 17, 40}

const firstLockPort = 1000

func lockSlot(slot int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	lock := os.NewFile(uintptr(fd), "transparent's lock")
	err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_FREEBIND, 1) // lo may be down
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: lockAddr, Port: firstLockPort + slot})
	}
	if err != nil {
		lock.Close()
		return nil, os.NewSyscallError("bind", err)
	}
	return lock, nil
}

// takeSlot takes a free slot, which the kernel frees with this process, and cleans up after killed daemons.
func (p *ReturnPath) takeSlot() error {
	for slot := range slots {
		lock, err := lockSlot(slot)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return err
		}
		err = p.remove(slot)
		if err == nil && p.slot < 0 {
			p.slot, p.lock = slot, lock
			continue
		}
		lock.Close()
		if err != nil {
			return err
		}
	}
	if p.slot < 0 {
		return fmt.Errorf("%d other daemons in this network namespace use all the rules and tables for it", slots)
	}
	return nil
}

// installNFT puts our table in force, in place of one that is there.
func (p *ReturnPath) installNFT() error {
	t := &nftables.Table{Name: nftName(p.slot), Family: nftables.TableFamilyINet}
	p.nft.AddTable(t) // so that there is one to remove
	p.nft.DelTable(t)
	p.nft.AddTable(t)
	c := p.nft.AddChain(&nftables.Chain{Table: t, Name: "answers", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle})
	native := binaryutil.NativeEndian.PutUint32
	transparentTCP := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{1}},
	}
	rule := func(more ...expr.Any) {
		p.nft.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: append(transparentTCP[:len(transparentTCP):len(transparentTCP)], more...)})
	}
	// socket mark != ours return. One in TIME_WAIT has no mark any more, and goes on.
	rule(&expr.Socket{Key: expr.SocketKeyMark, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpNeq, Data: native(socketMark)},
		&expr.Verdict{Kind: expr.VerdictReturn})
	// meta mark set meta mark | ours
	rule(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(^uint32(packetMark)), Xor: native(packetMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true})
	return p.nft.Flush()
}

// nftStands says whether our table is as installNFT made it.
func (p *ReturnPath) nftStands() bool {
	t := &nftables.Table{Name: nftName(p.slot), Family: nftables.TableFamilyINet}
	rules, err := p.nft.GetRules(t, &nftables.Chain{Table: t, Name: "answers"})
	return err == nil && len(rules) == 2
}

// family is what is done once for IPv4 and once for IPv6.
type family struct {
	number int
	name   string
	any    net.IPNet
}

var families = []family{
	{unix.AF_INET, "IPv4", net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}},
	{unix.AF_INET6, "IPv6", net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}},
}

func (f family) route(slot, loopback int) *netlink.Route {
	return &netlink.Route{Family: f.number, Table: firstTable + slot, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
		Dst: &f.any, LinkIndex: loopback, Protocol: protocol}
}

func (f family) rules(slot int) []*netlink.Rule {
	rule := func(priority, table int) *netlink.Rule {
		r := netlink.NewRule()
		mask := uint32(packetMark)
		r.Family, r.Priority, r.Table = f.number, firstPriority+2*slot+priority, table
		r.Mark, r.Mask, r.Protocol, r.SuppressPrefixlen = packetMark, &mask, protocol, -1
		return r
	}
	// With src_valid_mark the check of a packet's source looks the way to it up with the packet's mark, as if
	// it came from lo. Our table would say that the container is this host.
	back := rule(0, unix.RT_TABLE_MAIN)
	back.IifName = "lo"
	return []*netlink.Rule{back, rule(1, firstTable+slot)}
}

// installRoutes adds the missing routes and rules. added says whether there were any, failed why not.
func (p *ReturnPath) installRoutes() (added bool, failed map[int]error) {
	failed = map[int]error{}
	loopback, err := p.nl.LinkByName("lo")
	for _, f := range families {
		add := func(err error) error {
			if err == nil {
				added = true
			} else if errors.Is(err, unix.EEXIST) {
				return nil
			}
			return err
		}
		err := err
		if err == nil {
			err = add(p.nl.RouteAdd(f.route(p.slot, loopback.Attrs().Index)))
		}
		for _, r := range f.rules(p.slot) {
			if err == nil {
				err = add(p.nl.RuleAdd(r))
			}
		}
		if err != nil {
			failed[f.number] = fmt.Errorf("the return path for %s: %w", f.name, err)
		}
	}
	return added, failed
}

// remove takes a slot's things away, whoever made them.
func (p *ReturnPath) remove(slot int) error {
	tables, err := p.nft.ListTablesOfFamily(nftables.TableFamilyINet)
	errs := []error{err}
	for _, t := range tables {
		if t.Name == nftName(slot) {
			p.nft.DelTable(t)
			errs = append(errs, p.nft.Flush())
		}
	}
	for _, f := range families {
		rules, err := whole(func() ([]netlink.Rule, error) { return p.nl.RuleList(f.number) })
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			errs = append(errs, err)
		}
		for _, r := range rules {
			if r.Protocol == protocol && (r.Priority-firstPriority)/2 == slot && r.Priority >= firstPriority {
				r.Family, r.SuppressPrefixlen = f.number, -1
				errs = append(errs, p.nl.RuleDel(&r))
			}
		}
		routes, _ := whole(func() ([]netlink.Route, error) {
			return p.nl.RouteListFiltered(f.number, &netlink.Route{Table: firstTable + slot}, netlink.RT_FILTER_TABLE)
		})
		for _, r := range routes {
			errs = append(errs, p.nl.RouteDel(&r))
		}
	}
	return errors.Join(errs...)
}

// whole repeats list while it is interrupted by somebody else's change.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// keep repairs the ReturnPath until it is closed.
func (p *ReturnPath) keep() {
	defer close(p.stopped)
	for {
		select {
		case <-p.stop:
			return
		case <-time.After(repairEvery):
			p.repair()
		}
	}
}

// repair puts back what others took away.
func (p *ReturnPath) repair() {
	missing, _ := p.installRoutes()
	if !p.nftStands() {
		missing = true
		if err := p.installNFT(); err != nil {
			p.log.Error("the routing rules of `transparent` were removed and can't be restored: its connections get no answers", "err", explain(err))
			return
		}
	}
	if missing {
		p.log.Warn("the routing rules of `transparent` had been removed by something else, and were restored")
	}
}

// Close removes the ReturnPath. It may be called more than once.
func (p *ReturnPath) Close() error {
	p.once.Do(func() {
		close(p.stop)
		<-p.stopped
		p.err = p.remove(p.slot)
		p.free()
	})
	return p.err
}

// free closes what the ReturnPath has open: the slot last, for whoever has it may do with its things what it
// likes.
func (p *ReturnPath) free() {
	if p.nl != nil {
		p.nl.Close()
	}
	if p.nft != nil {
		p.nft.CloseLasting()
	}
	if p.lock != nil {
		p.lock.Close()
	}
}

// Probe tries a ReturnPath in a network namespace of its own, as root only. The error says what is missing.
func Probe() error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here, and with it the namespace
		done <- probe()
	}()
	return <-done
}

func probe() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("it can be tried as root only (%w)", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	p, err := Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return errors.Join(append(slices.Collect(maps.Values(p.off)), p.Close())...)
}
