package tcpsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A Socket is one of this network namespace, whichever process has it.
type Socket struct {
	family uint8
	// a struct inet_diag_sockid, as the kernel gave it: its cookie is no other socket's
	id       [diagIDSize]byte
	Local    netip.AddrPort // its own end
	Held     int64          // bytes of memory that it is charged with, and those in also
	IsEmpty  bool           // it has nothing to be read, nor to be sent
	IsOrphan bool           // it was closed, and the kernel goes on sending what its reader has not taken
	also     *Socket        // another one with the same peer, at another of the ports
}

// Sockets are those of connections, by the peer's address.
type Sockets map[netip.AddrPort]Socket

// Add adds s, whose peer has that address, and may have another socket there.
func (all Sockets) Add(s Socket, peer netip.AddrPort) {
	if other, ok := all[peer]; ok {
		s.also = &other
		s.Held += other.Held
		s.IsEmpty, s.IsOrphan = s.IsEmpty && other.IsEmpty, s.IsOrphan && other.IsOrphan
	}
	all[peer] = s
}

// Held is what they hold together, in bytes.
func (all Sockets) Held() (sum int64) {
	for _, s := range all {
		sum += s.Held
	}
	return sum
}

// Sizes and places in linux/inet_diag.h and linux/sock_diag.h.
const (
	diagIDSize   = 48
	diagReqSize  = 8 + diagIDSize // struct inet_diag_req_v2
	diagMsgSize  = 72             // struct inet_diag_msg
	diagMsgState = 1              // where its parts begin
	diagMsgID    = 4
	diagMsgInode = 68

	sockDiagByFamily = 20
	sockDestroy      = 21
	diagMemory       = 7 // INET_DIAG_SKMEMINFO
	memoryReceived   = 0 // SK_MEMINFO_RMEM_ALLOC
	memoryForward    = 4 // SK_MEMINFO_FWD_ALLOC
	memoryQueued     = 5 // SK_MEMINFO_WMEM_QUEUED

	// The states in which a socket may hold bytes: all but LISTEN, and those without a full socket. It has
	// ended its own stream in the latter four, of which it is in one when no process has it any more.
	diagStates = 1<<unix.BPF_TCP_ESTABLISHED | 1<<unix.BPF_TCP_CLOSE_WAIT | diagEnded
	diagEnded  = 1<<unix.BPF_TCP_FIN_WAIT1 | 1<<unix.BPF_TCP_FIN_WAIT2 | 1<<unix.BPF_TCP_LAST_ACK | 1<<unix.BPF_TCP_CLOSING
)

// A Diag asks the kernel about sockets: see sock_diag(7). Make it with OpenDiag, end it with Close.
type Diag struct {
	fd  int
	buf []byte
}

// OpenDiag returns a Diag for the network namespace of the calling thread.
func OpenDiag() (*Diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &Diag{fd: fd, buf: make([]byte, 64<<10)}, nil
}

// Close ends it.
func (d *Diag) Close() { _ = unix.Close(d.fd) }

// At are the sockets at these ports. A socket at another port is somebody else's, though its peer may be the
// same.
func (d *Diag) At(ports map[uint16]bool) (Sockets, error) {
	all := Sockets{}
	err := d.Each(ports, all.Add)
	return all, err
}

// Each gives f the sockets at these ports that may hold bytes, or all of the network namespace where ports is
// nil.
func (d *Diag) Each(ports map[uint16]bool, f func(s Socket, peer netip.AddrPort)) error {
	var id [diagIDSize]byte
	if len(ports) == 1 { // then the kernel leaves out the others
		for port := range ports {
			binary.BigEndian.PutUint16(id[:], port)
		}
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := d.ask(sockDiagByFamily, unix.NLM_F_DUMP, family, id, func(m []byte) {
			if len(m) < diagMsgSize || ports != nil && !ports[binary.BigEndian.Uint16(m[diagMsgID:])] {
				return
			}
			s := Socket{family: family, Local: addressIn(m[diagMsgID:], 0, family)}
			s.Held, s.IsEmpty = heldOf(m[diagMsgSize:])
			hasEnded := 1<<m[diagMsgState]&diagEnded != 0
			s.IsOrphan = hasEnded && binary.NativeEndian.Uint32(m[diagMsgInode:]) == 0
			copy(s.id[:], m[diagMsgID:])
			f(s, addressIn(m[diagMsgID:], 1, family))
		})
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
	}
	return nil
}

