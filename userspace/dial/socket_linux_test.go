package dial

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// blackHole listens with a queue that is full, so that the kernel drops every
// further SYN, as an address that swallows packets does.
func blackHole(t *testing.T, network, addr string) uint16 {
	t.Helper()
	lc := net.ListenConfig{}
	l, err := lc.Listen(context.Background(), network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }) // a queue of one
	if err != nil {
		t.Fatal(err)
	}
	for wait := patience; ; wait = 200 * time.Millisecond { // the first finds a place, however slow we are
		c, err := net.DialTimeout(network, l.Addr().String(), wait)
		if err != nil {
			return port(l.Addr())
		}
		t.Cleanup(func() { c.Close() })
	}
}

// TestSocket: what the datapaths rely on, even where the process asks for
// Multipath TCP.
func TestSocket(t *testing.T) {
	t.Setenv("GODEBUG", "multipathtcp=1")
	l, _ := listen(t, "tcp4", "127.0.0.1:0")
	c, err := new(Dialer).Dial(t.Context(), Target{Scheme: TCP, Host: "127.0.0.1", Port: port(l.Addr())}, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []struct {
		name          string
		level, option int
		want          int
	}{
		{"protocol", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP},
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE (s)", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{"TCP_KEEPINTVL (s)", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 30},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 8},
	} {
		var got int
		raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), o.level, o.option) })
		if err != nil || got != o.want {
			t.Errorf("%s is %d, %v; want %d", o.name, got, err, o.want)
		}
	}
}

// TestUrgentBeforeItIsRead: urgent bytes that come before anybody reads stay in their place. Where they do not,
// the kernel drops the first of two as the second comes, and what the relay sets later finds it gone.
func TestUrgentBeforeItIsRead(t *testing.T) {
	for network, addr := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		a, err := Begin(l.Addr().(*net.TCPAddr).AddrPort(), "", new(Outcomes))
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(a.FD)
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		tcpsock.Control(c, func(fd int) {
			for _, b := range []string{"a", "b"} {
				if err := unix.Sendto(fd, []byte(b), unix.MSG_OOB, nil); err != nil {
					t.Error(err)
				}
			}
			for n := -1; n != 0; time.Sleep(time.Millisecond) { // until they have come
				if n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ); err != nil {
					t.Fatal(err)
				}
			}
		})
		tcpsock.KeepUrgent(a.FD)
		var got string
		for buf, n := make([]byte, 2), 1; n > 0; got += string(buf[:max(n, 0)]) { // a read stops before an urgent byte
			n, err = unix.Read(a.FD, buf)
		}
		if err != unix.EAGAIN || got != "ab" {
			t.Errorf("%s: %q arrives of %q: %v", network, got, "ab", err)
		}
	}
}
