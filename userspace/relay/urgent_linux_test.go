package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestUrgent: an urgent byte arrives in its place, as does each byte before it and behind it, whichever way the
// relay is given the sockets: alone, and behind a lot that waits since the reader has stopped.
func TestUrgent(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		plain := relaytest.Loopback{Down: network, Up: network}
		layered := relaytest.Loopback{Down: network, Up: network, WrapDown: wrap, WrapUp: wrap}
		for _, given := range []struct {
			name  string
			path  relaytest.Loopback
			start func(*testing.T, *relaytest.Flow)
		}{
			{"connections", plain, startConns},
			{"layers", layered, startConns},
			{"sockets of a loop", plain, startSockets},
		} {
			t.Run(network+", "+given.name, func(t *testing.T) {
				p := given.path.Path(t)
				for _, before := range []int{10, 1 << 20} {
					for _, role := range []string{"client", "server"} {
						f := p.Connect(t)
						defer f.Client.Close()
						defer f.Server.Close()
						from, to := f.Client, f.Server
						if role == "server" {
							from, to = to, from
						}
						for _, c := range []net.Conn{f.Down, f.Up, to} {
							c.(*net.TCPConn).SetReadBuffer(64 << 10)
							c.(*net.TCPConn).SetWriteBuffer(64 << 10)
						}
						given.start(t, f)
						sendUrgently(t, from, to, before)
					}
				}
			})
		}
	}
}

func startConns(_ *testing.T, f *relaytest.Flow) { f.Start(context.Background(), relay.Options{}) }

func startSockets(t *testing.T, f *relaytest.Flow) {
	loops, r := relaytest.Relay()
	l, fds := loops.Loop(), [2]int{}
	for i, c := range []net.Conn{f.Down, f.Up} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err == nil {
			fds[i], err = tcpsock.Dup(raw)
		}
		if err == nil {
			err = tcpsock.SetOptions(fds[i])
		}
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	r.RunConnecting(context.Background(), l.NewSocket(fds[0]), relay.Connecting{FD: fds[1], Connected: true},
		relay.Options{}, func(relay.Result) {})
}

// sendUrgently compares all that from sends. to reads nothing before all is sent: most of it waits in from's
// kernel then.
func sendUrgently(t *testing.T, from, to net.Conn, before int) {
	t.Helper()
	sent := make([]byte, before+1+1000)
	rand.NewChaCha8([32]byte{'u'}).Read(sent)
	raw, err := from.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	from.SetDeadline(time.Now().Add(time.Minute))
	to.SetDeadline(time.Now().Add(time.Minute))
	_, err = from.Write(sent[:before])
	if werr := raw.Write(func(fd uintptr) bool {
		serr := unix.Sendto(int(fd), sent[before:before+1], unix.MSG_OOB, nil)
		err = errors.Join(err, serr)
		return serr != unix.EAGAIN
	}); err != nil || werr != nil {
		t.Fatal(err, werr)
	}
	if _, err := from.Write(sent[before+1:]); err != nil {
		t.Fatal(err)
	}
	var waiting int
	raw.Control(func(fd uintptr) { waiting, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	if waiting < before/2 && before > 100<<10 {
		t.Errorf("%d bytes wait in the sender's kernel, with nobody who reads: this proves nothing", waiting)
	}
	from.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(to)
	if err != nil || !bytes.Equal(got, sent) {
		at := 0
		for at < min(len(got), len(sent)) && got[at] == sent[at] {
			at++
		}
		t.Errorf("%d bytes arrive of %d, of which byte %d is urgent, and byte %d differs: %v", len(got), len(sent), before, at, err)
	}
}
