package handover

import (
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// KeptFlow is a flow of a [Queue]: its record, and copies of its sockets.
type KeptFlow struct {
	Flow     *Flow
	down, up int // -1: it is no more here
}

// NewKeptFlow makes one of descriptors, which it owns. f has a [Balance].
func NewKeptFlow(f *Flow, down, up int) *KeptFlow { return &KeptFlow{f, down, up} }

// Close closes the copies.
func (k *KeptFlow) Close() {
	for _, fd := range []*int{&k.down, &k.up} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// Why a flow does not go on after a crash.
var (
	// ErrGone is that it had ended before.
	ErrGone = errors.New("it has ended")
	// ErrOver is that one side of it has, and the other one got a reset.
	ErrOver = errors.New("one side of it has ended")
	// ErrLostBytes is that bytes of it were in the hands of the process that has ended.
	ErrLostBytes = errors.New("bytes of it were lost")
)

// Recall takes both sockets of a flow out of what moves its bytes in the kernel, and returns what was read
// from them meanwhile and is not yet written to the other one. With an error bytes may be lost. b says what
// is so when none are.
type Recall func(down, up int, b *Balance) (downRest, upRest []byte, err error)

// Take makes the flow, which nobody moves any more, one that [Adopt] takes: recall, which may be nil, ends
// that the kernel does. With an error it does not go on: its connections are reset, or left to deliver what
// they have. The copies stay k's.
func (k *KeptFlow) Take(recall Recall) (*Flow, error) {
	f := k.Flow
	f.Down.Rest, f.Up.Rest = nil, nil
	if err := k.isOver(); err != nil {
		return nil, err
	}
	var err error
	if recall != nil {
		if f.Down.Rest, f.Up.Rest, err = recall(k.down, k.up, f.Kept); err != nil {
			k.Reset()
			return nil, errors.Join(ErrLostBytes, err)
		}
	}
	for _, fd := range []int{k.down, k.up} { // a process may have ended in the middle of its recall
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1)
	}
	down, err := tcpsock.PositionOf(k.down)
	up, err2 := tcpsock.PositionOf(k.up)
	switch {
	case err != nil || err2 != nil:
		return nil, k.end()
	case !f.Kept.Holds(f, down, up):
		k.Reset()
		return nil, ErrLostBytes
	}
	if f.Down.Conn, err = connOf(k.down); err == nil {
		f.Up.Conn, err = connOf(k.up)
	}
	if err != nil {
		f.Close()
		k.Reset()
		return nil, err
	}
	f.IdleSince = time.Now()
	return f, nil
}

// isGone reports whether both connections are over.
func (k *KeptFlow) isGone() bool {
	for _, fd := range []int{k.down, k.up} {
		if _, err := tcpsock.PositionOf(fd); !errors.Is(err, unix.ENOTCONN) {
			return false
		}
	}
	return true
}

// isOver is an error where a side's connection is over. Then so is the flow.
func (k *KeptFlow) isOver() error {
	if _, err := tcpsock.PositionOf(k.down); err != nil {
		return k.end()
	}
	if _, err := tcpsock.PositionOf(k.up); err != nil {
		return k.end()
	}
	return nil
}

// end ends what a side is left where the other one is over. One whose streams have both ended goes on to
// deliver what it was given; else the end came too early, and must not look like a proper one.
func (k *KeptFlow) end() (why error) {
	why = ErrGone
	for _, fd := range []int{k.down, k.up} {
		if cut(fd) {
			why = ErrOver
		}
	}
	return why
}

// cut resets a connection, unless both its streams have ended: then it goes on to deliver what it was given.
func cut(fd int) (wasOpen bool) {
	p, err := tcpsock.PositionOf(fd)
	if err != nil || p.IsEnded && p.IsShut {
		return false
	}
	tcpsock.Abort(fd)
	return true
}

// Reset resets both connections, of which the queue has descriptors still.
func (k *KeptFlow) Reset() {
	tcpsock.Abort(k.down)
	tcpsock.Abort(k.up)
}

// connWait is how long descriptors are waited for that a flow needs to go on.
const connWait = 5 * time.Second

// connOf makes a connection of a copy of fd. Other flows that are taken may have descriptors for a moment
// only.
func connOf(fd int) (c net.Conn, err error) {
	for end := time.Now().Add(connWait); ; time.Sleep(10 * time.Millisecond) {
		c, err = tryConnOf(fd)
		if isShort := errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE); !isShort || time.Now().After(end) {
			return c, err
		}
	}
}

func tryConnOf(fd int) (net.Conn, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(own), "kept")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("it has a socket that is no TCP connection")
	}
	t.SetKeepAliveConfig(tcpsock.KeepAlive) // net.FileConn has set Go's
	return t, nil
}
