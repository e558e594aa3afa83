//go:build linux

package server

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// TestOutOfFiles: without file descriptors the daemon neither spins nor hangs
// nor dies, and goes on when there are some again.
func TestOutOfFiles(t *testing.T) {
	up := backend(t, echo)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, up))
	ping := func() error {
		c, err := net.DialTimeout("tcp", addr, patience)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
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
	restore := limitFiles(t, 0)
	defer restore()
	ap := tcpsock.AddrPortOf(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port(addr)})
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

// TestOutOfFilesRefusesAtOnce: when live flows hold all file descriptors, those
// that were held back among them, more connections are still refused and don't
// hang.
func TestOutOfFilesRefusesAtOnce(t *testing.T) {
	quiet, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the kernel, never here
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, quiet.Addr()))
	const clients = 60
	var socks []int
	for range clients {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		socks = append(socks, fd)
	}
	const room = 7
	defer limitFiles(t, room)()
	for _, fd := range socks {
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port(addr), Addr: [4]byte{127, 0, 0, 1}}); err != nil && err != unix.ECONNRESET {
			t.Fatalf("connect: %v", err)
		}
	}
	served := 0
	eventually(t, "each connection is refused or served", func() bool {
		served = 0
		for _, fd := range socks {
			if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, 0); n == 0 {
				served++
			}
		}
		return served <= d.flows.Len()
	})
	if served == clients { // how many can be depends on what tests before this one still have open
		t.Errorf("all %d connections are served with %d file descriptors: the limit is none", served, room)
	}
}

// TestServesOutOfFiles: that nothing is accepted for lack of file descriptors is no hang.
//
// +checklocksignore: the analyzer does not know that a test is the only one
func TestServesOutOfFiles(t *testing.T) {
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { forward: %q } } ]`, addr, backend(t, echo)))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	d.spare.mu.Lock()
	for _, file := range d.spare.files { // somebody else has them
		defer file.Close()
	}
	d.spare.files = nil
	d.spare.missing.Store(true)
	d.spare.mu.Unlock()
	restore := limitFiles(t, 0)
	defer restore()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port(addr), Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	s := d.sockets[addr]
	eventually(t, "it waits", func() bool { _, waits := s.queue(); return waits })
	for range 3 {
		before := s.taken.Load()
		eventually(t, "the daemon tries to accept", func() bool { return s.taken.Load() > before })
		if err := d.Serves(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, waits := s.queue(); !waits {
		t.Error("nobody waits any more: nothing was tested")
	}
}

// limitFiles leaves room for so many more file descriptors, until restore.
func limitFiles(t *testing.T, room int) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	// The limit is one of numbers: those below the highest that are free count.
	highest := 0
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		n, _ := strconv.Atoi(e.Name())
		highest = max(highest, n)
	}
	var fill []int
	for {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fill = append(fill, fd)
		highest = max(highest, fd)
		if fd == highest && len(fill) >= room {
			break
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 1), Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	for _, fd := range fill[:room] {
		unix.Close(fd)
	}
	return func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
		for _, fd := range fill[room:] {
			unix.Close(fd)
		}
		fill = fill[:room]
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
