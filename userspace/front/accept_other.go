//go:build !linux

package front

import (
	"errors"
	"net"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// A door is a bound address, with a goroutine that accepts.
type door struct {
	ln   *net.TCPListener
	addr net.Addr
	run  func()
	done chan struct{} // closed when run has ended; nil before accept
}

func newDoor(ln *net.TCPListener) (*door, error) { return &door{ln: ln, addr: ln.Addr()}, nil }

// prepare makes accept possible.
func (d *door) prepare(f *Front, s *socket) error {
	d.run = func() {
		defer close(d.done)
		for {
			f.spare.refill()
			c, err := d.ln.AcceptTCP()
			switch {
			case err == nil:
				f.admit(s.owner.Load(), accepted{c}, addrPort(c.RemoteAddr()))
			case errors.Is(err, net.ErrClosed):
				return
			case !f.failed(s, err):
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	return nil
}

// accept begins to admit connections.
func (d *door) accept() {
	d.done = make(chan struct{})
	go d.run()
}

// Close ends that, and waits until nobody is being admitted.
func (d *door) Close() {
	d.ln.Close()
	if d.done != nil {
		<-d.done
	}
}

// refuseOne resets the connection that waits.
func (d *door) refuseOne() error {
	d.ln.SetDeadline(time.Now().Add(10 * time.Millisecond)) // it may be gone by now
	defer d.ln.SetDeadline(time.Time{})
	c, err := d.ln.AcceptTCP()
	if err == nil {
		tcpsock.ResetConn(c)
	}
	return err
}

func (d *door) sharePort(on bool) error {
	raw, err := d.ln.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { optErr = sharePort(fd, on) })
	return errors.Join(err, optErr)
}

// accepted is a connection that nobody reads from yet.
type accepted struct{ c *net.TCPConn }

func (a accepted) Conn() (*net.TCPConn, error) { return a.c, nil }
func (a accepted) Reset()                      { tcpsock.ResetConn(a.c) }

// cameByTailnet can't be told here.
func cameByTailnet(*net.TCPConn) bool { return true }
