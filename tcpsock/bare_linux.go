package tcpsock

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bare is a connection that has a descriptor and nothing else: it is in no poller, so nobody can wait for it.
// It is for one that is on its way to who reads and writes it.
type Bare struct {
	mu sync.RWMutex
	fd int // guarded by mu; negative: it is closed, or taken
}

// NewBare makes one of fd, which it owns from then on.
func NewBare(fd int) *Bare { return &Bare{fd: fd} }

// Take gives the descriptor, which is the caller's then; negative: there is none any more.
func (b *Bare) Take() (fd int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fd, b.fd = b.fd, -1
	return fd
}

// Close closes the descriptor, unless it was taken.
func (b *Bare) Close() error {
	if fd := b.Take(); fd >= 0 {
		return unix.Close(fd)
	}
	return net.ErrClosed
}

// Copy makes another one of the same socket.
func (b *Bare) Copy() (net.Conn, error) {
	fd, err := Dup((*bareRaw)(b))
	if err != nil {
		return nil, err
	}
	return NewBare(fd), nil
}

// File is Copy for who wants a file.
func (b *Bare) File() (*os.File, error) {
	fd, err := Dup((*bareRaw)(b))
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "socket"), nil
}

// Prepare is for a descriptor that came from elsewhere: it is not to block. An error says that it is no
// stream.
func (b *Bare) Prepare() (err error) {
	cerr := (*bareRaw)(b).Control(func(fd uintptr) {
		var kind int
		if kind, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); err == nil && kind != unix.SOCK_STREAM {
			err = errors.New("it has a socket that is no stream")
		}
		err = errors.Join(err, unix.SetNonblock(int(fd), true))
	})
	return errors.Join(cerr, err)
}

// IsUnix reports whether it is a unix socket.
func (b *Bare) IsUnix() bool {
	family := 0
	(*bareRaw)(b).Control(func(fd uintptr) {
		family, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
	})
	return family == unix.AF_UNIX
}

// LocalAddr is that of TCP; of a unix socket it is that of nowhere.
func (b *Bare) LocalAddr() net.Addr { return b.address(unix.Getsockname) }

// RemoteAddr: see LocalAddr.
func (b *Bare) RemoteAddr() net.Addr { return b.address(unix.Getpeername) }

func (b *Bare) address(of func(fd int) (unix.Sockaddr, error)) net.Addr {
	var a unix.Sockaddr
	(*bareRaw)(b).Control(func(fd uintptr) { a, _ = of(int(fd)) })
	return net.TCPAddrFromAddrPort(AddrPort(a))
}

// SetLinger is that of [net.TCPConn].
func (b *Bare) SetLinger(seconds int) (err error) {
	linger := unix.Linger{Linger: int32(seconds)}
	if seconds >= 0 {
		linger.Onoff = 1
	}
	cerr := (*bareRaw)(b).Control(func(fd uintptr) {
		err = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &linger)
	})
	return errors.Join(cerr, os.NewSyscallError("setsockopt", err))
}

// What follows is for who can wait.

func (*Bare) Read([]byte) (int, error)          { return 0, errors.ErrUnsupported }
func (*Bare) Write([]byte) (int, error)         { return 0, errors.ErrUnsupported }
func (*Bare) SetDeadline(time.Time) error       { return os.ErrNoDeadline }
func (*Bare) SetReadDeadline(time.Time) error   { return os.ErrNoDeadline }
func (*Bare) SetWriteDeadline(time.Time) error  { return os.ErrNoDeadline }
func (*bareRaw) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (*bareRaw) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// SyscallConn gives what [Control] uses.
func (b *Bare) SyscallConn() (syscall.RawConn, error) { return (*bareRaw)(b), nil }

// bareRaw is a Bare whose methods are those of [syscall.RawConn].
type bareRaw Bare

// Control calls f with the descriptor, which nobody closes meanwhile.
func (b *bareRaw) Control(f func(fd uintptr)) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(b.fd))
	return nil
}
