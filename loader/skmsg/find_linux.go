package skmsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
)

// cgroupOf gives the folder of the narrowest cgroup of the socket whose own address is at and which is
// connected to other, if that is a socket of this host, and says which network namespace it is in. An error
// that wraps no refusal means refusedNoCgroup.
func cgroupOf(at, other netip.AddrPort) (path string, space int32, err error) {
	id, space, err := cgroupID(at, other)
	if err != nil {
		return "", 0, err
	}
	mount, err := host.Cgroup2Mount()
	if err != nil || mount == "" {
		return "", 0, fmt.Errorf("no cgroup2 is mounted (%v)", err)
	}
	path, err = cgroupByID(mount, id)
	return path, space, err
}

// Network namespaces that have no number, beside those that do.
const (
	ownSpace     int32 = -1
	unnamedSpace int32 = -2
)

// spaceAt is the number that our network namespace has for the one at path. The kernel gives one to each that
// an end of a veth of ours is moved to.
func spaceAt(path string) int32 {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return unnamedSpace
	}
	defer ns.Close()
	if id, err := netlink.GetNetNsIdByFd(int(ns)); err == nil && id >= 0 {
		return int32(id)
	}
	return unnamedSpace
}

// cgroupByID finds a cgroup by its id, which is the inode of its folder.
func cgroupByID(mount string, id uint64) (string, error) {
	found := ""
	err := filepath.WalkDir(mount, func(path string, d fs.DirEntry, err error) error {
		if err != nil && path == mount {
			return err
		}
		if err != nil || !d.IsDir() {
			return nil // a cgroup that has just gone
		}
		var s unix.Stat_t
		if unix.Stat(path, &s) == nil && s.Ino == id {
			found = path
			return fs.SkipAll
		}
		return nil
	})
	switch {
	case err != nil:
		return "", err
	case found == mount:
		return "", fmt.Errorf("%w, to which nothing is attached: every process of the host would be under it", refusedRootCgroup)
	case found == "":
		return "", fmt.Errorf("none below %s has the id %d", mount, id)
	}
	return found, nil
}

// cgroupID gives the id of the socket's cgroup, which is that of the process that made the listener. The
// socket is looked for in our own network namespace if the address is ours, and in those of other processes
// if it is on a bridge of ours.
func cgroupID(at, other netip.AddrPort) (id uint64, space int32, err error) {
	own, bridged, err := place(at.Addr())
	switch {
	case err != nil:
		return 0, 0, err
	case own:
		id, err = diagCgroup(nil, at, other)
		return id, ownSpace, err
	case !bridged:
		return 0, 0, refusedElsewhere
	}
	spaces, last := otherNamespaces()
	for _, path := range spaces {
		id, err := diagCgroupIn(path, at, other)
		if err == nil {
			return id, spaceAt(path), nil
		}
		if !errors.Is(err, unix.ENOENT) {
			last = err
		}
	}
	if last != nil {
		return 0, 0, last
	}
	return 0, 0, fmt.Errorf("%w: it is in no network namespace of a process here", refusedElsewhere)
}

// place says whether an address is ours, or in the network of a bridge or a veth of ours.
func place(a netip.Addr) (own, bridged bool, err error) {
	if a.IsLoopback() {
		return true, false, nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return false, false, fmt.Errorf("list the network's interfaces: %w", err)
	}
	inside := make(map[int]bool) // that lead to nothing but this host
	for _, l := range links {
		inside[l.Attrs().Index] = l.Type() == "bridge" || l.Type() == "veth"
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return false, false, fmt.Errorf("list our addresses: %w", err)
	}
	for _, x := range addresses {
		ip, _ := netip.AddrFromSlice(x.IP)
		ones, _ := x.Mask.Size()
		if ip = ip.Unmap(); ip == a {
			return true, false, nil
		}
		bridged = bridged || inside[x.LinkIndex] && netip.PrefixFrom(ip, ones).Contains(a)
	}
	return false, bridged, nil
}

