package skmsg

import (
	"errors"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/loader/sockmap"
	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

// A flow that is refused in the last step of all leaves nothing behind, and its sockets go on in userspace.
func TestLocalRefusalIsUndone(t *testing.T) {
	n := openLocal(t, nil)
	_, stranger := loadertest.Connect(t, "tcp4")
	for range 40 { // more often than there are slots
		client, down := loadertest.Connect(t, "tcp4")
		up, server := loadertest.Connect(t, "tcp4")
		loadertest.Must(t, down.SetNoDelay(false))
		at, err := n.insert(stranger)
		loadertest.Must(t, err)
		var downFD, upFD int
		tcpsock.Control(down, func(fd int) { downFD = fd })
		tcpsock.Control(up, func(fd int) { upFD = fd })
		loadertest.WaitFor(t, func() bool { // a slot comes back after a grace period
			_, err = n.l.SpliceBy(t.Context(), downFD, upFD, sockmap.Flow{Buffer: 1 << 20}, at)
			if errors.Is(err, refusedNotCaptured) {
				at, err = n.insert(stranger)
				loadertest.Must(t, err)
			}
			return errors.Is(err, refusedPair)
		}, "the flow to be refused for its pair")
		if v, err := unix.GetsockoptInt(downFD, unix.IPPROTO_TCP, unix.TCP_NODELAY); v != 0 || err != nil {
			t.Fatalf("TCP_NODELAY is %d, %v", v, err)
		}
		for _, fd := range []int{downFD, upFD} {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != unix.ENOENT {
				t.Fatalf("a filter is attached: %v", err)
			}
		}
		for _, name := range []string{"flows", "places"} {
			if key, err := n.l.Shared()[name].NextKeyBytes(nil); key != nil || err != nil {
				t.Fatalf("%s: %v, %v", name, key, err)
			}
		}
		go io.Copy(up, down)
		_, err = client.Write([]byte("hello"))
		loadertest.Must(t, errors.Join(err, prove.Expect(server, []byte("hello"))))
		for _, c := range []*net.TCPConn{client, server, down, up} {
			c.Close()
		}
	}
}

// A flow whose process was found, and that is refused then, holds the process's cgroup no longer.
func TestLocalRefusalLeavesGroup(t *testing.T) {
	n := openLocal(t, nil)
	ln, dir := cgroup.Listen(t, "tcp4")
	loadertest.BecomeLocal(t, n, ln)
	flows := func() int {
		n.targets.mu.Lock()
		defer n.targets.mu.Unlock()
		return n.targets.groups[dir].flows
	}
	if got := flows(); got != 1 {
		t.Fatalf("%d flows", got)
	}
	client, down := loadertest.Connect(t, "tcp4")
	defer down.Close()
	up, err := net.Dial("tcp4", ln.Addr().String())
	loadertest.Must(t, err)
	defer up.Close()
	server, err := ln.Accept()
	loadertest.Must(t, err)
	defer server.Close()
	loadertest.Must(t, client.Close())
	tcpsock.Control(down, func(fd int) {
		loadertest.WaitFor(t, func() bool { return !tcpsock.IsEstablished(fd) }, "the end of the stream")
	})
	_, err = loadertest.Splice(t.Context(), n, down, up.(*net.TCPConn), sockmap.Flow{Buffer: 1 << 20})
	if !errors.Is(err, sockmap.RefusedState) {
		t.Errorf("refused: %v", err)
	}
	if got := flows(); got != 1 {
		t.Errorf("%d flows after one was refused", got)
	}
}
