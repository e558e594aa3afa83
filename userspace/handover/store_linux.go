package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Store is the service manager's store of descriptors, by the protocol of sd_notify(3): what it keeps
// outlives this process, and the next one that the manager starts gets it. A descriptor is named by what
// [Socket] says of it. Where no manager has such a store, nothing is kept.
type Store struct {
	manager string   // the address of its socket; "": there is none
	sockets []Socket // that were there at the start, and nobody has taken
	state   json.RawMessage

	mu sync.Mutex
	// has is what the manager keeps: the inode by name, 0 where that is not known, unfit where it is of no
	// use.
	// +checklocks:mu
	has map[string]uint64
	// +checklocks:mu
	kept string // the state that this process has had it keep, in memfd
	// +checklocks:mu
	memfd *os.File
	// +checklocks:mu
	version uint64 // of the state that it keeps
	// +checklocks:mu
	isOffered bool // the state stays as it is
}

// kindState is the kind of a memfd with what the sockets alone do not tell. Its address is a number that is
// higher in each later one.
const kindState = "state"

// storedKinds are the kinds of what is kept.
var storedKinds = []string{KindListener, KindControl, KindMetrics, KindHealth, KindFlowsIn, KindFlowsOut, kindState}

// mostName bounds a name, in bytes. systemd takes 255 (FDNAME_MAX), but passes all names in one variable,
// which may have 128 KiB: see MAX_ARG_STRLEN in execve(2). The unit allows 512 of them.
const mostName = 200

const unfit = math.MaxUint64

// mostState bounds the state, in bytes.
const mostState = 1 << 20

// OpenStore returns the store, with what the manager has passed to this process of it. wrong says what of
// that can't be used, and is closed.
func OpenStore() (s *Store, wrong []error) {
	s = &Store{manager: os.Getenv("NOTIFY_SOCKET"), has: map[string]uint64{}}
	for _, f := range activation.Files(true) {
		if err := s.open(f); err != nil {
			wrong = append(wrong, fmt.Errorf("descriptor %q: %w", f.Name(), err))
		}
	}
	return s, wrong
}

// open takes a descriptor that the manager has passed, or closes it.
//
// +checklocksignore: nobody else has the Store yet
func (s *Store) open(f *os.File) error {
	name := f.Name()
	k, err := parseName(name)
	if err != nil {
		f.Close()
		return err
	}
	k.File = f
	if k.Kind == kindState {
		s.has[name] = unfit
		return s.readState(k.Socket)
	}
	if err := verify(k); err != nil {
		s.has[name] = unfit
		discard(k.Socket)
		return err
	}
	if slices.ContainsFunc(s.sockets, func(o Socket) bool { return o.Kind == k.Kind && o.Address == k.Address }) {
		s.has[name] = unfit
		f.Close() // which may be the same socket
		return errors.New("another one is for the same")
	}
	if s.has[name], err = inodeOf(f); err != nil {
		return err
	}
	s.sockets = append(s.sockets, k.Socket)
	return nil
}

// readState takes the state of k, unless there is a later one, and closes it.
//
// +checklocksignore: nobody else has the Store yet
func (s *Store) readState(k Socket) error {
	defer k.File.Close()
	if _, err := unix.FcntlInt(k.File.Fd(), unix.F_GET_SEALS, 0); err != nil {
		return fmt.Errorf("it is no memfd: %w", err)
	}
	version, err := strconv.ParseUint(k.Address, 10, 64)
	if err != nil {
		return err
	}
	if version < s.version {
		return nil
	}
	b := make([]byte, mostState+1)
	n, err := unix.Pread(int(k.File.Fd()), b, 0)
	if err != nil {
		return os.NewSyscallError("pread", err)
	}
	if n > mostState || !json.Valid(b[:n]) {
		return errors.New("it has no state that can be read")
	}
	s.version, s.state = version, b[:n]
	return nil
}

// Len is how many sockets nobody has taken.
func (s *Store) Len() int { return len(s.sockets) }

