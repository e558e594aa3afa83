//go:build linux

package front

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOutOfFiles: without file descriptors the daemon neither spins nor hangs
// nor dies, and goes on when there are some again.
func TestOutOfFiles(t *testing.T) {
	up := backend(t, echo)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, up))
	ping := func() error {
		c, err := net.DialTimeout("tcp", addr, 2*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		io.WriteString(c, "x")
		_, err = io.ReadFull(c, make([]byte, 1))
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}

	// The clients' sockets are made before the limit falls below what is open.
	var socks []int
	for range 50 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		socks = append(socks, fd)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	restore := func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &old) }
	defer restore()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	ap := addrPort(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port(addr)})
	cpu := cpuTime(t)
	for _, fd := range socks {
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}); err != nil {
			t.Fatalf("connect: %v", err)
		}
	}
	eventually(t, "connections are refused and counted", func() bool { return d.refused("out_of_files") >= 1 })
	time.Sleep(500 * time.Millisecond)
	if spent := cpuTime(t) - cpu; spent > 400*time.Millisecond {
		t.Errorf("the daemon spent %v of CPU while it was out of files: it spins", spent)
	}
	restore()
	for _, fd := range socks {
		unix.Shutdown(fd, unix.SHUT_RDWR)
	}
	eventually(t, "it serves again", func() bool { return ping() == nil })
	if !strings.Contains(d.log.String(), "out of file descriptors") {
		t.Error("the log says nothing")
	}
}

func port(addr string) int {
	a, _ := net.ResolveTCPAddr("tcp", addr)
	return a.Port
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
