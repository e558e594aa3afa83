package skmsg

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A process whose socket goes past TCP is not left to wait for sends with MSG_ZEROCOPY that never complete:
// it is told that there are none, or its socket is left to TCP.
func TestLocalZeroCopy(t *testing.T) {
	for _, network := range loadertest.Networks() {
		t.Run(network, func(t *testing.T) {
			n := openLocal(t, nil)
			ln, _ := cgroup.Listen(t, network)
			p := loadertest.BecomeLocal(t, n, ln)
			control(t, p.Server, func(fd int) {
				if err := zeroCopy(fd); err != unix.EOPNOTSUPP {
					t.Errorf("SO_ZEROCOPY gives %v", err)
					completes(t, fd)
				}
				// Other options are set as ever, however long they are.
				loadertest.Must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1))
				long := string(append(binary.NativeEndian.AppendUint32(nil, 7), make([]byte, 8192)...))
				loadertest.Must(t, unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_MARK, long))
				mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
				if mark != 7 || err != nil {
					t.Errorf("a mark of 7 is %d, %v", mark, err)
				}
			})
			loadertest.Must(t, loadertest.ExchangeBytes(p, 1000, 1000))
		})
		t.Run(network+", as the listener's", func(t *testing.T) {
			n := openLocal(t, nil)
			ln, _ := cgroup.Listen(t, network)
			control(t, ln.(*net.TCPListener), func(fd int) { loadertest.Must(t, zeroCopy(fd)) })
			var server *net.TCPConn
			for end := time.Now().Add(loadertest.Patience); ; time.Sleep(time.Millisecond) {
				up, err := net.Dial(network, ln.Addr().String())
				loadertest.Must(t, err)
				s, err := ln.Accept()
				loadertest.Must(t, err)
				client, down := loadertest.Connect(t, network)
				t.Cleanup(func() { client.Close(); down.Close(); up.Close(); s.Close() })
				server = s.(*net.TCPConn)
				o := sockmap.Flow{Ended: func(int64, int64, string, error) {}}
				_, err = loadertest.Splice(context.Background(), n, down, up.(*net.TCPConn), o)
				if errors.Is(err, refusedZeroCopy) {
					break
				}
				if err == nil || time.Now().After(end) {
					t.Errorf("it is spliced: %v", err)
					break
				}
			}
			control(t, server, func(fd int) { completes(t, fd) })
		})
	}
}

func zeroCopy(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1) }

func control(t *testing.T, c interface {
	SyscallConn() (syscall.RawConn, error)
}, f func(fd int)) {
	t.Helper()
	raw, err := c.SyscallConn()
	loadertest.Must(t, err)
	loadertest.Must(t, raw.Control(func(fd uintptr) { f(int(fd)) }))
}

// completes sends with MSG_ZEROCOPY, and expects the kernel to say that it has been sent.
func completes(t *testing.T, fd int) {
	t.Helper()
	loadertest.Must(t, unix.Sendto(fd, prove.Pattern(4000), unix.MSG_ZEROCOPY, nil))
	p := []unix.PollFd{{Fd: int32(fd)}} // for POLLERR
	for end := time.Now().Add(10 * time.Second); p[0].Revents&unix.POLLERR == 0; {
		if _, err := unix.Poll(p, 1000); err != nil && err != unix.EINTR || time.Now().After(end) {
			t.Errorf("a send with MSG_ZEROCOPY does not complete: %v", err)
			return
		}
	}
	oob := make([]byte, 200)
	if _, n, _, _, err := unix.Recvmsg(fd, nil, oob, unix.MSG_ERRQUEUE); err != nil || n == 0 {
		t.Errorf("nothing in the queue of errors: %v", err)
	}
}
