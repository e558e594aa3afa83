package loop

import (
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// A Socket is a connected, or connecting, non-blocking socket that is on a loop and not in Go's poller: its
// callbacks come without a goroutine, on the loop.
type Socket struct {
	loop   *Loop
	id     uint64 // on the loop; 0: not there
	fd     int32
	events uint32 // that it is watched for

	handler   Handler
	wait      func(timedOut bool) // what is to be called once, or nil
	awaits    uint32              // the event that wait is for
	hasMissed bool                // other events came, and won't again unless they are asked for
	timer     *time.Timer         // of wait; nil with it
}

// A Handler takes the events of the socket that it is attached to.
type Handler interface {
	// Handle is told of events, as epoll(7) has them. It has the loop to itself, as with [Loop.Do].
	Handle(events uint32) (then func())
}

// The events of an attached socket. They come once each time that there is something new; an urgent byte has
// one of its own since a read stops before it.
const attached = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET

// NewSocket makes a Socket on l of fd, which is non-blocking and which it owns from then on.
func (l *Loop) NewSocket(fd int) *Socket { return &Socket{fd: int32(fd), loop: l} }

// FD is the descriptor.
func (s *Socket) FD() int { return int(s.fd) }

// Loop is where the socket is.
func (s *Socket) Loop() *Loop { return s.loop }

// Attach gives all further events of s to h: input, an end of the stream, an urgent byte, an error, each
// once. hasMissed says that events came while nobody waited for them. The caller has the loop to itself, and
// nobody may be waiting for s. After an error (no memory, or the loop has ended) s is as before.
func (s *Socket) Attach(h Handler) (hasMissed bool, err error) {
	hasMissed, s.hasMissed = s.hasMissed, false
	if err := s.loop.watch(s, attached); err != nil {
		return false, err
	}
	s.handler = h
	return hasMissed, nil
}

// Again makes the events of an attached socket that still hold come once more, behind those of other sockets.
// The caller has the loop to itself.
func (s *Socket) Again() error { return s.loop.control(unix.EPOLL_CTL_MOD, s, s.id, s.events) }

// Detach takes s off its loop. It stays open, and whoever watches it next is told anew what there is. The
// caller has the loop to itself.
func (s *Socket) Detach() {
	if s.id != 0 {
		s.loop.forget(s)
		unix.EpollCtl(s.loop.fd, unix.EPOLL_CTL_DEL, s.FD(), &unix.EpollEvent{})
	}
	s.hasMissed = false
}

// Discard is Close for a caller who has the loop to itself.
func (s *Socket) Discard() {
	s.loop.forget(s)
	unix.Close(s.FD())
}

// A Wait is how a socket waits for what can be read from it: bytes, an end of the stream or an error.
type Wait struct {
	Timeout time.Duration
	// Ready is called once, on the loop, when something can be read, or when Timeout has passed. It reads all
	// bytes that there are.
	Ready func(timedOut bool)
	// IsOver, if not nil, is set before [Socket.Expire] or [Socket.Cancel] by whoever can't know whether the
	// wait has begun. A wait that is over before it begins has timed out: Ready is called at once.
	IsOver *atomic.Bool
}

// AwaitBytes begins w. After an error (no memory, or the loop has ended) Ready is not called. Only one wait
// may be under way.
func (s *Socket) AwaitBytes(w Wait) error { return s.await(unix.EPOLLIN, w) }

// AwaitFirst begins w for a connection that has just been accepted, if w has Ready. If it can't, Ready is
// called at once.
func (s *Socket) AwaitFirst(w Wait) {
	if w.Ready != nil && s.AwaitBytes(w) != nil {
		w.Ready(false)
	}
}

// AwaitConnect is AwaitBytes for the moment when the connection is made or has failed.
func (s *Socket) AwaitConnect(timeout time.Duration, ready func(timedOut bool)) error {
	return s.await(unix.EPOLLOUT, Wait{Timeout: timeout, Ready: ready})
}

func (s *Socket) await(event uint32, w Wait) (err error) {
	s.loop.Do(func() (then func()) {
		if w.IsOver != nil && w.IsOver.Load() {
			return func() { w.Ready(true) }
		}
		err = s.beginWait(event, w)
		return nil
	})
	return err
}

// beginWait begins a wait. The caller has the loop to itself.
func (s *Socket) beginWait(event uint32, w Wait) error {
	l := s.loop
	s.wait, s.awaits = w.Ready, event
	var t *time.Timer // a new one for each wait: what waits for long, attached, has none
	t = time.AfterFunc(w.Timeout, func() { l.Do(func() func() { return s.timeOut(t) }) })
	s.timer = t
	// The events of an attached socket are asked for as well, so that Attach needs no system call.
	if err := l.watch(s, event|attached); err != nil {
		t.Stop()
		s.wait, s.timer = nil, nil
		return err
	}
	s.hasMissed = false
	return nil
}

// takeWait ends the wait, if there is one, and gives what is to be called for it. The caller has the loop to
// itself.
func (s *Socket) takeWait(timedOut bool) func() {
	ready := s.wait
	if ready == nil {
		return nil
	}
	s.timer.Stop()
	s.wait, s.timer = nil, nil
	return func() { ready(timedOut) }
}

// timeOut ends the wait of t, which has fired. That may be over: its event came at the same moment. The
// caller has the loop to itself.
func (s *Socket) timeOut(t *time.Timer) func() {
	if s.timer != t {
		return nil
	}
	return s.takeWait(true)
}

// Expire ends a wait, if there is one, as if the timeout had passed.
func (s *Socket) Expire() { s.loop.Do(func() func() { return s.takeWait(true) }) }

// Cancel ends a wait, if there is one, without a call. It is false where there was none.
func (s *Socket) Cancel() (waited bool) {
	s.loop.Do(func() func() {
		waited = s.takeWait(false) != nil
		return nil
	})
	return waited
}

// Reset closes the socket with a reset, as [tcpsock.Reset] does. Nobody may be waiting for it.
func (s *Socket) Reset() {
	s.loop.Do(func() func() {
		s.Detach() // or the reset would be an event of the loop
		tcpsock.Reset(s.FD())
		return nil
	})
}

// Close closes the socket. Nobody may be waiting for it.
func (s *Socket) Close() {
	s.loop.Do(func() func() {
		s.Discard()
		return nil
	})
}

// Conn makes a *net.TCPConn of s, which is then gone. With an error it is closed.
func (s *Socket) Conn() (*net.TCPConn, error) {
	s.loop.Do(func() func() {
		s.Detach()
		return nil
	})
	file := os.NewFile(uintptr(s.fd), "socket")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	tc, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("not a TCP socket: %T", c)
	}
	return tc, nil
}
