package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// atStep, which tests set, is called before and after each message to another process or to the service
// manager, and when one has come.
var atStep func(when, what string)

func step(when, what string) {
	if atStep != nil {
		atStep(when, what)
	}
}

// sendTimeout bounds how long a message waits for the other process to read those before it.
const sendTimeout = 5 * time.Second

// Link is one end of the connection between two processes. Its methods may be called from any goroutine, but
// for Receive, which is for one.
type Link struct{ c *net.UnixConn }

// newLink makes a Link of a file, which it closes.
func newLink(f *os.File) (*Link, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("it is no unix socket")
	}
	return &Link{u}, nil
}

// pair makes two ends. The caller closes both.
func pair() (*Link, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "handover")
	ours, err := newLink(os.NewFile(uintptr(fds[0]), "handover"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// Send sends m, with the descriptors of its sockets, which stay open here.
func (l *Link) Send(m Message) error {
	m.Version = Version
	b, err := m.encode()
	if err != nil {
		return err
	}
	if len(b) > mostBytes || len(m.Sockets) > mostFiles {
		return fmt.Errorf("message %q is too large: %d bytes, %d sockets", m.Step, len(b), len(m.Sockets))
	}
	var fds []int
	for _, s := range m.Sockets {
		sock := s.sock
		if sock == nil {
			sock = s.File
		}
		fd, err := descriptor(sock)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	l.c.SetWriteDeadline(time.Now().Add(sendTimeout))
	step("sends", m.Step)
	_, _, err = l.c.WriteMsgUnix(b, oob, nil)
	step("has sent", m.Step)
	for _, s := range m.Sockets {
		runtime.KeepAlive(s)
	}
	return err
}

// descriptor is that of sock, as it is: os.File.Fd may make it blocking, for all who have the socket.
func descriptor(sock syscall.Conn) (fd int, err error) {
	raw, err := sock.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = int(n) })
	}
	return fd, err
}

// SendSockets sends any number of sockets, and with them state, and how many flows live, which may come
// later. A process that knows of no more does without it; each part of it has a message for itself, which is
// sent whole or not at all. Where one can't be sent in time the rest of them are left out.
func (l *Link) SendSockets(all []Socket, state json.RawMessage, flows int, more ...json.RawMessage) error {
	for _, part := range more {
		if l.Send(Message{Step: State, State: part}) != nil {
			break // what else is wrong with the connection the sockets find, too
		}
	}
	for {
		n := min(len(all), mostFiles)
		// A long state has no room beside names.
		m := Message{Step: Sockets, Sockets: all[:n], More: n < len(all) || n > 0 && len(state) > mostBytes/2}
		if !m.More {
			m.State, m.Remains = state, &Remains{PID: os.Getpid(), Flows: flows}
		}
		if err := l.Send(m); err != nil {
			return err
		}
		if all = all[n:]; !m.More {
			return nil
		}
	}
}

// Receive returns the next message, whose files the caller closes; [io.EOF] if the other end is closed. A
// zero deadline is none.
func (l *Link) Receive(deadline time.Time) (*Message, error) {
	room := rooms.Get().(*receiveBuffer)
	defer rooms.Put(room)
	b, oob := room.b[:], room.oob[:]
	l.c.SetReadDeadline(deadline)
	n, oobn, flags, _, err := l.c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 && oobn == 0 {
		return nil, io.EOF
	}
	fds, err := receivedFDs(oob[:oobn])
	if err == nil && (n > mostBytes || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = errors.New("no message: it is too long")
	}
	var m *Message
	if err == nil {
		m, err = Parse(b[:n], len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	for i, fd := range fds {
		if s := &m.Sockets[i]; m.Step == FlowStep && (s.Kind == KindDown || s.Kind == KindUp) {
			s.conn = tcpsock.NewBare(fd)
		} else {
			s.File = os.NewFile(uintptr(fd), "handed over")
		}
	}
	step("has", m.Step)
	return m, nil
}

// receiveBuffer is room for a message and its descriptors.
type receiveBuffer struct {
	b   [mostBytes + 1]byte
	oob [4 * (253 + 16)]byte
}

// rooms are for messages that are received.
var rooms = sync.Pool{New: func() any { return new(receiveBuffer) }}

// receiveAny is Receive that goes on to the end of what the other process has sent: it reads on where that
// has ended with messages unread, or has sent what makes no sense. isOver: the connection is closed.
func (l *Link) receiveAny() (m *Message, isOver bool) {
	for {
		m, err := l.Receive(time.Time{})
		switch _, isSocket := errors.AsType[*net.OpError](err); {
		case err == nil:
			return m, false
		case errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed):
			return nil, true
		case isSocket && !errors.Is(err, unix.ECONNRESET):
			time.Sleep(time.Millisecond) // no memory
		}
	}
}

// Hear calls hear with each message until the other end is closed, and closes the files that hear has left in
// it. A message that can't be received, since there is no free descriptor for one, is left out.
func (l *Link) Hear(hear func(*Message)) {
	for {
		m, isOver := l.receiveAny()
		if isOver {
			return
		}
		hear(m)
		Close(m.Sockets)
	}
}

// receivedFDs are the descriptors of a control message.
func receivedFDs(oob []byte) (all []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for _, c := range messages {
		if c.Header.Level != unix.SOL_SOCKET || c.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, parseErr := unix.ParseUnixRights(&c)
		err = errors.Join(err, parseErr)
		all = append(all, fds...)
	}
	return all, err
}

// receiveSockets receives what SendSockets sends; last is its last message. The caller closes the sockets,
// with an error too.
func (l *Link) receiveSockets(deadline time.Time) (
	all []Socket, last *Message, more []json.RawMessage, err error,
) {
	for {
		m, err := l.Receive(deadline)
		if err != nil {
			return all, nil, nil, err
		}
		all = append(all, m.Sockets...)
		switch {
		case m.Step == Sockets && !m.More:
			return all, m, more, nil
		case m.Step == State && m.State != nil:
			more = append(more, m.State)
		}
	}
}

// unread is what the other end has not read yet, in bytes of the kernel's memory; 0: it is not known.
func (l *Link) unread() (n int) {
	if raw, err := l.c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	}
	return n
}

// awaitClose waits so long for the close of the other end, and reports whether it came. Messages stay unread.
func (l *Link) awaitClose(within time.Duration) (isClosed bool) {
	raw, err := l.c.SyscallConn()
	if err != nil {
		return true
	}
	end := time.Now().Add(within)
	err = raw.Control(func(fd uintptr) {
		for err := error(unix.EINTR); err == unix.EINTR; {
			var n int
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(max(time.Until(end), 0).Milliseconds()))
			isClosed = n > 0
		}
	})
	return isClosed || err != nil
}

// interrupt makes Receive return.
func (l *Link) interrupt() { l.c.SetReadDeadline(time.Unix(1, 0)) }

// File is a copy of the descriptor, to be handed on. The caller closes it.
func (l *Link) File() (*os.File, error) { return l.c.File() }

// Close closes this end.
func (l *Link) Close() error { return l.c.Close() }
