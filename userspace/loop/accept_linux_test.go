package loop_test

import (
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/loop"
)

// TestAcceptorPauses: loops that pause at the same time leave one acceptor, which goes on, and none once it
// is stopped.
func TestAcceptorPauses(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 16); err != nil {
		t.Fatal(err)
	}
	addr, _ := unix.Getsockname(fd)
	var taken, failed atomic.Int32
	r := reactor(t)
	a := r.NewAcceptor(fd, func(s *loop.Socket, _ unix.Sockaddr) (w loop.Wait) {
		taken.Add(1)
		s.Reset()
		return w
	},
		func(error) bool { failed.Add(1); return true })
	a.Start()
	one := r.Watches()
	for range 5 {
		a.Pause()
		a.Pause()
		time.Sleep(30 * time.Millisecond)
	}
	to := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: addr.(*unix.SockaddrInet4).Port}
	if c, err := net.Dial("tcp", to.String()); err == nil { // else the reset came first
		defer c.Close()
	}
	for deadline := time.Now().Add(time.Minute); taken.Load() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if taken.Load() != 1 || failed.Load() != 0 {
		t.Errorf("%d connections are taken, %d failures: want 1 and 0", taken.Load(), failed.Load())
	}
	if now := r.Watches(); now != one {
		t.Errorf("the loops know %d acceptors, want %d", now, one)
	}
	a.Stop()
	if left := r.Watches(); left != 0 {
		t.Errorf("%d acceptors are left", left)
	}
}

// TestAcceptorStops: when Stop has returned, fail neither runs nor will, also where the acceptor could not
// begin. A file can't be watched.
func TestAcceptorStops(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	began, goOn := make(chan struct{}), make(chan struct{})
	var running atomic.Bool
	a := reactor(t).NewAcceptor(int(file.Fd()), func(*loop.Socket, unix.Sockaddr) (w loop.Wait) { return w }, func(error) bool {
		running.Store(true)
		began <- struct{}{}
		<-goOn
		running.Store(false)
		return false
	})
	go a.Start()
	<-began
	stopped := make(chan bool)
	go func() {
		a.Stop()
		stopped <- running.Load()
	}()
	select {
	case <-stopped:
		t.Error("Stop has returned while fail runs")
		close(goOn)
	case <-time.After(50 * time.Millisecond): // enough for most runs to see it
		close(goOn)
		if <-stopped {
			t.Error("Stop has returned while fail runs")
		}
	}
}
