package server

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// What is accepted must ask a silent client whether it still lives, and delay no small message, whichever way it goes on.
func TestAcceptedConnectionsAreKeptAlive(t *testing.T) {
	up := backend(t, speak("HTTP/1.1 204 No Content\r\n\r\n"))
	_, port, _ := net.SplitHostPort(up)
	for _, c := range []struct{ name, mode, target, send string }{
		{"sni", "sni", up, string(helloFor(t, "a.test"))},
		{"tcp", "tcp", up, ""},
		{"a target to be looked up", "tcp", "localhost:" + port, ""},
		{"http", "http", up, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := freeAddr(t)
			start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: %s, default: { forward: %q } } ]`, addr, c.mode, c.target))
			client := dialTCP(t, addr)
			io.WriteString(client, c.send)
			if _, err := client.Read(make([]byte, 1)); err != nil { // then it is on its way
				t.Fatal(err)
			}
			keptAlive(t, client)
		})
	}
}

// keptAlive looks at the socket of this process that client is connected to.
func keptAlive(t *testing.T, client net.Conn) {
	t.Helper()
	fd, ok := socketOf(tcpsock.AddrPortOf(client.LocalAddr()))
	if !ok {
		t.Fatal("there is no such socket")
	}
	options := []struct {
		name                string
		level, option, want int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(tcpsock.KeepAlive.Idle / time.Second)},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(tcpsock.KeepAlive.Interval / time.Second)},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, tcpsock.KeepAlive.Count},
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	}
	for _, o := range options {
		if got, err := unix.GetsockoptInt(fd, o.level, o.option); err != nil || got != o.want {
			t.Errorf("%s is %d, %v; want %d", o.name, got, err, o.want)
		}
	}
}

// socketOf finds the socket of this process whose peer is that one.
func socketOf(peer netip.AddrPort) (fd int, ok bool) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		if tcpsock.Remote(fd) == peer {
			return fd, true
		}
	}
	return 0, false
}