// Take is as [Predecessor.Take], of what the manager has passed to this process.
func (s *Store) Take(want func(Socket) bool) (out []Socket) {
	var left []Socket
	for _, k := range s.sockets {
		if want(k) {
			out = append(out, k)
		} else {
			left = append(left, k)
		}
	}
	s.sockets = left
	return out
}

// State is what [Store.Keep] was given with the sockets, or nil.
func (s *Store) State() json.RawMessage { return s.state }

// Discard ends the sockets that nobody has taken: no connection waits there any more. Keep has the manager
// forget them.
func (s *Store) Discard() {
	for _, k := range s.sockets {
		discard(k)
	}
	s.sockets = nil
}

// discard closes a socket for all who have it.
func discard(k Socket) {
	if fd, err := descriptor(k.File); err == nil && k.Kind != kindState {
		unix.Shutdown(fd, unix.SHUT_RDWR)
	}
	k.File.Close()
}

// Note says what the manager may keep, since a process that this one takes over from has offered it. What is
// not among that which is given to Keep is removed then.
func (s *Store) Note(all []Socket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range all {
		if k.Kind == kindState {
			if version, err := strconv.ParseUint(k.Address, 10, 64); err == nil {
				s.version = max(s.version, version)
			}
		}
		if name, err := nameOf(k); err == nil && slices.Contains(storedKinds, k.Kind) {
			s.has[name] = 0
		}
	}
}

// Sockets is a copy of what is kept beside the sockets, for a process that takes over. The caller closes it.
// Until [Store.Resume] no later state is kept: that process would not know of it, and so never remove it.
func (s *Store) Sockets() ([]Socket, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.isOffered = true
	if s.memfd == nil {
		return nil, nil
	}
	fd, err := unix.FcntlInt(s.memfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return []Socket{{Kind: kindState, Address: strconv.FormatUint(s.version, 10), File: os.NewFile(uintptr(fd), kindState)}}, nil
}

// Resume is for when no process has taken over: later states are kept again.
func (s *Store) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.isOffered = false
}

// Keep has the manager keep copies of all, and state unless it is nil, in place of what it kept before. With
// an error it keeps what could be brought to it; the next Keep tries the rest again. all stay the caller's.
func (s *Store) Keep(all []Socket, state json.RawMessage) error {
	if s.manager == "" {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := map[string]bool{}
	names := make([]string, len(all))
	var errs []error
	for i, k := range all {
		name, err := nameOf(k)
		if errors.Is(err, fs.ErrNotExist) { // a control socket whose file is gone: nobody could find it
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", k.Kind, k.Address, err))
			continue
		}
		names[i], wanted[name] = name, true
	}
	// A socket that has another name now is removed first: systemd keeps no socket twice, and the old name
	// then.
	for name := range s.has {
		if !wanted[name] && !isState(name) {
			errs = append(errs, s.remove(name))
		}
	}
	for i, k := range all {
		if names[i] == "" {
			continue
		}
		if err := s.store(names[i], k.File); err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", k.Kind, k.Address, err))
			if errors.Is(err, os.ErrDeadlineExceeded) { // the manager hangs: nothing else gets there
				return errors.Join(errs...)
			}
		}
	}
	if err := s.storeState(state, wanted); err != nil {
		errs = append(errs, fmt.Errorf("state: %w", err))
	}
	for name := range s.has {
		if !wanted[name] && isState(name) {
			errs = append(errs, s.remove(name))
		}
	}
	return errors.Join(errs...)
}

func isState(name string) bool { return strings.HasPrefix(name, kindState+"?") }

func stateName(version uint64) string {
	return kindState + "?address=" + strconv.FormatUint(version, 10)
}

// storeState has state kept, and adds its name to wanted. The one before is removed only then, and stays
// while it is offered to another process.
//
// +checklocks:s.mu
func (s *Store) storeState(state json.RawMessage, wanted map[string]bool) error {
	if state == nil || s.kept == string(state) || s.isOffered {
		wanted[stateName(s.version)] = state != nil
		return nil
	}
	if len(state) > mostState { // no start would read it
		wanted[stateName(s.version)] = true
		return fmt.Errorf("it has %d bytes, and may have %d", len(state), mostState)
	}
	fd, err := unix.MemfdCreate("tailsplice state", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), kindState)
	_, err = f.Write(state)
	if err == nil {
		err = s.store(stateName(s.version+1), f)
	}
	if err != nil {
		f.Close()
		wanted[stateName(s.version)] = true
		return err
	}
	s.memfd.Close() // which may be nil
	s.memfd, s.kept = f, string(state)
	s.version++
	wanted[stateName(s.version)] = true
	return nil
}

