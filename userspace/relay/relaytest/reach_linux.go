package relaytest

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// RunReach resets flows whose reader goes on, while TCP brings it nothing for longer than a reader may stop.
// It gets all that came before the reset. The server of p is at the far end of a cable, which plug joins and
// cuts.
func RunReach(t *testing.T, p Path, plug func(in bool) error) {
	connect := func(t *testing.T) (f *Flow, server *net.TCPConn) {
		f = p.Connect(t)
		t.Cleanup(func() {
			f.Client.Close()
			f.Server.Close()
		})
		server = f.Server.(*net.TCPConn)
		must(t, server.SetReadBuffer(SmallWindow))
		return f, server
	}
	// A congestion control that has measured a slow reader paces like that, BBR for one.
	t.Run("it is paced", func(t *testing.T) {
		f, server := connect(t)
		const perSecond, n = 900, 24_000 // bytes; ten segments are not paced, and then two go at a time
		must(t, onSocket(f.Up, func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, perSecond)
		}))
		f.Start(context.Background(), relay.Options{})
		out := newStream()
		in := *out
		must(t, errors.Join(out.send(f.Client, n), waitAcked(f.Client)))
		abort(f.Client)
		must(t, in.receive(server, n))
		wantReset(t, p, server)
	})
	t.Run("the cable is cut for a while", func(t *testing.T) {
		f, server := connect(t)
		f.Start(context.Background(), relay.Options{})
		must(t, transfer(f.Client, server, 512<<10)) // a reader who has read that much is given room for n
		const n = 400 << 10
		out := newStream()
		in := *out
		must(t, errors.Join(out.send(f.Client, n), waitAcked(f.Client)))
		abort(f.Client)
		must(t, in.receive(server, n/10))
		must(t, plug(false))
		received := make(chan error, 1)
		go func() { received <- in.receive(server, n-n/10) }()
		time.Sleep(4500 * time.Millisecond) // more than twice what a reader may stop
		must(t, errors.Join(plug(true), <-received))
		wantReset(t, p, server)
	})
}
