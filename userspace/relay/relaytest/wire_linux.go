package relaytest

import (
	"bytes"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/wire"
	"github.com/tailsplice/tailsplice/userspace/relay"
)

// RunWire runs the cases that need an end which speaks TCP by hand: what overlaps, comes again, out of order,
// or with one byte, and windows that are closed or small. It is the client, and the server unless l has one.
// It needs root. l's networks are IPv4.
func RunWire(t *testing.T, l Loopback) {
	n, servers, clients := wire.New(t), l.servers(t), newPairs(t, "", nil, false)
	roles := []string{"client", "server"}
	if l.Server != nil {
		roles = roles[:1]
	}
	for _, role := range roles {
		// from and to are the relay's sockets.
		connect := func(t *testing.T) (f *Flow, c *wire.Conn, other, from, to *net.TCPConn) {
			t.Helper()
			f = &Flow{result: make(chan relay.Result, 1)}
			var near, beyond net.Conn
			if role == "client" {
				c, from = n.Connect(t)
				near, beyond = servers.pair(t)
				f.Down, f.Up, f.Server = from, near, beyond
			} else {
				c, from = n.Answer(t)
				beyond, near = clients.pair(t)
				f.Up, f.Down, f.Client = from, near, beyond
			}
			t.Cleanup(func() { beyond.Close() })
			return f, c, beyond.(*net.TCPConn), from, near.(*net.TCPConn)
		}
		for _, k := range wire.Cases() {
			t.Run(role+"/"+k.Name, func(t *testing.T) {
				f, c, other, from, to := connect(t)
				o := relay.Options{}
				if k.Stopped { // so that little fills it
					o.Buffer = 64 << 10
					must(t, errors.Join(from.SetReadBuffer(64<<10), to.SetWriteBuffer(64<<10),
						other.SetReadBuffer(64<<10)))
				}
				must(t, k.Run(c, other, func() { l.run(t.Context(), f, o) }))
				must(t, other.Close())
				if r := f.Result(t); r.End != relay.EndEOF {
					t.Errorf("%+v", r)
				}
			})
		}
		if l.Server != nil {
			continue // the zero windows of the table have to do
		}
		t.Run(role+"/a window that is closed, small, and open", func(t *testing.T) {
			f, c, other, _, _ := connect(t)
			l.run(t.Context(), f, relay.Options{})
			want := bytes.Clone(newStream().next(100_000))
			c.SetWindow(0)
			sent := make(chan error, 1)
			go func() {
				_, err := other.Write(want)
				sent <- err
			}()
			for i := range 200 { // silly windows
				c.SetWindow(uint16(i % 3))
			}
			for _, n := range []uint16{0, 1000, 0, 20_000, 0, 65535} {
				c.SetWindow(n)
				time.Sleep(5 * time.Millisecond)
			}
			must(t, <-sent)
			must(t, closeWrite(other))
			if got, err := c.Receive(len(want), true); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
			}
		})
	}
}
