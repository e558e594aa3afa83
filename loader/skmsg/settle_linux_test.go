package skmsg

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// cutShort makes a flow past TCP in which redirects from the process are cut short: downstream's send buffer
// is small, and nobody looks whether there is room, as when TCP is out of memory. Some bytes have gone by TCP
// before, and the kernel has redirected them; what goes by TCP afterwards is copied, behind those.
func cutShort(t *testing.T, r *sockmap.Hooks, network string) shortened {
	n := openLocal(t, r.Without(ruleLocalBound))
	ln, _ := cgroup.Listen(t, network)
	s := shortened{Path: loadertest.BecomeLocal(t, n, ln), n: n}
	s.at = onlyProcess(t, n)
	var err error
	s.down, err = descriptorOf(s.Client.RemoteAddr(), s.Client.LocalAddr())
	loadertest.Must(t, err)
	t.Cleanup(func() { unix.Close(s.down) })
	loadertest.Must(t, errors.Join(unix.SetsockoptInt(s.down, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10),
		s.Client.SetReadBuffer(16<<10)))
	s.base = s.written(t)
	s.at.Disable()
	loadertest.Must(t, loadertest.ExchangeBytes(s.Path, 1000, 1000))
	s.at.Enable()
	setLimit(t, n, 2*s.at.slot+1, 4096)
	end := time.Now().Add(60 * time.Second)
	loadertest.Must(t, errors.Join(s.Client.SetDeadline(end), s.Server.SetDeadline(end)))
	return s
}

// shortened is such a flow.
type shortened struct {
	*loadertest.Path
	n    *Local
	at   *process
	down int    // a descriptor of downstream's socket
	base uint64 // bytes that it had been given before
}

// written is how many bytes downstream's TCP was given.
func (s shortened) written(t *testing.T) uint64 {
	t.Helper()
	var i unix.TCPInfo
	loadertest.Must(t, tcpsock.Info(s.down, &i))
	n, err := unix.IoctlGetInt(s.down, unix.SIOCOUTQ)
	loadertest.Must(t, err)
	return i.Bytes_acked + uint64(n)
}

// lacks: downstream's TCP was given less than is counted.
func (s shortened) lacks(t *testing.T) bool {
	t.Helper()
	written := s.written(t)
	h := halfOf(t, s.n, 2*s.at.slot+1)
	return int64(written-s.base-h.Redirected-h.Consumed-s.at.Moved(1)) < 0
}

// descriptorOf gives a descriptor of the socket of this process that is connected so.
func descriptorOf(own, other net.Addr) (int, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1, err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err == nil && tcpsock.Local(fd).String() == own.String() && tcpsock.Remote(fd).String() == other.String() {
			return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		}
	}
	return -1, os.ErrNotExist
}

// What a process sends arrives whole, and goes past TCP again, after a redirect that was cut short, also
// while the client sends all the time.
func TestLocalCutShort(t *testing.T) {
	for _, network := range loadertest.Networks() {
		for _, settle := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s settle %v", network, settle), func(t *testing.T) {
				var r *sockmap.Hooks
				if !settle {
					r = r.Without(ruleLocalSettle)
				}
				p := cutShort(t, r, network)
				loadertest.Chatter(t, p.Path)
				data, sent := prove.Pattern(1<<20), make(chan error, 1)
				go func() {
					_, err := p.Server.Write(data)
					sent <- err
				}()
				loadertest.WaitFor(t, func() bool { return p.lacks(t) }, "a redirect to be cut short")
				if !settle {
					loadertest.Must(t, p.Client.SetReadDeadline(time.Now().Add(5*time.Second)))
				}
				err := prove.Expect(p.Client, data)
				if (err == nil) != settle {
					t.Fatal(err)
				}
				t.Log(err)
				if !settle {
					return
				}
				loadertest.Must(t, <-sent)
				loadertest.WaitFor(t, func() bool { return !p.lacks(t) }, "what was counted to be what was written")
				was := p.at.Moved(1)
				_, err = p.Server.Write([]byte("past"))
				loadertest.Must(t, errors.Join(err, prove.Expect(p.Client, []byte("past"))))
				if n := p.at.Moved(1) - was; n != 4 {
					t.Errorf("%d bytes of 4 went past TCP", n)
				}
			})
		}
	}
}

