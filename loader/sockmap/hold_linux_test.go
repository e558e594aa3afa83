package sockmap

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// However often a busy direction leaves, its source's receive buffer stays within net.ipv4.tcp_rmem, also
// where segments are so small that most of the buffer is overhead.
func TestLeavingKeepsTheReceiveBuffer(t *testing.T) {
	if !loadertest.InOwnNetwork(t) {
		return
	}
	most := 1 << 20
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_rmem")
	loadertest.Must(t, err)
	if f := strings.Fields(string(b)); len(f) != 3 || f[2] != strconv.Itoa(most) {
		t.Fatalf("tcp_rmem is %q", b)
	}
	loadertest.Must(t, noOffload("lo"))
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 1 << 40})
	sockets := l.onlyFlow(t).sockets
	for side, way := range [][2]*net.TCPConn{{p.Client, p.Server}, {p.Server, p.Client}} {
		for round := range 8 {
			// The kernel learns how much overhead there is where segments become larger.
			for _, mtu := range []uint32{160, 170 + uint32(round)} {
				loadertest.Must(t, setMTU("lo", mtu))
				loadertest.Must(t, loadertest.SendPart(way[0], way[1], 1, 16<<10))
			}
			before := p.Returns.Load()
			loadertest.WaitFor(t, func() bool { leave(l); return p.Returns.Load() > before }, "the flow to leave and come back")
			size, err := unix.GetsockoptInt(int(sockets[side]), unix.SOL_SOCKET, unix.SO_RCVBUF)
			loadertest.Must(t, err)
			t.Logf("round %d: the receive buffer of %s is %d bytes", round, sideName(uint32(side)), size)
			if size > most {
				t.Fatal("that is more than tcp_rmem allows")
			}
		}
	}
}

func setMTU(device string, mtu uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(device)
	if err != nil {
		return err
	}
	r.SetUint32(mtu)
	return unix.IoctlIfreq(fd, unix.SIOCSIFMTU, r)
}

// noOffload makes the device take one segment at a time.
func noOffload(device string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var failed []error
	for _, command := range []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO} {
		value := [2]uint32{command, 0}
		r := struct { // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(r.name[:], device)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL,
			uintptr(unsafe.Pointer(&r))); e != 0 {
			failed = append(failed, e)
		}
	}
	return errors.Join(failed...)
}