// otherNamespaces gives a path for each network namespace but ours that a process is in. err is why there may
// be more of them, nil if there are none.
func otherNamespaces() (paths []string, err error) {
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return nil, fmt.Errorf("look at our network namespace: %w", err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	seen := map[uint64]bool{own.Ino: true}
	var denied error
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		path := filepath.Join("/proc", e.Name(), "ns/net")
		var s unix.Stat_t
		if err := unix.Stat(path, &s); errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			denied = fmt.Errorf("look at the network namespaces of other processes, which takes CAP_SYS_PTRACE: %w", err)
		} else if err != nil || seen[s.Ino] {
			continue // gone, or known
		} else {
			seen[s.Ino] = true
			paths = append(paths, path)
		}
	}
	return paths, denied
}

// diagCgroupIn is diagCgroup in the network namespace at path, if that has the address at; else it is ENOENT,
// since a listener on all addresses may be in any namespace.
func diagCgroupIn(path string, at, other netip.AddrPort) (uint64, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return 0, unix.ENOENT // its process has gone
	}
	defer ns.Close()
	routes, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return 0, fmt.Errorf("look into another network namespace, which takes CAP_SYS_ADMIN: %w", err)
	}
	defer routes.Close()
	addresses, err := routes.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list the addresses in another network namespace: %w", err)
	}
	if !slices.ContainsFunc(addresses, func(a netlink.Addr) bool { return a.IP.Equal(at.Addr().AsSlice()) }) {
		return 0, unix.ENOENT
	}
	s, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("look into another network namespace: %w", err)
	}
	defer s.Close()
	return diagCgroup(&nl.SocketHandle{Socket: s}, at, other)
}

// These are of include/uapi/linux/inet_diag.h and include/net/tcp_states.h.
const (
	tcpTimeWait      = 6
	inetDiagCgroupID = 21 // INET_DIAG_CGROUP_ID, v5.8
	inetDiagMsgBytes = 72 // struct inet_diag_msg
)

// diagRequest is struct inet_diag_req_v2.
type diagRequest struct{ at, other netip.AddrPort }

func (r diagRequest) Len() int { return 56 }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if r.at.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	binary.NativeEndian.PutUint32(b[4:], 0xffffffff) // in all states
	binary.BigEndian.PutUint16(b[8:], r.at.Port())
	binary.BigEndian.PutUint16(b[10:], r.other.Port())
	copy(b[12:28], r.at.Addr().AsSlice())
	copy(b[28:44], r.other.Addr().AsSlice())
	for i := 48; i < 56; i++ {
		b[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	return b
}

// diagCgroup asks the kernel for the cgroup of a connection's socket, or of the listener if that has gone; in
// another namespace if s is given.
func diagCgroup(s *nl.SocketHandle, at, other netip.AddrPort) (uint64, error) {
	id, err := diagSocket(s, at, other)
	if errors.Is(err, unix.ENOENT) {
		return diagSocket(s, at, netip.AddrPort{}) // no connection has this other end
	}
	return id, err
}

func diagSocket(s *nl.SocketHandle, at, other netip.AddrPort) (uint64, error) {
	r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	if s != nil {
		r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: s}
	}
	r.AddData(diagRequest{at, other})
	messages, err := r.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return 0, fmt.Errorf("ask sock_diag for the socket at %v: %w", at, err)
	}
	for _, m := range messages {
		if len(m) < inetDiagMsgBytes {
			continue
		}
		attributes, err := nl.ParseRouteAttr(m[inetDiagMsgBytes:])
		if err != nil {
			return 0, fmt.Errorf("read what sock_diag says: %w", err)
		}
		for _, a := range attributes {
			if a.Attr.Type == inetDiagCgroupID && len(a.Value) >= 8 {
				return binary.NativeEndian.Uint64(a.Value), nil
			}
		}
		if m[1] != tcpTimeWait {
			return 0, errors.New("sock_diag names no cgroup (it does from Linux 5.8 on)")
		}
	}
	return 0, fmt.Errorf("the socket at %v: %w", at, unix.ENOENT)
}
