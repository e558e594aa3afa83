package tcpsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What TCP_INFO tells follows what happens to the connection.
func TestStates(t *testing.T) {
	a, b := pair(t)
	if rtt := ask(t, a, RoundTrip); rtt <= 0 || rtt > time.Minute {
		t.Errorf("the round trip on loopback is %v", rtt)
	}
	states := func(when string, established, closed bool) {
		t.Helper()
		if got := ask(t, a, IsEstablished); got != established {
			t.Errorf("%s: IsEstablished is %v", when, got)
		}
		if got := ask(t, a, IsClosed); got != closed {
			t.Errorf("%s: IsClosed is %v", when, got)
		}
	}
	states("connected", true, false)
	b.CloseWrite()
	io.ReadAll(a)
	states("the other end has ended its stream", false, false)
	b.SetLinger(0)
	b.Close()
	for !ask(t, a, IsClosed) { // the reset comes by itself
		time.Sleep(time.Millisecond)
	}
	states("reset", false, true)
}

// A question to what has no TCP socket has an answer.
func TestNoSocket(t *testing.T) {
	c, d := net.Pipe()
	defer c.Close()
	defer d.Close()
	if Control(c, func(int) { t.Error("a pipe has a descriptor") }) {
		t.Error("a pipe has a socket")
	}
	a, _ := pair(t)
	a.Close()
	if Control(a, func(int) { t.Error("a closed connection has a descriptor") }) {
		t.Error("a closed connection has a socket")
	}
	if IsClosed(-1) || !IsEstablished(-1) || RoundTrip(-1) != 0 || IsUnheard(-1, 0) {
		t.Error("an answer for what is no socket changes something")
	}
}

func ask[T any](t *testing.T, c net.Conn, question func(fd int) T) (answer T) {
	t.Helper()
	if !Control(c, func(fd int) { answer = question(fd) }) {
		t.Fatal("the connection has no socket")
	}
	return answer
}

// pair is both ends of a connection over loopback.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// A reset is seen by the other end, and comes from under the layers of a connection.
func TestReset(t *testing.T) {
	for name, reset := range map[string]func(c *net.TCPConn){
		"connection":     func(c *net.TCPConn) { ResetConn(c) },
		"layers":         func(c *net.TCPConn) { ResetConn(layer{c, t}) },
		"closed by hand": func(c *net.TCPConn) { ResetOnClose(layer{c, t}); c.Close() },
		"descriptor": func(c *net.TCPConn) {
			Control(c, func(fd int) { ResetFDOnClose(fd) })
			c.Close()
		},
		"last descriptor": func(c *net.TCPConn) {
			fd := -1
			Control(c, func(own int) { fd, _ = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0) })
			c.Close()
			Reset(fd)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			reset(a)
			if _, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the other end reads %v", err)
			}
		})
	}
}

// A reset is seen at once though another descriptor of the socket stays open, or is in flight: there may be
// one in another process. What the socket holds is lost with it.
func TestResetOfCopies(t *testing.T) {
	for name, reset := range map[string]func(c net.Conn){
		"connection": ResetConn,
		"layers":     func(c net.Conn) { ResetConn(layer{c, t}) },
		"descriptor": func(c net.Conn) {
			fd := dup(t, c)
			c.Close()
			if err := Reset(fd); err != nil {
				t.Error(err)
			}
		},
	} {
		for _, inFlight := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, in flight %v", name, inFlight), func(t *testing.T) {
				a, b := pair(t)
				a.Write([]byte("x"))
				b.Write([]byte("x"))
				copied := dup(t, a)
				if inFlight {
					fly(t, copied)
				} else {
					defer unix.Close(copied)
				}
				reset(a)
				b.SetReadDeadline(time.Now().Add(10 * time.Second))
				if _, err := io.ReadAll(b); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the other end reads %v", err)
				}
				if !inFlight && !IsClosed(copied) {
					t.Error("the copy is not closed")
				}
			})
		}
	}
}

// A unix socket that has a copy tells the other end, as well as it can.
func TestResetOfUnixCopies(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "socket")
	a, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup(t, a))
	ResetConn(a)
	if n, err := unix.Read(fds[1], make([]byte, 1)); n != 0 || err != nil && err != unix.ECONNRESET {
		t.Errorf("the other end reads %d bytes, %v", n, err)
	}
	unix.Close(fds[1])
}

