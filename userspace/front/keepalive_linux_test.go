package front

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What is accepted must ask a silent client whether it still lives, and delay no small message, whichever way it goes on.
func TestAcceptedConnectionsAreKeptAlive(t *testing.T) {
	quiet, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the kernel, never here
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	for _, mode := range []string{"sni", "tcp", "http"} {
		t.Run(mode, func(t *testing.T) {
			addr := freeAddr(t)
			start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: %q } } ]`, addr, mode, quiet.Addr()))
			client := dialTCP(t, addr)
			if mode == "http" { // which has a goroutine for it
				fmt.Fprint(client, "GET / HTTP/1.1\r\n")
			}
			keptAlive(t, client)
		})
	}
	t.Run("detour", func(t *testing.T) { // the target has to be looked up
		addr := freeAddr(t)
		start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: "localhost:%d" } } ]`, addr, quiet.Addr().(*net.TCPAddr).Port))
		keptAlive(t, dialTCP(t, addr))
	})
}

// keptAlive looks at the socket of this process that client is connected to.
func keptAlive(t *testing.T, client net.Conn) {
	t.Helper()
	options := []struct {
		name                string
		level, option, want int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle / time.Second)},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval / time.Second)},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	}
	var wrong string
	eventually(t, "the options are set", func() bool {
		wrong = "no such socket"
		fd, ok := socketOf(addrPort(client.LocalAddr()))
		if ok {
			wrong = ""
			for _, o := range options {
				if got, err := unix.GetsockoptInt(fd, o.level, o.option); err != nil || got != o.want {
					wrong += fmt.Sprintf("%s is %d, %v; want %d. ", o.name, got, err, o.want)
				}
			}
		}
		t.Log(wrong)
		return wrong == ""
	})
}

// socketOf finds the socket of this process whose peer is that one.
func socketOf(peer netip.AddrPort) (fd int, ok bool) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		if a, err := unix.Getpeername(fd); err == nil && sockaddrPort(a) == peer {
			return fd, true
		}
	}
	return 0, false
}
