package loader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/cgroup"
)

// cutShort makes a flow past TCP in which redirects from the process are cut short: downstream's send buffer
// is small, and nobody looks whether there is room, as when TCP is out of memory. Some bytes have gone by TCP
// before, and the kernel has redirected them; what goes by TCP afterwards is copied, behind those.
func cutShort(t *testing.T, r *hooks, network string) (*path, *flow) {
	r = r.without(ruleLocalBound)
	n := openLocal(t, r)
	ln, _ := cgroup.Listen(t, network)
	p := becomeLocal(t, n, ln)
	f := n.l.onlyFlow(t)
	must(t, errors.Join(unix.SetsockoptInt(int(f.sockets[0]), unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10),
		p.client.SetReadBuffer(16<<10)))
	f.process.disable()
	must(t, exchangeBytes(p, 1000, 1000))
	f.process.enable()
	atomic.StoreUint32(&f.directions[1].shared().Limit, 4096)
	end := time.Now().Add(60 * time.Second)
	must(t, errors.Join(p.client.SetDeadline(end), p.server.SetDeadline(end)))
	return p, f
}

// chatter sends what the process reads, all the time, so that the flow moves.
func chatter(t *testing.T, p *path) {
	stop, done := make(chan struct{}), sync.WaitGroup{}
	done.Go(func() { io.Copy(io.Discard, p.server) })
	done.Go(func() {
		for tick := time.NewTicker(sweepEvery / 20); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
				if _, err := p.client.Write([]byte("x")); err != nil {
					return
				}
			}
		}
	})
	t.Cleanup(func() { close(stop); p.client.Close(); p.server.Close(); done.Wait() })
}

// What a process sends arrives whole, and goes past TCP again, after a redirect that was cut short, also
// while the client sends all the time.
func TestLocalCutShort(t *testing.T) {
	for _, network := range networks() {
		for _, settle := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s settle %v", network, settle), func(t *testing.T) {
				var r *hooks
				if !settle {
					r = r.without(ruleLocalSettle)
				}
				p, f := cutShort(t, r, network)
				chatter(t, p)
				data, sent := pattern(1<<20), make(chan error, 1)
				go func() {
					_, err := p.server.Write(data)
					sent <- err
				}()
				waitFor(t, func() bool { return f.lacks(t) }, "a redirect to be cut short")
				if !settle {
					must(t, p.client.SetReadDeadline(time.Now().Add(5*sweepEvery)))
				}
				err := expect(p.client, data)
				if (err == nil) != settle {
					t.Fatal(err)
				}
				t.Log(err)
				if !settle {
					return
				}
				must(t, <-sent)
				waitFor(t, func() bool { return !f.lacks(t) }, "what was counted to be what was written")
				was := f.process.moved(1)
				_, err = p.server.Write([]byte("past"))
				must(t, errors.Join(err, expect(p.client, []byte("past"))))
				if n := f.process.moved(1) - was; n != 4 {
					t.Errorf("%d bytes of 4 went past TCP", n)
				}
			})
		}
	}
}

// lacks: downstream's TCP was given less than is counted.
func (f *flow) lacks(t *testing.T) bool {
	t.Helper()
	d := &f.directions[1]
	n, err := d.peer().written()
	must(t, err)
	return int64(n-d.written0-d.byTCP()) < 0
}

// A process that ends its stream after a redirect that was cut short: all that its send() took arrives, and
// the end.
func TestLocalCutShortAtTheEnd(t *testing.T) {
	for _, network := range networks() {
		t.Run(network, func(t *testing.T) {
			p, _ := cutShort(t, nil, network)
			data, took := pattern(1<<20), 0
			raw, err := p.server.SyscallConn()
			must(t, err)
			must(t, raw.Control(func(fd uintptr) {
				took, err = unix.SendmsgN(int(fd), data, nil, nil, unix.MSG_DONTWAIT)
			}))
			must(t, err)
			if took == len(data) {
				t.Fatal("all was taken: this test proves nothing")
			}
			must(t, p.server.CloseWrite())
			must(t, expect(p.client, data[:took]))
			if n, err := p.client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("the end arrived as %d bytes and %v", n, err)
			}
		})
	}
}

// A redirect that waits for room is not cut short: what it has not written yet still counts.
func TestLocalRedirectWaits(t *testing.T) {
	p, f := cutShort(t, nil, "tcp4")
	file, err := p.server.File()
	must(t, err)
	defer file.Close()
	must(t, unix.SetNonblock(int(file.Fd()), false)) // also of p.server
	data, sent := pattern(1<<20), make(chan error, 1)
	go func() {
		_, err := unix.Write(int(file.Fd()), data)
		sent <- err
	}()
	waitFor(t, func() bool { return f.lacks(t) }, "a redirect to wait")
	m := f.directions[1].shared()
	byTCP := load64(&m.Redirected) + load64(&m.Consumed)
	answer, err := f.process.query(skmsgLocalRequestLOCAL_SETTLE, uint32(byTCP))
	if must(t, err); answer&skmsgLocalAnswerLOCAL_SETTLED != 0 || !f.lacks(t) {
		t.Error("what waits was taken for what failed")
	}
	must(t, expect(p.client, data))
	must(t, <-sent)
}

// While TCP is short of memory, nothing goes past it.
func TestLocalShortOfMemory(t *testing.T) {
	for _, network := range networks() {
		r := &hooks{pressure: 1 << 63} // less than any number of pages
		n := openLocal(t, r)
		ln, _ := cgroup.Listen(t, network)
		p := becomeLocal(t, n, ln)
		must(t, exchangeBytes(p, 1<<20, 1<<20))
		f := n.l.onlyFlow(t)
		for i := range f.directions {
			if s := f.directions[i].snapshot(); s.local != 0 || s.passed+s.redirected != 1<<20 {
				t.Errorf("%s, direction %d: %+v", network, i, s)
			}
		}
	}
}

// A direction that has stalled is found while the other one moves.
func TestStallWhileTheOtherWayMoves(t *testing.T) {
	for _, network := range networks() {
		r := new(hooks).without(ruleKick)
		l := open(t, r, 16)
		p := splicePath(t, l, pathOptions{network: network, before: func(client, _, down, _ *net.TCPConn) {
			client.Write([]byte("hello"))
			raw, err := down.SyscallConn()
			must(t, err)
			must(t, raw.Read(func(fd uintptr) bool {
				_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
				return err == nil
			}))
		}})
		back := *p
		back.client, back.server = p.server, p.client
		chatter(t, &back)
		must(t, p.server.SetReadDeadline(time.Now().Add(20*time.Second)))
		must(t, expect(p.server, []byte("hello")))
		wantStalls(t, l)
	}
}
