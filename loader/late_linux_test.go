package loader

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/cgroup"
)

// What a side sent before its reset arrives, though it waits in the kernel's queue behind bytes that go the
// other way, which nobody takes any more. The worker that empties the queue runs on this thread's processor,
// and gets none of its time before the reset is there.
func TestResetBehindOtherWay(t *testing.T) {
	for _, late := range []bool{true, false} {
		var r *hooks
		if !late {
			r = r.without(ruleLate)
		}
		l := open(t, r, 16)
		for _, network := range networks() {
			for name, way := range ways {
				when := map[bool]string{true: "late", false: "at once"}[late]
				ok := t.Run(name+" "+network+" "+when, func(t *testing.T) {
					const limit = 16 << 10
					try := func() (p *path, to *net.TCPConn, err error) {
						p = splicePath(t, l, pathOptions{network: network, buffer: limit})
						must(t, exchangeBytes(p, 1000, 1000))
						from, to := way(p)
						burst, other := pattern(limit/2), pattern(limit/2)
						must(t, from.SetLinger(0))
						alone(t, func() {
							for range 3 { // two are redirected, and the third one is passed
								writeRaw(t, to, other)
							}
							writeRaw(t, from, burst)
							from.Close()
						})
						must(t, to.SetReadDeadline(time.Now().Add(patience)))
						return p, to, expect(to, burst)
					}
					if !late {
						for range 10 { // a virtual machine's processor may stop, and others run meanwhile
							if _, _, err := try(); err != nil {
								return
							}
						}
						t.Error("the bytes arrive without the rule: this test proves nothing")
						return
					}
					p, to, err := try()
					must(t, err)
					if n, err := to.Read(make([]byte, 1)); n != 0 ||
						err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("instead of a reset: %d bytes, %v", n, err)
					}
					want := map[string]string{"up": endDownstreamReset, "down": endUpstreamReset}[name]
					if end := p.wait(patience); end.end != want {
						t.Errorf("ended %+v, want %s", end, want)
					}
				})
				if !ok {
					return
				}
			}
		}
	}
}

// The same of a flow past TCP, in which some bytes have gone that way and the others go by TCP.
func TestLocalResetBehindOtherWay(t *testing.T) {
	for _, network := range networks() {
		t.Run(network, func(t *testing.T) {
			const limit = 16 << 10
			n := openLocal(t, nil)
			ln, _ := cgroup.Listen(t, network)
			p := becomeLocal(t, n, ln)
			must(t, exchangeBytes(p, 1000, 4*limit))
			f := n.l.onlyFlow(t)
			if f.process.moved(1) <= limit {
				t.Fatal("few bytes of the process went past TCP: this test proves nothing")
			}
			// What the process sends goes by TCP.
			must(t, errors.Join(n.objects.LocalPlaces.Delete(f.process.cookie), p.client.SetLinger(0)))
			for i := range f.directions {
				atomic.StoreUint32(&f.directions[i].shared().Limit, limit)
			}
			alone(t, func() {
				for range 3 {
					writeRaw(t, p.server, pattern(limit/2))
				}
				writeRaw(t, p.client, pattern(limit/2))
				p.client.Close()
			})
			must(t, errors.Join(p.server.SetReadDeadline(time.Now().Add(patience)),
				expect(p.server, pattern(limit/2))))
			if n, err := p.server.Read(make([]byte, 1)); n != 0 ||
				err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("instead of a reset: %d bytes, %v", n, err)
			}
		})
	}
}

// alone runs f on one processor, where nothing else that is not as urgent runs meanwhile.
func alone(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread() // a thread with which this ends early ends, too
	const normal, fifo = unix.SCHED_NORMAL, unix.SCHED_FIFO
	policy := func(p, priority uint32) error {
		return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: p, Priority: priority}, 0)
	}
	if err := policy(fifo, 1); errors.Is(err, unix.EPERM) {
		lacks(t, "the right to run with SCHED_FIFO: CAP_SYS_NICE or `ulimit -r 1`, and real time for its cgroup "+
			"where the kernel divides that among them (cgroup v1's cpu.rt_runtime_us)")
	} else {
		must(t, err)
	}
	var one, was unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &was))
	for i := range 1024 {
		if was.IsSet(i) {
			one.Set(i)
			break
		}
	}
	must(t, unix.SchedSetaffinity(0, &one))
	f()
	must(t, errors.Join(policy(normal, 0), unix.SchedSetaffinity(0, &was)))
	runtime.UnlockOSThread()
}

// lacks skips a test that can't be made here, or fails it where all has to be.
func lacks(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal("needs " + what)
	}
	t.Skip("needs " + what)
}

// writeRaw writes without Go's poller.
func writeRaw(t *testing.T, c *net.TCPConn, b []byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	n := 0
	must(t, errors.Join(raw.Control(func(fd uintptr) { n, err = unix.Write(int(fd), b) }), err))
	if n != len(b) {
		t.Fatalf("%d bytes of %d were taken", n, len(b))
	}
}