// dup is a descriptor of c's socket, as another process may have one.
func dup(t *testing.T, c net.Conn) (fd int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err == nil {
		fd, err = Dup(raw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// fly leaves fd in a socket, where nobody has received it.
func fly(t *testing.T, fd int) {
	t.Helper()
	defer unix.Close(fd)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	if err := unix.Sendmsg(fds[0], []byte("x"), unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
}

// layer is a connection over another, whose Close says farewell.
type layer struct {
	under net.Conn
	t     *testing.T
}

func (l layer) NetConn() net.Conn                { return l.under }
func (l layer) Read(b []byte) (int, error)       { return l.under.Read(b) }
func (l layer) Write(b []byte) (int, error)      { return l.under.Write(b) }
func (l layer) LocalAddr() net.Addr              { return l.under.LocalAddr() }
func (l layer) RemoteAddr() net.Addr             { return l.under.RemoteAddr() }
func (l layer) SetDeadline(time.Time) error      { return nil }
func (l layer) SetReadDeadline(time.Time) error  { return nil }
func (l layer) SetWriteDeadline(time.Time) error { return nil }

func (l layer) Close() error {
	if _, err := l.under.Write([]byte("farewell")); err == nil {
		l.t.Error("the layer has said farewell before the reset")
	}
	return l.under.Close()
}

// A duplicate outlives what it was made of, and is closed when a program is started.
func TestDup(t *testing.T) {
	a, b := pair(t)
	raw, err := a.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := Dup(raw)
	if err != nil || fd < 3 {
		t.Fatalf("Dup is %d, %v", fd, err)
	}
	defer unix.Close(fd)
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the duplicate's flags are %d, %v", flags, err)
	}
	a.Close()
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Error(err)
	}
	if n, err := b.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("the other end reads %d bytes, %v", n, err)
	}
	if fd, err := Dup(raw); err == nil || fd >= 0 {
		t.Errorf("Dup of a closed connection is %d, %v", fd, err)
	}
}

// What the kernel says about TCP's memory is read, whatever it is.
func TestMemory(t *testing.T) {
	page := int64(os.Getpagesize())
	for _, v := range []struct {
		stat, limits, protocols string
		used, pressure          int64
		isShort                 bool
	}{
		{"sockets: used 9\nTCP: inuse 30 orphan 0 tw 2 alloc 35 mem 5\nUDP: inuse 1 mem 7\n", "1\t2\t3\n", "protocol  size sockets  memory press\nTCPv6 2432 0 41963 yes\nTCP 2432 0 41963 no 192\n", 5, 2, false},
		{"sockets: used 9\nTCP: inuse 30 orphan 0 tw 2 alloc 35 mem 5", "1 2 3", "TCP 2432 0 41963 yes 192\n", 5, 2, true},
		{"sockets: used 9\nTCP: inuse 1 mem", "1", "TCP 2432", 0, 0, false},
		{"", "", "", 0, 0, false},
	} {
		proc := t.TempDir()
		for name, text := range map[string]string{"net/sockstat": v.stat, "sys/net/ipv4/tcp_mem": v.limits, "net/protocols": v.protocols} {
			file := filepath.Join(proc, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if used, pressure := Memory(proc); used != v.used*page || pressure != v.pressure*page || IsShort(proc) != v.isShort {
			t.Errorf("%+v: %d, %d, %v", v, used/page, pressure/page, IsShort(proc))
		}
	}
	if used, pressure := Memory("/proc"); used < 0 || pressure < 100*page {
		t.Errorf("here %d bytes are taken, and TCP is short from %d on", used, pressure)
	}
}

// TestIsShut: a reset is no end of our stream, and is still told by the socket.
func TestIsShut(t *testing.T) {
	for _, isReset := range []bool{true, false} {
		a, b := pair(t)
		if IsShut(fdOf(t, a)) {
			t.Error("a stream that goes on is shut")
		}
		b.CloseWrite()
		if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("read %d bytes: %v", n, err)
		}
		if isReset {
			b.SetLinger(0)
		} else {
			a.CloseWrite()
		}
		b.Close()
		for !IsClosed(fdOf(t, a)) {
			time.Sleep(time.Millisecond)
		}
		if IsShut(fdOf(t, a)) == isReset {
			t.Errorf("reset: %v; shut: %v", isReset, !isReset)
		}
		if n, err := unix.GetsockoptInt(fdOf(t, a), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || (n != 0) != isReset {
			t.Errorf("reset: %v; it tells error %d: %v", isReset, n, err)
		}
	}
}
