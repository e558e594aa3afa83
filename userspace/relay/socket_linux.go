package relay

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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
	unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
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

// RunSockets is [Run] for two sockets of one loop that are connected, and that nobody waits for. It has
// written Head, or copied it, when it returns.
func RunSockets(ctx context.Context, down, up *Socket, o Options, done func(Result)) {
	f := newFlow(ctx, nil, nil, o, done)
	if len(o.Datapaths) > 0 && f.offerSockets(down, up) {
		return
	}
	f.relayOn(down, up)
}

// offerSockets offers the flow to the kernel datapaths, and reports whether one of them, or somebody else,
// has it.
func (f *flow) offerSockets(down, up *Socket) bool {
	simple := true
	for _, d := range f.o.Datapaths {
		if _, ok := d.(Sockets); !ok {
			simple = false
		}
	}
	if !simple || f.writeFirst(up.fd) != nil {
		o := f.o
		o.Head, o.Counters = bytes.Clone(o.Head), f.counters
		go runConns(f.ctx, down, up, o, f.done)
		return true
	}
	for _, s := range []*Socket{down, up} {
		s.leave()
	}
	for _, d := range f.o.Datapaths {
		count, err := d.(Sockets).SpliceSockets(f.ctx, down.fd, up.fd, f.told(d))
		if f.offered(d, count, err) {
			return true
		}
	}
	return false
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

// runConns is [Run] for sockets that leave their loop.
func runConns(ctx context.Context, down, up *Socket, o Options, done func(Result)) {
	d, err := down.Conn()
	if err != nil {
		up.Close()
		done(Result{End: EndError, Err: err, Datapath: userspace})
		return
	}
	u, err := up.Conn()
	if err != nil {
		d.Close()
		done(Result{End: EndError, Err: err, Datapath: userspace})
		return
	}
	Run(ctx, d, u, o, done)
}

// quicken gives f to a loop, if that can have it.
func (f *flow) quicken() bool {
	if !f.down.bare || !f.up.bare || !f.disarm() {
		return false
	}
	downFD, upFD := dup(f.down.sock), dup(f.up.sock)
	var down, up *Socket
	if downFD >= 0 && upFD >= 0 {
		if l := pickLoop(); l != nil {
			down = &Socket{fd: downFD, loop: l}
			up = NewSocket(upFD, down)
		}
	}
	if up == nil {
		for _, fd := range []int{downFD, upFD} {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		f.arm()
		return false
	}
	if !f.isTCP() {
		f.o.WhenTalking = nil
	}
	f.down.conn.Close() // out of Go's poller, which would wake for each message
	f.up.conn.Close()
	f.relayOn(down, up)
	return true
}

// dup is another descriptor of a socket, or negative.
func dup(sock syscall.RawConn) (fd int) {
	fd = -1
	sock.Control(func(old uintptr) {
		if n, err := unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			fd = n
		}
	})
	return fd
}

// relayOn begins f on the loop of its sockets.
func (f *flow) relayOn(down, up *Socket) {
	l := down.loop
	l.mu.Lock()
	f.down = side{flow: f, socket: down}
	f.up = side{flow: f, socket: up}
	down.side, up.side = &f.down, &f.up
	f.armOn(l)
	then := l.begin(f)
	l.mu.Unlock()
	if then != nil {
		then()
	}
}

// begin writes what comes first and watches both sockets. It is called with l.mu held.
func (l *loop) begin(f *flow) (then func()) {
	for _, s := range f.sides() {
		if err := l.watch(s.socket, onFlow); err != nil {
			return l.leave(f, f.resume) // no memory
		}
	}
	if err := f.writeFirst(f.up.socket.fd); err == unix.EAGAIN {
		return l.leave(f, f.resume) // where the rest is written
	} else if err != nil {
		return l.leave(f, func() { f.resumeBroken(&f.up, &sideError{"write to", f.up.name(), err}) })
	}
	for _, s := range f.sides() {
		if s.socket.more {
			s.socket.more = false
			if then := l.pass(s, true); then != nil {
				return then
			}
		}
	}
	return nil
}

// writeFirst writes what comes first to upstream. With an error some of it may be left.
func (f *flow) writeFirst(up int) error {
	for len(f.o.Preface)+len(f.o.Head) > 0 {
		n, err := noEINTR(func() (int, error) { return unix.Writev(up, [][]byte{f.o.Preface, f.o.Head}) })
		if err != nil {
			return err
		}
		p := min(n, len(f.o.Preface))
		f.o.Preface, f.o.Head = f.o.Preface[p:], f.o.Head[n-p:]
		f.counters.up.Add(int64(n - p))
	}
	f.o.Preface, f.o.Head = nil, nil
	return nil
}

// armOn makes ctx and idleness end the flow while it is on l. It is called with l.mu held.
func (f *flow) armOn(l *loop) {
	if f.ctx.Done() != nil {
		f.uncancel = context.AfterFunc(f.ctx, func() { l.cut(f, EndCanceled, context.Cause(f.ctx)) })
	}
	if f.o.Idle > 0 {
		f.seen, f.since = -1, time.Now()
		f.tick = time.AfterFunc(f.o.Idle/4, func() { l.look(f) })
	}
}

// look sees whether bytes have moved since the last time.
func (l *loop) look(f *flow) {
	up, down := f.counters.Load()
	now := time.Now()
	l.mu.Lock()
	if f.down.socket == nil {
		l.mu.Unlock()
		return
	}
	if up+down != f.seen {
		f.seen, f.since = up+down, now
	}
	quiet := now.Sub(f.since)
	if quiet < f.o.Idle {
		f.tick.Reset(min(f.o.Idle/4, f.o.Idle-quiet))
		l.mu.Unlock()
		return
	}
	l.mu.Unlock()
	l.cut(f, EndIdle, fmt.Errorf("no byte for %v", f.o.Idle))
}

// A sockConn is a socket that was on a loop, now in Go's poller.
type sockConn struct{ *os.File }

func (c sockConn) LocalAddr() net.Addr  { return nil }
func (c sockConn) RemoteAddr() net.Addr { return nil }

func (c sockConn) control(do func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

func (c sockConn) CloseWrite() error {
	return c.control(func(fd int) error {
		return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_WR))
	})
}

func (c sockConn) SetLinger(seconds int) error {
	return c.control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER,
			&unix.Linger{Onoff: 1, Linger: int32(seconds)})
	})
}
