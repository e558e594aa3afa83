package relay_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/loop"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestRunConnecting: a flow whose upstream is still connecting begins when it is connected. Where that fails, or
// takes too long, downstream is left to the caller, with what was read of it.
func TestRunConnecting(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	closed := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(freeaddr.Get(t)))
	for _, c := range []struct {
		name   string
		to     net.Addr
		waits  bool // for an event
		failed error
	}{
		{"connected at once", ln.Addr(), false, nil},
		{"connected later", ln.Addr(), true, nil},
		{"refused", closed, true, unix.ECONNREFUSED},
		{"too late", ln.Addr(), true, context.DeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			loops, r := relaytest.Relay()
			client, down := loopSocket(t, loops)
			to := tcpsock.Sockaddr(c.to.(*net.TCPAddr).AddrPort())
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			unix.Connect(fd, to)
			failed, done, heads := make(chan error, 1), make(chan relay.Result, 1), []byte("head")
			r.RunConnecting(t.Context(), down, relay.Connecting{FD: fd, Connected: !c.waits, Within: 200 * time.Millisecond,
				Check: func() (bool, error) {
					if c.failed == context.DeadlineExceeded {
						return false, nil
					}
					if err := unix.Connect(fd, to); err != nil && err != unix.EISCONN {
						return false, err
					}
					return true, nil
				}, Failed: func(head []byte, err error) {
					if string(head) != "head" {
						t.Errorf("the caller gets %q back", head)
					}
					if err == nil {
						err = context.DeadlineExceeded
					}
					failed <- err
				}}, relay.Options{Head: heads, MeasureRTT: true}, func(r relay.Result) { done <- r })
			copy(heads, "gone") // it was written, or copied
			if c.failed != nil {
				if err := <-failed; !errors.Is(err, c.failed) {
					t.Errorf("it failed with %v, want %v", err, c.failed)
				}
				if _, err := unix.Write(down.FD(), []byte("x")); err != nil {
					t.Errorf("downstream is not as it was: %v", err)
				}
				down.Close()
				return
			}
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			client.Write([]byte(" and more"))
			client.(*net.TCPConn).CloseWrite()
			server.(*net.TCPConn).CloseWrite()
			if b, err := io.ReadAll(server); string(b) != "head and more" {
				t.Errorf("upstream gets %q, %v", b, err)
			}
			if r := <-done; r.End != relay.EndEOF || r.RTT[0] == 0 || r.RTT[1] == 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// loopSocket makes a connection, of which one end is on a loop.
func loopSocket(t *testing.T, loops *loop.Reactor) (net.Conn, *loop.Socket) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	there, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	raw, err := there.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := tcpsock.Dup(raw)
	if err != nil {
		t.Fatal(err)
	}
	return client, loops.Loop().NewSocket(fd)
}
