package sockmap

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
	"github.com/tailsplice/tailsplice/tcpsock"
)

// TestCopies: both ends hear of the end of a flow at once, and of which kind it is, though something else has
// descriptors of its sockets. TCP gives these up, and further flows have their places.
func TestCopies(t *testing.T) {
	const flows, most = 40, 2
	for kind, c := range map[string]struct {
		ends func(*loadertest.Path, []byte) error
		how  string
	}{
		"the streams end": {func(p *loadertest.Path, data []byte) error {
			for _, way := range []func(*loadertest.Path) (from, to *net.TCPConn){loadertest.Upward, loadertest.Downward} {
				from, to := way(p)
				from.Write(data)
				from.CloseWrite()
				to.SetReadDeadline(time.Now().Add(loadertest.Patience))
				if b, err := io.ReadAll(to); err != nil || string(b) != string(data) {
					return fmt.Errorf("%d of %d bytes, %w", len(b), len(data), err)
				}
			}
			return nil
		}, prove.EndEOF},
		"it is canceled": {func(p *loadertest.Path, data []byte) error {
			p.Client.Write(data)
			p.Server.Write(data)
			p.Cancel()
			for _, end := range []*net.TCPConn{p.Client, p.Server} {
				end.SetReadDeadline(time.Now().Add(loadertest.Patience))
				if _, err := io.Copy(io.Discard, end); !errors.Is(err, unix.ECONNRESET) {
					return fmt.Errorf("an end reads %v, and no reset", err)
				}
			}
			return nil
		}, prove.EndCanceled},
		"an end resets": {func(p *loadertest.Path, data []byte) error {
			p.Client.Write(data)
			p.Client.SetLinger(0)
			p.Client.Close()
			p.Server.SetReadDeadline(time.Now().Add(loadertest.Patience))
			if _, err := io.Copy(io.Discard, p.Server); !errors.Is(err, unix.ECONNRESET) {
				return fmt.Errorf("the other end reads %v, and no reset", err)
			}
			return nil
		}, prove.EndDownstreamReset},
	} {
		t.Run(kind, func(t *testing.T) {
			l := open(t, nil, most)
			for i := range flows {
				var copies []int
				p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(_, _, down, up *net.TCPConn) {
					for _, c := range []*net.TCPConn{down, up} {
						raw, err := c.SyscallConn()
						loadertest.Must(t, err)
						fd, err := tcpsock.Dup(raw)
						loadertest.Must(t, err)
						copies = append(copies, fd)
						t.Cleanup(func() { unix.Close(fd) })
					}
				}})
				if err := c.ends(p, prove.Pattern(1+i*10_000)); err != nil {
					t.Fatalf("flow %d: %v", i, err)
				}
				if r := p.Wait(loadertest.Patience); r.End != c.how {
					t.Fatalf("flow %d ended %+v", i, r)
				}
				for _, fd := range copies {
					// A socket that has ended its stream first waits for no more; the states of both ends follow.
					loadertest.WaitFor(t, func() bool { return tcpsock.IsClosed(fd) }, "TCP gives up the copy")
				}
			}
		})
	}
}
