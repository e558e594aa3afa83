package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The two ends of the cable: the kernel's and ours.
var (
	kernelAddr = netip.MustParseAddr("10.89.0.1")
	ourAddr    = netip.MustParseAddr("10.89.0.2")
)

// patience bounds each wait.
const patience = time.Minute

// A Network is a network namespace with a TUN device, whose other end we are. Safe for concurrent use.
type Network struct {
	ns  netns.NsHandle
	tun *os.File

	mu    sync.Mutex
	conns map[uint16]*Conn // by our port
	port  uint16           // the last that was given away
}

// New makes a network until the end of the test. It needs root.
func New(t testing.TB) *Network {
	t.Helper()
	n := &Network{conns: map[uint16]*Conn{}, port: 2000}
	t.Cleanup(func() {
		if n.tun != nil {
			n.tun.Close()
		}
		if n.ns > 0 {
			n.ns.Close()
		}
	})
	if err := inNamespace(func() (err error) { n.ns, err = netns.New(); return err }, n.bringUp); err != nil {
		t.Fatalf("make a network with a TUN device: %v", err)
	}
	go n.receive()
	return n
}

// inNamespace runs enter and then the rest on a thread of its own, which ends with it.
func inNamespace(enter func() error, then ...func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: no other goroutine may find itself in the namespace
		err := enter()
		for _, f := range then {
			if err == nil {
				err = f()
			}
		}
		done <- err
	}()
	return <-done
}

func (n *Network) inside(f func() error) error {
	return inNamespace(func() error { return netns.Set(n.ns) }, f)
}

// bringUp runs in the namespace.
func (n *Network) bringUp() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	n.tun = os.NewFile(uintptr(fd), "tun") // not in Go's poller before it is a device; see below
	r, err := unix.NewIfreq("wire")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
		return fmt.Errorf("make a TUN device: %w", err)
	}
	again, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	n.tun.Close()
	n.tun = os.NewFile(uintptr(again), "tun")
	link, err := netlink.LinkByName("wire")
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: kernelAddr.AsSlice(), Mask: net.CIDRMask(24, 32)}}
	return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
}

// receive takes what the kernel sends, until the device is closed.
func (n *Network) receive() {
	b := make([]byte, 64<<10)
	for {
		m, err := n.tun.Read(b)
		if err != nil {
			return
		}
		s, ok := parse(b[:m])
		if !ok {
			continue
		}
		n.mu.Lock()
		c := n.conns[s.to]
		n.mu.Unlock()
		if c != nil {
			c.receive(s)
		}
	}
}

// Connect opens a connection from us to a socket of the kernel's, which the caller closes.
func (n *Network) Connect(t testing.TB) (*Conn, *net.TCPConn) {
	t.Helper()
	var ln net.Listener
	err := n.inside(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(kernelAddr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := n.conn(t, uint16(ln.Addr().(*net.TCPAddr).Port))
	c.send(segment{flags: syn, seq: c.start - 1})
	if err := c.wait(func() bool { return c.open }); err != nil {
		t.Fatalf("connect: %v", err)
	}
	k, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c, k.(*net.TCPConn)
}

// Answer lets the kernel open a connection to us. The caller closes its socket.
func (n *Network) Answer(t testing.TB) (*Conn, *net.TCPConn) {
	t.Helper()
	c := n.conn(t, 0)
	var k net.Conn
	err := n.inside(func() error {
		var d net.Dialer
		d.SetMultipathTCP(false)
		d.Timeout = patience
		var err error
		k, err = d.Dial("tcp4", netip.AddrPortFrom(ourAddr, c.port).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.wait(func() bool { return c.open }); err != nil {
		t.Fatalf("answer: %v", err)
	}
	return c, k.(*net.TCPConn)
}

// conn makes a Conn with a port of its own, which is reset at the end of the test.
func (n *Network) conn(t testing.TB, peer uint16) *Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.port++
	// Its numbers wrap where signs are confused.
	c := &Conn{n: n, port: n.port, peer: peer, start: 1 << 31, window: 65535}
	c.changed.L = &c.mu
	n.conns[c.port] = c
	t.Cleanup(func() {
		c.Reset()
		n.mu.Lock()
		delete(n.conns, c.port)
		n.mu.Unlock()
	})
	return c
}

// flags of a segment (RFC 9293, 3.1).
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
	urg
)

// segment is a TCP segment of this network.
type segment struct {
	from, to   uint16
	seq, ack   uint32
	flags      byte
	window, up uint16
	data       []byte
}

// parse reads an IPv4 packet with a TCP segment for us.
func parse(b []byte) (s segment, ok bool) {
	if len(b) < 40 || b[0] != 0x45 || b[9] != unix.IPPROTO_TCP {
		return s, false
	}
	b = b[20:min(len(b), int(binary.BigEndian.Uint16(b[2:])))]
	if len(b) < 20 || int(b[12]>>4)*4 > len(b) {
		return s, false
	}
	return segment{
		from: binary.BigEndian.Uint16(b), to: binary.BigEndian.Uint16(b[2:]),
		seq: binary.BigEndian.Uint32(b[4:]), ack: binary.BigEndian.Uint32(b[8:]),
		flags: b[13], window: binary.BigEndian.Uint16(b[14:]), data: b[int(b[12]>>4)*4:],
	}, true
}

// packet writes it, with an MSS option in a SYN and no option else: no timestamps, no SACK, no scale of
// windows.
func (s segment) packet() []byte {
	header := 20
	if s.flags&syn != 0 {
		header = 24
	}
	b := make([]byte, 20+header, 20+header+len(s.data))
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[2:], uint16(cap(b)))
	copy(b[12:], ourAddr.AsSlice())
	copy(b[16:], kernelAddr.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b[:20]))
	t := b[20:]
	binary.BigEndian.PutUint16(t, s.from)
	binary.BigEndian.PutUint16(t[2:], s.to)
	binary.BigEndian.PutUint32(t[4:], s.seq)
	binary.BigEndian.PutUint32(t[8:], s.ack)
	t[12], t[13] = byte(header/4<<4), s.flags
	binary.BigEndian.PutUint16(t[14:], s.window)
	binary.BigEndian.PutUint16(t[18:], s.up)
	if s.flags&syn != 0 {
		copy(t[20:], []byte{2, 4, 1460 >> 8, 1460 & 0xff})
	}
	b = append(b, s.data...)
	t = b[20:]
	pseudo := append([]byte{}, b[12:20]...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, byte(len(t)>>8), byte(len(t)))
	binary.BigEndian.PutUint16(t[16:], checksum(pseudo, t))
	return b
}

// checksum is the internet's; all parts but the last have an even length.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for len(b) > 1 {
			sum += uint32(b[0])<<8 | uint32(b[1])
			b = b[2:]
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
