package prove

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// The queues of TCP_REPAIR_QUEUE (include/uapi/linux/tcp.h).
const (
	noQueue = iota
	recvQueue
	sendQueue
)

// Injector sends TCP segments of our own making in the name of a connection over loopback: what a
// network does that repeats, overlaps and reorders. It needs CAP_NET_RAW and CAP_NET_ADMIN.
type Injector struct {
	raw      int
	from, to netip.AddrPort
	seq, ack uint32 // where the connection's next byte goes, and what it has received
	stamp    uint32 // TSval; 0: the connection has no timestamps
	conn     *net.TCPConn
}

// NewInjector speaks for c, an IPv4 connection that has nothing in flight.
func NewInjector(c *net.TCPConn) (*Injector, error) {
	in := &Injector{conn: c}
	in.from, in.to = c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	if err := in.Sync(); err != nil {
		return nil, err
	}
	var err error
	if in.raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
		return nil, fmt.Errorf("open a raw socket: %w", err)
	}
	return in, nil
}

// Close closes what it sends through; the connection goes on.
func (in *Injector) Close() { _ = unix.Close(in.raw) }

// Sync learns the connection's sequence numbers.
func (in *Injector) Sync() error {
	err := error(net.ErrClosed)
	tcpsock.Control(in.conn, func(fd int) { err = in.sync(fd) })
	return err
}

func (in *Injector) sync(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return fmt.Errorf("read sequence numbers (TCP_REPAIR): %w", err)
	}
	defer unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_OFF_NO_WP)
	for queue, n := range map[int]*uint32{sendQueue: &in.seq, recvQueue: &in.ack} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
			return err
		}
		v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		if err != nil {
			return err
		}
		*n = uint32(v)
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, noQueue)
	var info unix.TCPInfo
	err := tcpsock.Info(fd, &info)
	if in.stamp = 0; err == nil && info.Options&1 != 0 { // TCPI_OPT_TIMESTAMPS
		var v int
		v, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_TIMESTAMP)
		in.stamp = uint32(v)
	}
	return err
}

// Send injects data at an offset from where the connection's next byte goes.
func (in *Injector) Send(offset int, data []byte) error {
	const ip, fixed, psh, ack = 20, 20, 0x08, 0x10
	header := fixed
	if in.stamp != 0 {
		header += 12
	}
	b := make([]byte, ip+header, ip+header+len(data))
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_TCP // the kernel fills in lengths, id and checksum
	src, dst := in.from.Addr().Unmap().As4(), in.to.Addr().Unmap().As4()
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	t := b[ip:]
	binary.BigEndian.PutUint16(t[0:], in.from.Port())
	binary.BigEndian.PutUint16(t[2:], in.to.Port())
	binary.BigEndian.PutUint32(t[4:], in.seq+uint32(offset))
	binary.BigEndian.PutUint32(t[8:], in.ack)
	t[12] = byte(header / 4 << 4)
	t[13] = psh | ack
	binary.BigEndian.PutUint16(t[14:], 512)
	if in.stamp != 0 {
		copy(t[20:], []byte{1, 1, 8, 10})
		binary.BigEndian.PutUint32(t[24:], in.stamp)
	}
	b = append(b, data...)
	t = b[ip:]
	binary.BigEndian.PutUint16(t[16:], tcpChecksum(src, dst, t))
	if err := unix.Sendto(in.raw, b, 0, &unix.SockaddrInet4{Addr: dst}); err != nil {
		return fmt.Errorf("send a segment of our own: %w", err)
	}
	return nil
}

func tcpChecksum(src, dst [4]byte, segment []byte) uint16 {
	pseudo := append(append(append([]byte{}, src[:]...), dst[:]...), 0, unix.IPPROTO_TCP, byte(len(segment)>>8), byte(len(segment)))
	var sum uint32
	for _, b := range [][]byte{pseudo, segment} {
		for i := 0; i+1 < len(b); i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
		if len(b)%2 == 1 {
			sum += uint32(b[len(b)-1]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
