package wakelan

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestSend: of a host in two networks, the packet comes into the one where the machine is, and into both where that is
// not known.
func TestSend(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, to make network namespaces")
		}
		t.Skip("needs root, to make network namespaces")
	}
	mac := net.HardwareAddr{2, 0, 0x5e, 0x10, 0, 1}
	failed := make(chan bool)
	go func() { // the thread ends with its namespace
		defer close(failed)
		runtime.LockOSThread()
		if _, err := netns.New(); err != nil {
			t.Error(err)
			return
		}
		for _, args := range [][]string{
			{"link", "add", "a0", "type", "veth", "peer", "name", "a1"}, {"link", "add", "b0", "type", "veth", "peer", "name", "b1"},
			{"addr", "add", "10.8.0.1/24", "dev", "a0"}, {"addr", "add", "10.9.0.1/24", "dev", "b0"},
			{"link", "set", "a0", "up"}, {"link", "set", "a1", "up"}, {"link", "set", "b0", "up"}, {"link", "set", "b1", "up"},
		} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				t.Errorf("ip %v: %v: %s", args, err, out)
				return
			}
		}
		a, b := captured(t, "a1"), captured(t, "b1")
		if a < 0 || b < 0 {
			return
		}
		if err := Send(mac, []netip.Addr{netip.MustParseAddr("10.9.0.7")}); err != nil {
			t.Errorf("to a machine in b: %v", err)
		}
		b.wants(t, "to a machine in b", mac)
		if err := Send(mac, []netip.Addr{netip.MustParseAddr("100.64.0.7")}); err != nil {
			t.Errorf("to a machine somewhere: %v", err)
		}
		b.wants(t, "to a machine somewhere, b", mac)
		a.wants(t, "to a machine somewhere, a", mac)
		if n := a.count(mac); n != 0 {
			t.Errorf("%d more came into a", n)
		}
		for _, device := range []string{"a0", "b0"} {
			if out, err := exec.Command("ip", "link", "set", device, "down").CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
		if err := Send(mac, nil); err == nil {
			t.Error("without any network it succeeds")
		}
	}()
	<-failed
}

// capture is a packet socket on an interface.
type capture int

// captured receives what comes into a device of this thread's network namespace.
func captured(t *testing.T, device string) capture {
	i, err := net.InterfaceByName(device)
	if err != nil {
		t.Error(err)
		return -1
	}
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		t.Error(err)
		return -1
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}); err != nil {
		t.Error(err)
		return -1
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
		t.Error(err)
	}
	return capture(fd)
}

// isMagic says whether a frame is a broadcast with the magic packet at its end.
func isMagic(frame []byte, mac net.HardwareAddr) bool {
	return bytes.HasPrefix(frame, bytes.Repeat([]byte{0xff}, 6)) && bytes.HasSuffix(frame, magicPacket(mac))
}

// wants waits for the magic packet.
func (c capture) wants(t *testing.T, what string, mac net.HardwareAddr) {
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(int(c), buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		if isMagic(buf[:n], mac) {
			return
		}
	}
}

// count is how many magic packets have come that nobody has taken.
func (c capture) count(mac net.HardwareAddr) (magic int) {
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(int(c), buf, unix.MSG_DONTWAIT)
		if err != nil {
			return magic
		}
		if isMagic(buf[:n], mac) {
			magic++
		}
	}
}
