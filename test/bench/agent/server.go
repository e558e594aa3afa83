package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

// Server is the far end of all flows.
type Server struct {
	threads []*serving
}

// serving is one thread of a server.
type serving struct {
	*loop
	hello []byte
	cells map[uint32]*cell
}

// NewServer listens on addr with one socket a thread, and expects the hello at the beginning of each flow.
func NewServer(addr netip.AddrPort, hello []byte, threads int) (*Server, error) {
	s := &Server{}
	for range threads {
		l, err := newLoop()
		if err != nil {
			return nil, err
		}
		fd, err := listen(addr, threads > 1)
		if err != nil {
			return nil, err
		}
		t := &serving{loop: l, hello: hello, cells: map[uint32]*cell{}}
		s.threads = append(s.threads, t)
		l.do(func() {
			l.listener, l.accept, l.onEvent = fd, t.acceptAll, t.onEvent
			err = l.watch(fd, unix.EPOLLIN, unix.EPOLL_CTL_ADD)
		})
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

func listen(addr netip.AddrPort, share bool) (fd int, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if share {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}
		})
	}}
	lc.SetMultipathTCP(false)
	ln, err2 := lc.Listen(context.Background(), "tcp", addr.String())
	if err := errors.Join(err, err2); err != nil {
		return -1, err
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	// A descriptor of our own, which Go's poller knows nothing of.
	fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("dup: %w", err)
	}
	return fd, unix.SetNonblock(fd, true)
}

func (s *serving) acceptAll(listener int) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return // EAGAIN; or too many files: the client sees that its flow hangs
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		f := &flow{loop: s.loop, fd: fd, connected: true, cell: s.cell(0), intro: intro{expect: s.hello}}
		f.onCommand = s.begin
		if err := s.add(f, unix.EPOLLIN); err != nil {
			f.fail(err)
			continue
		}
		s.event(f, unix.EPOLLIN)
	}
}

// cell finds a cell; 0 is for flows that have not said yet which one they belong to.
func (s *serving) cell(id uint32) *cell {
	c := s.cells[id]
	if c == nil {
		c = &cell{}
		s.cells[id] = c
	}
	return c
}

// begin begins the flow that the client asks for.
func (s *serving) begin(f *flow) {
	f.rxPhase, f.txPhase = stream.Phases(f.cmd.Flow)
	f.cell = s.cell(f.cmd.Cell)
	f.cell.Flows++
	f.cell.warm, f.cell.duration = int64(f.cmd.Warm), int64(f.cmd.Duration)
	switch f.cmd.Op {
	case stream.Deaf:
		// As below, of what this side would receive.
		unix.SetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<10)
		f.pause(true)
	case stream.Source:
		f.allow = forever
		if f.cmd.Duration > 0 {
			f.until = now() + int64(f.cmd.Duration)
		} else {
			// The client is going to stop reading: what fills up is to be the proxy, and not this socket.
			unix.SetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10)
		}
	}
}

func (s *serving) onEvent(f *flow) {
	if f.eof && !f.shut {
		if f.cmd.Op == 0 {
			if f.got > 0 {
				f.fail(errors.New("ended before its command"))
			}
			f.loop.close(f, false)
			return
		}
		f.finish()
	}
	if f.eof && f.shut && !f.closed {
		f.cell.Done++
		f.cell.Received += f.rx
		f.loop.close(f, false)
	}
}

// Report is what this end saw of a cell so far, and of flows that never said which cell they belong to.
func (s *Server) Report(id uint32) Report {
	var cells []*cell
	held := int64(0)
	for _, t := range s.threads {
		t.do(func() {
			c, unknown := *t.cell(id), *t.cell(0)
			cells = append(cells, &c, &unknown)
			t.each(id, func(f *flow) { held += f.tx })
		})
	}
	r := merge(cells)
	r.Held = held
	return r
}

// Stop ends the streams of a cell's flows where they are; those that did not read do so from now on, until
// the client ends them.
func (s *Server) Stop(id uint32) {
	for _, t := range s.threads {
		t.do(func() {
			t.each(id, func(f *flow) {
				if f.cmd.Op == stream.Deaf {
					f.pause(false)
				} else {
					f.finish()
				}
			})
		})
	}
}

// Forget drops what is left of a cell, its flows by a reset.
func (s *Server) Forget(id uint32) {
	for _, t := range s.threads {
		t.do(func() {
			t.each(id, func(f *flow) { t.close(f, true) })
			delete(t.cells, id)
			delete(t.cells, 0)
		})
	}
}

func (s *serving) each(id uint32, do func(*flow)) {
	for _, f := range s.flows {
		if f != nil && f.cmd.Cell == id {
			do(f)
		}
	}
}
