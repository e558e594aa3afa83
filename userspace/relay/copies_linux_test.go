package relay_test

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestCopies: both ends hear of the end of a flow, and of which kind it is, though something else has
// descriptors of its sockets: another process that was offered the flow, and hangs, or a socket that carries
// them to one.
func TestCopies(t *testing.T) {
	const soon = 10 * time.Second
	for _, path := range []struct {
		name string
		l    relaytest.Loopback
		o    relay.Options
	}{
		{"on a loop", relaytest.Loopback{}, relay.Options{}},
		{"pumps", relaytest.Loopback{}, relay.WithParkAfter(relay.Options{Head: make([]byte, 8<<20)}, time.Hour)},
		{"parked", relaytest.Loopback{}, relay.WithParkAfter(relay.Options{Head: make([]byte, 8<<20)}, time.Millisecond)},
		{"unix", relaytest.Loopback{Up: "unix"}, relay.Options{}},
	} {
		for name, c := range map[string]struct {
			end func(t *testing.T, f *relaytest.Flow, c *relay.Counters)
			how relay.End
		}{
			"downstream ends first": {func(t *testing.T, f *relaytest.Flow, _ *relay.Counters) {
				endOf(t, f.Client, f.Server)
				endOf(t, f.Server, f.Client)
			}, relay.EndEOF},
			"upstream ends first": {func(t *testing.T, f *relaytest.Flow, _ *relay.Counters) {
				endOf(t, f.Server, f.Client)
				endOf(t, f.Client, f.Server)
			}, relay.EndEOF},
			"killed": {func(t *testing.T, f *relaytest.Flow, c *relay.Counters) {
				c.Kill(errors.New("killed"))
				for _, end := range []net.Conn{f.Client, f.Server} {
					_, err := io.Copy(io.Discard, end)
					if _, isTCP := end.(*net.TCPConn); isTCP && !errors.Is(err, unix.ECONNRESET) || errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("%v reads %v, and no reset", end.LocalAddr(), err)
					}
				}
			}, relay.EndKilled},
		} {
			t.Run(path.name+", "+name, func(t *testing.T) {
				var counters relay.Counters
				f := path.l.Path(t).Connect(t)
				defer f.Client.Close()
				defer f.Server.Close()
				for _, c := range []net.Conn{f.Down, f.Up} {
					tcpsock.Control(c, func(fd int) {
						fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
						if err != nil {
							t.Fatal(err)
						}
						t.Cleanup(func() { unix.Close(fd) })
					})
				}
				o := path.o
				o.Counters = &counters
				f.Start(t.Context(), o)
				for _, end := range []net.Conn{f.Client, f.Server} {
					end.SetDeadline(time.Now().Add(soon))
				}
				if _, err := io.CopyN(io.Discard, f.Server, int64(len(o.Head))); err != nil {
					t.Fatal(err)
				}
				if err := relaytest.Both(f.Client, f.Server, 1000); err != nil {
					t.Fatal(err)
				}
				c.end(t, f, &counters)
				if r := f.Result(t); r.End != c.how {
					t.Errorf("it ended %+v", r)
				}
			})
		}
	}
}

// endOf ends what from sends, and waits until to has seen that.
func endOf(t *testing.T, from, to net.Conn) {
	t.Helper()
	if err := from.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
	if n, err := io.Copy(io.Discard, to); n != 0 || err != nil {
		t.Errorf("%v reads %d bytes, %v, and no end", to.LocalAddr(), n, err)
	}
}