// A flow that begins with bytes that were counted before, as one does that was elsewhere: what did not reach
// downstream is taken from the count, and no more.
func TestLocalCutShortLater(t *testing.T) {
	p := cutShort(t, nil, "tcp4")
	_, err := p.at.query(skmsgLocalRequestLOCAL_BEGIN, 0) // behind 1000 bytes
	loadertest.Must(t, err)
	data, sent := prove.Pattern(1<<20), make(chan error, 1)
	go func() {
		_, err := p.Server.Write(data)
		sent <- err
	}()
	loadertest.WaitFor(t, func() bool { return p.lacks(t) }, "a redirect to be cut short")
	loadertest.Must(t, errors.Join(prove.Expect(p.Client, data), <-sent))
	loadertest.WaitFor(t, func() bool { return !p.lacks(t) }, "what was counted to be what was written")
	h := halfOf(t, p.n, 2*p.at.slot+1)
	if counted, n := h.Redirected+h.Consumed+p.at.Moved(1), p.written(t)-p.base; counted != n {
		t.Errorf("%d bytes are counted, and %d were written", counted, n)
	}
}

// A process that ends its stream after a redirect that was cut short: all that its send() took arrives, and
// the end.
func TestLocalCutShortAtTheEnd(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			p := cutShort(t, nil, network)
			data, took := prove.Pattern(1<<20), 0
			raw, err := p.Server.SyscallConn()
			loadertest.Must(t, err)
			loadertest.Must(t, raw.Control(func(fd uintptr) {
				took, err = unix.SendmsgN(int(fd), data, nil, nil, unix.MSG_DONTWAIT)
			}))
			loadertest.Must(t, err)
			if took == len(data) {
				t.Fatal("all was taken: this test proves nothing")
			}
			loadertest.Must(t, p.Server.CloseWrite())
			loadertest.Must(t, prove.Expect(p.Client, data[:took]))
			if n, err := p.Client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("the end arrived as %d bytes and %v", n, err)
			}
		})
	}
}

// A redirect that waits for room is not cut short: what it has not written yet still counts.
func TestLocalRedirectWaits(t *testing.T) {
	p := cutShort(t, nil, "tcp4")
	file, err := p.Server.File()
	loadertest.Must(t, err)
	defer file.Close()
	loadertest.Must(t, unix.SetNonblock(int(file.Fd()), false)) // also of p.server
	data, sent := prove.Pattern(1<<20), make(chan error, 1)
	go func() {
		_, err := unix.Write(int(file.Fd()), data)
		sent <- err
	}()
	loadertest.WaitFor(t, func() bool { return p.lacks(t) }, "a redirect to wait")
	h := halfOf(t, p.n, 2*p.at.slot+1)
	answer, err := p.at.query(skmsgLocalRequestLOCAL_SETTLE, uint32(h.Redirected+h.Consumed))
	if loadertest.Must(t, err); answer&skmsgLocalAnswerLOCAL_SETTLED != 0 || !p.lacks(t) {
		t.Error("what waits was taken for what failed")
	}
	loadertest.Must(t, prove.Expect(p.Client, data))
	loadertest.Must(t, <-sent)
}

// While TCP is short of memory, nothing goes past it.
func TestLocalShortOfMemory(t *testing.T) {
	for _, network := range loadertest.Networks() {
		r := &sockmap.Hooks{Pressure: 1 << 63} // less than any number of pages
		n := openLocal(t, r)
		ln, _ := cgroup.Listen(t, network)
		p := loadertest.BecomeLocal(t, n, ln)
		loadertest.Must(t, loadertest.ExchangeBytes(p, 1<<20, 1<<20))
		at := onlyProcess(t, n)
		for side := range uint32(2) {
			if h := halfOf(t, n, 2*at.slot+side); at.Moved(side) != 0 || h.Passed+h.Redirected != 1<<20 {
				t.Errorf("%s, direction %d: %+v, and %d past TCP", network, side, h, at.Moved(side))
			}
		}
	}
}
