package relay

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// A Socket is a connected, or connecting, non-blocking socket that is in a loop of this package and not in
// Go's poller: its callbacks come without a goroutine, on the loop, and must not block.
type Socket struct {
	fd     int
	loop   *loop
	id     uint64 // in the loop; 0: not there
	events uint32 // that it is watched for

	side   *side               // of the flow that is relayed by the loop, or nil
	wait   func(timedOut bool) // who waits, or nil
	awaits uint32              // the event that it waits for
	more   bool                // other events came, and won't again
	timer  *time.Timer         // until it has waited long enough
}

// NewSocket makes a Socket of fd, which is non-blocking and which it owns from then on, to be relayed with
// near.
func NewSocket(fd int, near *Socket) *Socket { return &Socket{fd: fd, loop: near.loop} }

// FD is the descriptor.
func (s *Socket) FD() int { return s.fd }

// AwaitBytes calls ready once when there are bytes, an end of the stream or an error to be read, or when
// timeout has passed. ready reads all bytes that there are.
func (s *Socket) AwaitBytes(timeout time.Duration, ready func(timedOut bool)) error {
	return s.await(unix.EPOLLIN, timeout, ready)
}

// AwaitConnect calls ready once when the connection is made or has failed, or when timeout has passed.
func (s *Socket) AwaitConnect(timeout time.Duration, ready func(timedOut bool)) error {
	return s.await(unix.EPOLLOUT, timeout, ready)
}

func (s *Socket) await(event uint32, timeout time.Duration, ready func(timedOut bool)) error {
	l := s.loop
	l.mu.Lock()
	defer l.mu.Unlock()
	s.wait, s.awaits = ready, event
	if s.timer == nil {
		s.timer = time.AfterFunc(timeout, s.Expire)
	} else {
		s.timer.Reset(timeout)
	}
	// For the events of a flow too, so that it need not be changed for one.
	if err := l.watch(s, event|onFlow); err != nil {
		s.timer.Stop()
		s.wait = nil
		return err
	}
	return nil
}

// takeWait is called with loop.mu held.
func (s *Socket) takeWait(timedOut bool) func() {
	ready := s.wait
	if ready == nil {
		return nil
	}
	s.wait = nil
	s.timer.Stop()
	return func() { ready(timedOut) }
}

// Expire makes who waits, if anybody does, go on as if the timeout had passed.
func (s *Socket) Expire() {
	s.loop.mu.Lock()
	ready := s.takeWait(true)
	s.loop.mu.Unlock()
	if ready != nil {
		ready()
	}
}

// Cancel makes who waits, if anybody does, wait no more, without a call. It is false where nobody waited.
func (s *Socket) Cancel() bool {
	s.loop.mu.Lock()
	defer s.loop.mu.Unlock()
	return s.takeWait(false) != nil
}

// Reset closes the socket so that the other end sees a reset. Nobody may be waiting for it.
func (s *Socket) Reset() {
	tcpsock.ResetFDOnClose(s.fd)
	s.Close()
}

// Close closes the socket. Nobody may be waiting for it.
func (s *Socket) Close() {
	s.loop.mu.Lock()
	defer s.loop.mu.Unlock()
	if s.id != 0 {
		s.loop.forget(s)
	}
	unix.Close(s.fd)
}

// Conn makes a *net.TCPConn of s, which is then gone. With an error it is closed.
func (s *Socket) Conn() (*net.TCPConn, error) {
	s.leave()
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

// leave takes s out of its loop. What happens to it is told anew to who watches it next.
func (s *Socket) leave() {
	s.loop.mu.Lock()
	defer s.loop.mu.Unlock()
	if s.id != 0 {
		s.loop.remove(s)
	}
	s.more = false
}
