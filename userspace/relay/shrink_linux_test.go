package relay

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/loop"
)

// TestShrinks: while memory is short the buffers of a direction past its trial grow no more. They do again
// afterwards, and when its pump has ended. What a process that died has left is taken back.
func TestShrinks(t *testing.T) {
	loops, err := loop.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	r, done := New(loops), make(chan Result, 1)
	defer r.Close()
	client, down := connectedConn(t)
	server, up := connectedConn(t)
	var fds []int // also once the relay has the sockets, and has closed them
	var same []net.Conn
	for _, c := range []net.Conn{down, up} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		fd, err := tcpsock.Dup(raw)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		other, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		fds, same = append(fds, fd), append(same, other)
	}
	type state struct{ locks, unsent int } // of a flow that moves bytes from up to down
	short := state{unix.SOCK_RCVBUF_LOCK, shrunkUnsent}
	now := func() (s state) { // -1 is what the sysctl says, as 0 is
		s.locks, _ = unix.GetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_BUF_LOCK)
		s.unsent, _ = unix.GetsockoptInt(fds[0], unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT)
		s.unsent = max(s.unsent, 0)
		return s
	}
	r.Run(t.Context(), down, up, Options{}, func(r Result) { done <- r })
	go func() {
		for b := make([]byte, 64<<10); ; {
			if _, err := server.Write(b); err != nil {
				return
			}
		}
	}()
	client.SetReadDeadline(time.Now().Add(time.Minute))
	move := func(n int64) {
		t.Helper()
		if _, err := io.CopyN(io.Discard, client, n); err != nil {
			t.Fatal(err)
		}
	}
	wait := func(what string, want state, n int64) {
		t.Helper()
		for end := time.Now().Add(time.Minute); now() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v, want %+v", what, now(), want)
			}
			move(n)
		}
	}
	r.SaveSockets(true)
	r.SaveMemory(true)
	move(trialRead)
	if got := now(); got != (state{}) {
		t.Errorf("on trial: %+v", got)
	}
	wait("while memory is short", short, 64<<10)
	if size, err := unix.GetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || size < leastReceive() {
		t.Errorf("the receive buffer has %d bytes, want %d at least: %v", size, leastReceive(), err)
	}
	r.SaveSockets(false)
	wait("afterwards", state{}, 64<<10)
	r.SaveSockets(true)
	wait("short again", short, 64<<10)
	ungrown(same[0], same[1])
	if got := now(); got != (state{}) {
		t.Errorf("after it was taken back: %+v", got)
	}
	r.SaveSockets(false)
	move(4 << 20)
	r.SaveSockets(true)
	wait("short once more", short, 64<<10)
	client.Close()
	server.Close()
	select {
	case <-done:
		if got := now(); got.locks != 0 {
			t.Errorf("after its pump has ended: %+v", got)
		}
	case <-time.After(time.Minute):
		t.Error("the flow does not end")
	}
}