// store has the manager keep f as name, unless it does already.
//
// +checklocks:s.mu
func (s *Store) store(name string, f *os.File) error {
	inode, err := inodeOf(f)
	if err != nil {
		return err
	}
	switch had := s.has[name]; {
	case had == inode:
		return nil
	case had != 0: // another socket at the same address
		if err := s.remove(name); err != nil {
			return err
		}
	}
	fd, err := descriptor(f)
	if err == nil {
		err = s.send("FDSTORE=1\nFDNAME="+name, unix.UnixRights(fd))
	}
	runtime.KeepAlive(f)
	if err == nil {
		s.has[name] = inode
	}
	return err
}

func inodeOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// remove has the manager close what it keeps as name.
//
// +checklocks:s.mu
func (s *Store) remove(name string) error {
	err := s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil)
	if err == nil {
		delete(s.has, name)
	}
	return err
}

// Forget has the manager close what it keeps that is one of want, whatever is given to Keep.
func (s *Store) Forget(want func(Socket) bool) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.has {
		if k, parseErr := parseName(name); parseErr == nil && want(k.Socket) {
			err = errors.Join(err, s.remove(name))
		}
	}
	return err
}

// Has reports whether the manager keeps all of some sockets.
func (s *Store) Has(all []Socket) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range all {
		name, err := nameOf(k)
		if err != nil {
			return false
		}
		if inode, err := inodeOf(k.File); err != nil || s.has[name] != inode {
			return false
		}
	}
	return true
}

// Keeps reports whether there is a manager that may keep something.
func (s *Store) Keeps() bool { return s.manager != "" }

// Notify tells the manager a state, such as WATCHDOG=1, and does not wait for long.
func (s *Store) Notify(state string) error {
	if s.manager == "" {
		return nil
	}
	return s.send(state, nil)
}

// Sync waits until the manager has done what this process has told it before, but not for long.
func (s *Store) Sync() error {
	if s.manager == "" {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	fd, err := descriptor(w)
	if err == nil {
		err = s.send("BARRIER=1", unix.UnixRights(fd)) // which it closes: see sd_notify_barrier(3)
	}
	w.Close()
	if err != nil {
		return err
	}
	r.SetReadDeadline(time.Now().Add(sendTimeout))
	if _, err = r.Read(make([]byte, 1)); err == io.EOF {
		return nil
	}
	return err
}

// send sends the manager a message.
func (s *Store) send(text string, oob []byte) error {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(sendTimeout))
	what, _, _ := strings.Cut(text, "=")
	step("sends", what)
	_, _, err = c.WriteMsgUnix([]byte(text), oob, &net.UnixAddr{Name: s.manager, Net: "unixgram"})
	step("has sent", what)
	return err
}

// named is a Socket, with what else its name says.
type named struct {
	Socket
	inode uint64 // of a control socket's file
}

// nameOf is what a socket is called in the store: printable ASCII without a colon, as the manager wants it.
func nameOf(k Socket) (string, error) {
	v := url.Values{"address": {k.Address}}
	if k.Tailnet {
		v.Set("tailnet", "true")
	}
	if k.Kind == KindControl {
		inode, err := socketInode(k.Address)
		if err != nil {
			return "", err
		}
		v.Set("inode", strconv.FormatUint(inode, 10))
	}
	if k.Name != "" {
		v.Set("name", k.Name)
	}
	name := k.Kind + "?" + v.Encode()
	if len(name) > mostName { // the address says enough
		v.Del("name")
		name = k.Kind + "?" + v.Encode()
	}
	if len(name) > mostName {
		return "", fmt.Errorf("its address is too long: the service manager is given names of up to %d bytes", mostName)
	}
	return name, nil
}

