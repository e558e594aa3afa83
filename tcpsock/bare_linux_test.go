package tcpsock

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// bare is both ends of a connection, one of them bare.
func bare(t *testing.T) (*Bare, *net.TCPConn) {
	t.Helper()
	a, b := pair(t)
	raw, err := a.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := Dup(raw)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	return NewBare(fd), b
}

// A bare connection tells what another one does, has one owner, and is made fit for who waits by a poller.
func TestBare(t *testing.T) {
	a, b := bare(t)
	if got, want := AddrPortOf(a.LocalAddr()), AddrPortOf(b.RemoteAddr()); got != want {
		t.Errorf("its address is %v, want %v", got, want)
	}
	if got, want := AddrPortOf(a.RemoteAddr()), AddrPortOf(b.LocalAddr()); got != want {
		t.Errorf("its peer is %v, want %v", got, want)
	}
	Control(a, func(fd int) { unix.SetNonblock(fd, false) })
	if err := a.Prepare(); err != nil || a.IsUnix() {
		t.Errorf("a TCP connection: %v, unix %v", err, a.IsUnix())
	}
	flags := func(fd int) (n int) {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			t.Error(err)
		}
		return n
	}
	if ask(t, a, flags)&unix.O_NONBLOCK == 0 {
		t.Error("it blocks")
	}
	c, err := a.Copy()
	if err != nil {
		t.Fatal(err)
	}
	fd := a.Take()
	if err := a.Close(); fd < 0 || !errors.Is(err, net.ErrClosed) || Control(a, func(int) {}) || a.Take() >= 0 {
		t.Errorf("it was taken as %d, and is here still: %v", fd, err)
	}
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Errorf("who has taken it: %v", err)
	}
	unix.Close(fd)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if n, err := b.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("the other end reads %d, %v", n, err)
	}
	if n, err := b.Read(make([]byte, 2)); n != 0 || err == nil {
		t.Errorf("nobody has it any more, and the other end reads %d, %v", n, err)
	}
}

// A reset of a bare connection is one, whoever has another descriptor.
func TestResetBare(t *testing.T) {
	a, b := bare(t)
	c, err := a.Copy()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ResetConn(a)
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the other end reads %v", err)
	}
	if Control(a, func(int) {}) {
		t.Error("it is not closed")
	}
}

// What is no stream is none, and a unix socket is one.
func TestBareOfOthers(t *testing.T) {
	for kind, isStream := range map[int]bool{unix.SOCK_STREAM: true, unix.SOCK_DGRAM: false} {
		fds, err := unix.Socketpair(unix.AF_UNIX, kind, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[1])
		b := NewBare(fds[0])
		if err := b.Prepare(); (err == nil) != isStream || !b.IsUnix() {
			t.Errorf("a unix socket of kind %d: %v, unix %v", kind, err, b.IsUnix())
		}
		if isStream {
			ResetConn(b)
			if n, err := unix.Read(fds[1], make([]byte, 1)); n != 0 || err != nil {
				t.Errorf("after a reset: %d, %v", n, err)
			}
		}
		b.Close()
	}
}