// addressIn is the own end of a struct inet_diag_sockid, or with end 1 the peer.
func addressIn(id []byte, end int, family uint8) netip.AddrPort {
	size := 4
	if family == unix.AF_INET6 {
		size = 16
	}
	a, _ := netip.AddrFromSlice(id[4+16*end:][:size])
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(id[2*end:]))
}

// heldOf is how many bytes of memory a socket with these attributes is charged with, and whether none of it
// is for bytes.
func heldOf(attrs []byte) (n int64, isEmpty bool) {
	isEmpty = true
	for len(attrs) >= 4 {
		size, kind := int(binary.NativeEndian.Uint16(attrs)), binary.NativeEndian.Uint16(attrs[2:])
		if size < 4 || size > len(attrs) {
			return n, isEmpty
		}
		if memory := attrs[4:size]; kind == diagMemory && len(memory) >= 4*(memoryQueued+1) {
			for _, i := range []int{memoryReceived, memoryForward, memoryQueued} {
				part := int64(binary.NativeEndian.Uint32(memory[4*i:]))
				n += part
				isEmpty = isEmpty && (part == 0 || i == memoryForward)
			}
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return n, isEmpty
}

// Destroy resets both ends of a connection of this host, and those in also. It needs CAP_NET_ADMIN, and Linux
// 4.5 with CONFIG_INET_DIAG_DESTROY. A socket that has gone by itself is no error.
func (d *Diag) Destroy(s Socket) error {
	for s := &s; s != nil; s = s.also {
		err := d.ask(sockDestroy, unix.NLM_F_ACK, s.family, s.id, func([]byte) {})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("end a socket: %w", err)
		}
	}
	return nil
}

// CanEndOrphans reports whether Destroy ends an orphan: before Linux 6.12 one whose reader takes nothing
// stays for ever afterwards (bac76cf89816, "tcp: fix forever orphan socket caused by tcp_abort").
var CanEndOrphans = sync.OnceValue(func() bool {
	var u unix.Utsname
	var major, minor int
	_ = unix.Uname(&u)
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 12
})

// ask sends a request for id, and gives answer each message that comes, until the last.
func (d *Diag) ask(kind, flags uint16, family uint8, id [diagIDSize]byte, answer func([]byte)) error {
	req := make([]byte, unix.NLMSG_HDRLEN+diagReqSize)
	binary.NativeEndian.PutUint32(req, uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], kind)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|flags)
	body := req[unix.NLMSG_HDRLEN:]
	body[0], body[1], body[2] = family, unix.IPPROTO_TCP, 1<<(diagMemory-1)
	states := uint32(diagStates)
	if kind == sockDestroy {
		states = 0xffffffff // whatever its state
	}
	binary.NativeEndian.PutUint32(body[4:], states)
	copy(body[8:], id[:])
	if err := unix.Sendto(d.fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		for b := d.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return errors.New("netlink: a message is cut off")
			}
			m := b[unix.NLMSG_HDRLEN:size]
			switch binary.NativeEndian.Uint16(b[4:]) {
			case unix.NLMSG_ERROR:
				if len(m) >= 4 {
					if errno := int32(binary.NativeEndian.Uint32(m)); errno != 0 {
						return unix.Errno(-errno)
					}
				}
				return nil
			case unix.NLMSG_DONE:
				return nil
			}
			answer(m)
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}