// parseName is the reverse of nameOf.
func parseName(name string) (k named, err error) {
	kind, query, ok := strings.Cut(name, "?")
	v, err := url.ParseQuery(query)
	if !ok || err != nil || !v.Has("address") {
		return k, errors.New("it is none that this program has stored: a .socket unit can't bind what the configuration lists")
	}
	k.Socket = Socket{Kind: kind, Name: v.Get("name"), Address: v.Get("address"), Tailnet: v.Get("tailnet") == "true"}
	if kind == KindControl {
		k.inode, err = strconv.ParseUint(v.Get("inode"), 10, 64)
	}
	return k, err
}

func socketInode(path string) (uint64, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// verify is an error where a descriptor is not what its name says, or of no use any more.
func verify(k named) error {
	fd, err := descriptor(k.File)
	if err != nil {
		return err
	}
	if !slices.Contains(storedKinds, k.Kind) {
		return errors.New("this version knows no such kind")
	}
	if IsOfFlows(k.Socket) {
		return verifyQueue(fd)
	}
	option := func(name int) int {
		n, optErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name)
		err = errors.Join(err, optErr)
		return n
	}
	domain, protocol, listens := option(unix.SO_DOMAIN), option(unix.SO_PROTOCOL), option(unix.SO_ACCEPTCONN)
	switch {
	case err != nil:
		return fmt.Errorf("it is no socket: %w", err)
	case listens == 0:
		return errors.New("it is no socket that listens")
	case k.Kind == KindControl && domain != unix.AF_UNIX:
		return errors.New("it is no unix socket")
	case k.Kind == KindControl:
		if inode, err := socketInode(k.Address); err != nil || inode != k.inode {
			return fmt.Errorf("its file is gone: %w", errors.Join(err, unix.ENOENT))
		}
		return nil
	case protocol != unix.IPPROTO_TCP && (protocol != unix.IPPROTO_MPTCP || k.Kind == KindListener):
		return errors.New("it is no TCP socket") // nor can connections by multipath TCP be spliced
	}
	if here, err := isOfThisNamespace(fd); err != nil || !here {
		return errors.Join(errors.New("it is of another network namespace"), err)
	}
	return verifyAddress(fd, k.Address)
}

// verifyQueue is an error unless fd is an end of a [Queue].
func verifyQueue(fd int) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	kind, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	listens, err3 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err := errors.Join(err, err2, err3); err != nil {
		return fmt.Errorf("it is no socket: %w", err)
	}
	if domain != unix.AF_UNIX || kind != unix.SOCK_SEQPACKET || listens != 0 {
		return errors.New("it is no end of a pair of sockets that has messages")
	}
	return nil
}

// verifyAddress is an error unless a TCP socket is bound to address, of which a host name tells nothing.
func verifyAddress(fd int, address string) error {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	var is netip.AddrPort
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		is = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(a.Addr)
		if a.ZoneId != 0 {
			zone := strconv.Itoa(int(a.ZoneId))
			if i, err := net.InterfaceByIndex(int(a.ZoneId)); err == nil {
				zone = i.Name
			}
			ip = ip.WithZone(zone)
		}
		is = netip.AddrPortFrom(ip, uint16(a.Port))
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	ip, err := netip.ParseAddr(host)
	isName := err != nil
	if strconv.Itoa(int(is.Port())) != port || host == "" && !is.Addr().IsUnspecified() || !isName && ip != is.Addr() {
		return fmt.Errorf("it is bound to %s, and not to %s", is, address)
	}
	return nil
}

// isOfThisNamespace says whether a socket is of the network namespace that this process is in.
// SO_NETNS_COOKIE is in Linux 5.14.
func isOfThisNamespace(fd int) (bool, error) {
	here, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		here, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	defer unix.Close(here)
	ours, err := netnsCookie(here)
	theirs, err2 := netnsCookie(fd)
	return ours == theirs, errors.Join(err, err2)
}

func netnsCookie(fd int) (cookie uint64, err error) {
	n := uint32(unsafe.Sizeof(cookie))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE,
		uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return 0, os.NewSyscallError("getsockopt", errno)
	}
	return cookie, nil
}
